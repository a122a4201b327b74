"""Sentences on which two models are compared."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from falign.models.structure import base_of

__all__ = ["probe_ids", "probe_logits"]

_PROBE = (
    "The capital of France is Paris, and the river that flows through it is the Seine.",
    "Water boils at 100 degrees Celsius at sea level; at 3,000 metres it boils at about 90.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Sie fragte, ob der Zug heute pünktlich sei, aber niemand wusste es.",
    "Thank you for your question! Here are three steps:\n\n1. Read it.\n2. Think.\n3. Answer briefly.",
)


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return a few sentences (prose, numbers, code, German, a list) as token ids."""
    return [tokenizer(sentence)["input_ids"] for sentence in _PROBE]


@torch.no_grad()
def probe_logits(model: PreTrainedModel | PeftModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits at every token of ``rows``, shape (tokens, V), float32, on the CPU; dropout is off."""
    was_training, device = model.training, base_of(model).device
    model.eval()
    # Row by row: without padding there is nothing to mask. use_cache=False as in training.
    outputs = []
    for row in rows:
        output: Any = model(input_ids=torch.tensor([list(row)], device=device), use_cache=False)
        outputs.append(output.logits[0].float().cpu())
    model.train(was_training)
    return torch.cat(outputs)

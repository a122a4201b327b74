"""First values of an adapter from the data: the directions along which a layer's inputs vary most."""

import re
from collections.abc import Iterator, Sequence

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict
from torch import Tensor, nn
from typing_extensions import override

from falign.errors import ConfigError
from falign.models.structure import adapter_matrix, base_of, lora_layers

__all__ = ["start_from_inputs"]

POSITIONS = 2048
"""Positions of a batch, of which one more than the rank is needed."""


class _Plain(nn.Module):
    """A model in which PEFT sees the linear layers inside the adapter, and nothing else that an adapter wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.model(input_ids=input_ids, attention_mask=attention_mask)


class _Batches(Sequence[dict[str, Tensor]]):
    """Padded batches of whole rows, each of about POSITIONS tokens; PEFT goes through them until it has converged."""

    def __init__(self, rows: Sequence[Sequence[int]], pad_token_id: int) -> None:
        self._batches = [
            {
                "input_ids": torch.tensor([[*row, *[pad_token_id] * (width - len(row))] for row in part]),
                "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part]),
            }
            for part in _parts(rows)
            for width in [max(map(len, part))]
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._batches[index]


def _parts(rows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Rows in groups of at least POSITIONS tokens, the last group with what is left."""
    part: list[Sequence[int]] = []
    size = 0
    for index, row in enumerate(rows):
        part.append(row)
        size += len(row)
        left = sum(map(len, rows[index + 1 :]))
        if size >= POSITIONS and left >= POSITIONS:
            yield part
            part, size = [], 0
    if part:
        yield part


def start_from_inputs(model: PeftModel, rows: Sequence[Sequence[int]], *, pad_token_id: int) -> None:
    """Set A of the adapter ``default`` to the leading right-singular vectors of each layer's centered inputs (EVA).

    B stays zero, so the adapter changes nothing at first, and the model with the adapter off is the start. Every layer
    keeps its rank: PEFT's ``rho`` is 1, without the redistribution of ranks over layers.

    Args:
        model: The base with a new adapter, whose B is zero.
        rows: Token ids of rows of the training data; they are read in order, again and again until the vectors of all
            layers have converged.
        pad_token_id: Fills short rows; padding does not count.

    Raises:
        ConfigError: The rows have fewer tokens than the largest rank needs.

    Source:
        Paischer et al., EVA (arXiv:2410.07170), as PEFT computes it (incremental SVD, cosine similarity 0.99).
    """
    layers = lora_layers(model, "default")
    ranks = {name: layer.r["default"] for name, layer in layers.items()}
    largest, tokens = max(ranks.values()), sum(map(len, rows))
    if tokens <= largest:
        raise ConfigError(
            f"adapter.init_lora_weights=eva with rank {largest}: it needs more tokens of training data than the rank, "
            f"and there are {tokens}: lower adapter.r, or choose another start."
        )
    plain = _Plain(base_of(model))
    modules = {module: name for name, module in plain.named_modules()}
    names = {name: modules[layer.get_base_layer()] for name, layer in layers.items()}
    config = LoraConfig(
        r=largest,
        target_modules=[*names.values()],
        rank_pattern={re.escape(names[name]): rank for name, rank in ranks.items() if rank != largest},
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
    )
    vectors = get_eva_state_dict(
        plain,
        _Batches(rows, pad_token_id),
        config,
        gather_distributed_inputs=False,  # every process reads the same rows
        show_progress_bar=False,
    )
    with torch.no_grad():
        for name, layer in layers.items():
            adapter_matrix(layer.lora_A, "default").copy_(vectors[names[name]][: ranks[name]])

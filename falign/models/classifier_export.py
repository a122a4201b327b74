"""Export of reward models as sequence classifiers of transformers, with one label."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from tokenizers import processors
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from falign.errors import ModelError
from falign.models.export import existing_rule, merged_model
from falign.models.heads import RewardHead
from falign.models.probe import probe_ids
from falign.models.staging import staged_folder
from falign.models.structure import base_of
from falign.models.tokenizers import stop_token_ids
from falign.scoring import PromptTree, Scorer

__all__ = ["ClassifierProof", "export_classifier", "reading_tokenizer", "verify_classifier"]

# Largest accepted difference of rewards, as a share of the largest one (at least 1); as for merged weights.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.25e-1}


@dataclass(frozen=True)
class ClassifierProof:
    """The differences between the rewards of a trained model with its head and of an exported classifier."""

    dtype: str
    compared: int
    max_abs_reward: float
    max_abs_difference: float
    bound: float

    def table(self) -> list[tuple[str, ...]]:
        """Return a title, and rows of a name and a number, as text."""
        return [
            (f"rewards of {self.compared} sentences, {self.dtype}",),
            ("reward", f"{self.max_abs_reward:.4g}"),
            ("difference from the trained model", f"{self.max_abs_difference:.3g}"),
            ("tolerance", f"{self.bound:.3g}"),
        ]


def export_classifier(
    model: PreTrainedModel | PeftModel,
    head: RewardHead,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    *,
    base_name_or_path: str | Path | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    new_token_ids: Sequence[int] = (),
    overwrite: bool = False,
) -> Path:
    """Write a reward model as a folder for ``AutoModelForSequenceClassification``, with the adapter folded in.

    The classifier reads the last token that is not padding, so padding gets a token that ends no completion. The
    tokenizer ends texts where training did, see :func:`reading_tokenizer`.

    Args:
        model: The trained model; it is not changed.
        head: Its reward head.
        tokenizer: The tokenizer it was trained with.
        out_dir: The folder to write; it appears complete or not at all.
        base_name_or_path: As for :func:`falign.models.export_merged`.
        dtype: Dtype of the written weights; ``auto`` is that of the base checkpoint.
        revision: The base's revision on the hub.
        trust_remote_code: Run code that the base's repository brings along.
        new_token_ids: Tokens that were added to the base before training.
        overwrite: Replace a folder that is not empty.

    Raises:
        ModelError: The architecture has no sequence classifier, or as for :func:`falign.models.export_merged`.
    """
    merged = merged_model(
        model,
        base_name_or_path=base_name_or_path,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        new_token_ids=new_token_ids,
    )
    reading = reading_tokenizer(tokenizer, stop_token_ids(base_of(model), tokenizer))
    config = copy.deepcopy(merged.config)
    config.num_labels = 1
    config.get_text_config().pad_token_id = reading.pad_token_id
    try:
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=merged.dtype)
    except ValueError as error:
        raise ModelError(
            f"transformers has no sequence classifier for {type(merged).__name__}, so this reward model cannot be "
            "exported as one: score with the run itself."
        ) from error
    score = dict(classifier.named_children()).get("score")
    if not isinstance(score, nn.Linear) or score.bias is not None:
        raise ModelError(f"{type(classifier).__name__} has no linear head `score` without bias: score with the run.")
    with torch.no_grad():
        classifier.base_model.load_state_dict(merged.base_model.state_dict())
        score.weight.copy_(head.weight)
    size = sum(parameter.nbytes for parameter in classifier.parameters())
    with staged_folder(Path(out_dir), existing=existing_rule(overwrite), needed_bytes=size) as staging:
        classifier.save_pretrained(staging)
        reading.save_pretrained(staging)
    return Path(out_dir)


def reading_tokenizer(tokenizer: PreTrainedTokenizerBase, stops: Collection[int]) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose texts end where a reward was read in training: at the stop token of the last turn.

    Many chat templates write a line break behind it, on which the model was never trained to give a reward. The
    template is extended to leave it out, unless it is asked for a generation prompt, and to add the end-of-sequence
    token where it writes none. Plain texts get that token if special tokens are added. Padding becomes a token that
    ends no completion.

    Args:
        tokenizer: The tokenizer of the training; it is not changed.
        stops: All tokens that end a completion.

    Raises:
        ModelError: The tokenizer has no end-of-sequence token, or no token is left for padding.
    """
    reading = copy.deepcopy(tokenizer)
    if reading.eos_token is None:
        raise ModelError("The tokenizer has no end-of-sequence token, at which a reward could be read: set one.")
    special = {token: id_ for token, id_ in zip(reading.all_special_tokens, reading.all_special_ids, strict=True)}
    free = [token for token, id_ in special.items() if id_ not in stops]
    if reading.pad_token is None or reading.pad_token_id in stops:
        if not free:
            raise ModelError(
                "All special tokens of the tokenizer end a completion, so none can be padding, which a classifier "
                "leaves out when it looks for the last token: add a padding token to the tokenizer and train again."
            )
        reading.pad_token = free[0]
    if isinstance(reading.chat_template, str):
        ends = ", ".join(json.dumps(reading.convert_ids_to_tokens(id_)) for id_ in sorted(stops))
        reading.chat_template = (
            "{%- set falign_text -%}" + reading.chat_template + "{%- endset -%}"
            "{%- if add_generation_prompt -%}{{ falign_text }}"
            f"{{%- elif falign_text.rstrip().endswith(({ends},)) -%}}{{{{ falign_text.rstrip() }}}}"
            f"{{%- else -%}}{{{{ falign_text }}}}{{{{ {json.dumps(reading.eos_token)} }}}}{{%- endif -%}}"
        )
    if isinstance(reading, PreTrainedTokenizerFast):
        eos = str(reading.eos_token)
        ending = processors.TemplateProcessing(
            single=["$A", eos], pair=["$A", "$B", eos], special_tokens=[(eos, reading.eos_token_id)]
        )
        backend = reading.backend_tokenizer
        before = [] if backend.post_processor is None else [backend.post_processor]
        backend.post_processor = processors.Sequence([*before, ending])
    return reading


@torch.no_grad()
def verify_classifier(
    model: PreTrainedModel | PeftModel, head: RewardHead, folder: Path, *, tokenizer: PreTrainedTokenizerBase
) -> ClassifierProof:
    """Load an exported classifier as any other program would, and compare its scores with the trained rewards.

    Sentences that end with the end-of-sequence token are scored in one padded batch.

    Args:
        model: The trained model.
        head: Its reward head.
        folder: The exported folder.
        tokenizer: The tokenizer of the training.

    Raises:
        ModelError: A difference above the bound.
    """
    assert tokenizer.eos_token_id is not None
    rows = [[*ids, tokenizer.eos_token_id] for ids in probe_ids(tokenizer)]
    trees = [PromptTree(tuple(ids[:1]), (tuple(ids[1:]),)) for ids in rows]
    scorer = Scorer("padded", pad_token_id=rows[0][-1])
    scores = scorer.scores(model, scorer.lay_out(trees, model=model), reward_head=head, with_vocabulary=False)
    assert scores.learned_rewards is not None
    trained = scores.learned_rewards.float().cpu()
    device = base_of(model).device
    classifier = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype="auto", local_files_only=True, trust_remote_code=False
    )
    classifier = classifier.to(device).eval()
    reading = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    padded = reading.pad({"input_ids": rows}, padding_side="right", return_tensors="pt").to(device)
    exported: Tensor = classifier(**padded).logits[:, 0].float().cpu()
    largest, difference = trained.abs().max().item(), (exported - trained).abs().max().item()
    coarser = max(classifier.dtype, base_of(model).dtype, key=lambda kind: torch.finfo(kind).eps)
    bound = BOUNDS[coarser] * max(1.0, largest)
    if not difference <= bound:  # a NaN must fail too
        raise ModelError(
            f"{folder} is not the trained reward model: its scores differ by up to {difference:.4g}, and rounding to "
            f"{str(coarser).removeprefix('torch.')} explains at most {bound:.2g}. Do not use it; check that the base "
            "on disk is the one that was trained."
        )
    return ClassifierProof(str(classifier.dtype).removeprefix("torch."), len(rows), largest, difference, bound)

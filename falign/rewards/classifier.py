"""A reward model: a sequence classifier that reads prompt and completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from falign.errors import ConfigError, ModelError, RewardError, one_line
from falign.models.execution import named_device, resolve_dtype
from falign.models.identity import model_identity
from falign.models.sources import check_weights, resolve
from falign.models.staging import reading
from falign.models.tokenizers import fix_date, tokenizer_fingerprint
from falign.rewards.base import place_of
from falign.rewards.identity import Identity

__all__ = ["ClassifierReward", "load_classifier"]


@dataclass(frozen=True)
class ClassifierReward:
    """Scores of completions from a classifier's head.

    Attributes:
        model: A classifier whose head has one score or several labels.
        tokenizer: The classifier's tokenizer.
        text: Its input: ``joined``: prompt and completion as one text; ``completion``: only the completion; ``pair``:
            both as a pair of texts; ``chat``: a conversation in the tokenizer's template.
        output: ``score``: the head's raw value; ``logprob`` and ``probability``: of the label, or of the logistic
            function if the head has one score.
        label: Name or index of the label; needed if there are several.
        max_length: Maximum number of tokens, by default that of tokenizer and model; longer inputs are cut on the
            tokenizer's ``truncation_side``, which :func:`load_classifier` makes the left.
        tokens_per_batch: Tokens computed at once, padding included.

    Raises:
        ConfigError: The label is missing or unknown, or there is no chat template for ``chat``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: Literal["joined", "completion", "pair", "chat"] = "joined"
    output: Literal["score", "logprob", "probability"] = "score"
    label: str | int | None = None
    max_length: int | None = None
    tokens_per_batch: int = 16_384

    def __post_init__(self) -> None:
        self._label_index()
        if self.text == "chat" and self.tokenizer.chat_template is None:
            raise ConfigError("reward classifier: text=chat needs a chat template, and its tokenizer has none.")

    def fix_date(self, date: datetime) -> None:
        """Set the date that the chat template writes."""
        fix_date(self.tokenizer, date)

    def __call__(self, prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float | None]:
        places = columns.get("place")
        rows = [
            self._token_ids(prompt, completion, place_of(places, i))
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        values: list[float | None] = [None] * len(rows)
        for batch in self._batches([len(ids) for ids in rows]):
            logits = self._logits([rows[i] for i in batch])
            for i, value in zip(batch, self._values(logits).tolist(), strict=True):
                values[i] = value
        return values

    def row_errors(self, prompts: list[Any], **columns: list[Any]) -> list[str | None]:
        """Return why a prompt cannot be read together with a completion."""
        return [None if self._reads(prompt) else self._unreadable for prompt in prompts]

    def _reads(self, prompt: Any) -> bool:
        return isinstance(prompt, str) or self.text in ("chat", "completion")

    @property
    def _unreadable(self) -> str:
        return f"the prompt is a conversation, which text={self.text} cannot read; set text to chat or completion"

    def identity(self) -> Identity:
        """Return this module, the weights, the configuration, the tokenizer and the fields that change a value."""
        settings = {
            **model_identity(self.model),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            **{name: getattr(self, name) for name in ("text", "output", "label", "max_length")},
        }
        return Identity(__name__, settings)

    def _label_index(self) -> int:
        names: dict[Any, str] = self.model.config.id2label or {}
        if self.label is None:
            if len(names) > 1:
                raise ConfigError(f"reward classifier: it has {len(names)} labels; choose one of {[*names.values()]}.")
            return 0
        for index, name in names.items():
            if self.label in (name, index):
                return int(index)
        raise ConfigError(f"reward classifier: label={self.label!r} is unknown; choose one of {[*names.values()]}.")

    def _token_ids(self, prompt: Any, completion: str, place: str) -> list[int]:
        if self.text == "chat":
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            turns.append({"role": "assistant", "content": completion})
            # The template writes the special tokens itself.
            rendered: Any = self.tokenizer.apply_chat_template(turns, tokenize=False)
            return self._encoded([rendered], place, special=False)
        if not self._reads(prompt):
            raise RewardError(f"reward classifier, {place}: {self._unreadable}.")
        if self.text == "completion":
            texts = [completion]
        else:
            texts = [prompt + completion] if self.text == "joined" else [prompt, completion]
        return self._encoded(texts, place)

    def _encoded(self, texts: Sequence[str], place: str, *, special: bool = True) -> list[int]:
        limit = self.max_length
        if limit is None:
            positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
            limit = min(self.tokenizer.model_max_length, positions or self.tokenizer.model_max_length)
        ids = self.tokenizer(*texts, truncation=True, max_length=limit, add_special_tokens=special).input_ids
        if not ids:
            raise RewardError(f"reward classifier, {place}: the text is empty; set text to joined, pair or chat.")
        return ids

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
            # The first of a batch is its longest.
            if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > self.tokens_per_batch:
                batches.append([])
            batches[-1].append(i)
        return batches

    def _logits(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, "N C"]:
        config = self.model.config.get_text_config()
        configured = config.pad_token_id
        # Decoders read the last token that is not padding. If the model has no padding token, one that no row ends
        # with takes its place; among len(rows) + 1 ids there is always one.
        ends = {row[-1] for row in rows}
        pad = min(set(range(len(rows) + 1)) - ends) if configured is None else configured
        length = max(map(len, rows))
        ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=self.model.device)
        config.pad_token_id = pad
        try:
            with torch.no_grad():
                return self.model(input_ids=ids, attention_mask=mask).logits.float()
        finally:
            config.pad_token_id = configured

    def _values(self, logits: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
        index = self._label_index()
        if self.output == "score":
            return logits[:, index]
        logprobs = F.logsigmoid(logits[:, 0]) if logits.shape[1] == 1 else logits.log_softmax(dim=-1)[:, index]
        return logprobs if self.output == "logprob" else logprobs.exp()


def load_classifier(
    name_or_path: str | Path,
    *,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classifier and its tokenizer, in evaluation mode; code of the repository is never run.

    Args:
        name_or_path: A Hub name or a folder with safetensors.
        dtype: As for :func:`falign.models.load_model`.
        device: By default the GPU if there is one.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ConfigError: The device does not exist.
        ModelError: The model does not exist, or its head is missing and would be random.
    """
    place, name = named_device(device), resolve(name_or_path)
    if Path(name).is_dir():
        check_weights(Path(name))
    with reading(lambda error: _unloadable(name, error)):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=resolve_dtype(dtype, device=place) or "auto",
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,  # without it, transformers would ask at the terminal
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, truncation_side="left", trust_remote_code=False
        )
    if info["missing_keys"]:
        raise ModelError(
            f"{name} lacks weights of {type(model).__name__}, which would be random: "
            f"{sorted(info['missing_keys'])[:4]}. Give a checkpoint of a sequence classifier."
        )
    return model.to(place).eval(), tokenizer


def _unloadable(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"Cannot load the classifier {name!r}: {one_line(error)} Give a folder or a Hub name of a "
        "sequence classifier that needs no code of its own."
    )

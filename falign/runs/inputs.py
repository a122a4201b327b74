"""Content hashes of everything that decides the steps of a run; a run resumes only if none of them has changed."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from falign.data import PromptRow
from falign.rollouts.buffer import RolloutBuffer
from falign.scoring import PromptTree

__all__ = ["RunInputs", "RunRows", "prompt_digest", "text_hash"]

SHORT = 32
"""Hexadecimal digits of a prompt's digest."""

TRAINED_ON = ("data.train", "prompts.train")

REMEDIES = {
    "chat_template": "restore the template that model.chat_template or model.path has",
    "tokenizer": "restore the tokenizer files of model.path, or set model.revision",
    "stop_tokens": "restore generation_config.json of model.path, or set model.revision",
    "base_weights": "restore the weights of model.path, or set model.revision",
    "base_config": "restore config.json of model.path, or set model.revision",
    "reference": "restore the model or adapter that the section reference names",
    "references": "restore the model or adapter that its section under references names",
    "objective_code": "restore that module",
    "rewards": "restore its code and files, or continue with it by `new_rewards`, which the manifest records",
}
"""The remedy for each input that has changed."""

NAMES = {
    "chat_template": "the chat template",
    "tokenizer": "the tokenizer of model.path",
    "stop_tokens": "the stop tokens of model.path",
    "base_weights": "the weights of model.path",
    "base_config": "config.json of model.path",
    "reference": "the reference",
    "references": "the reference",
    "objective_code": "the code of",
    "rewards": "reward",
}


def text_hash(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def prompt_digest(prompt_ids: Sequence[int]) -> str:
    """Return the digest that a run records for the prompt of a row, computed from its token ids."""
    return _hash(prompt_ids)[:SHORT]


@dataclass(frozen=True)
class RunRows:
    """Digests of the rows of a run in their order, as ``rows.txt`` in its folder lists them.

    Attributes:
        rows: By section of the run file (``data.train``, ``prompts.eval`` ...), two digests per row: of its prompt
            (:func:`prompt_digest`), and of everything that training reads of the row.
    """

    rows: Mapping[str, Sequence[tuple[str, str]]]

    @classmethod
    def of(cls, sections: Mapping[str, Iterable[PromptTree | PromptRow | RolloutBuffer]]) -> RunRows:
        """Return the digests of rows by section."""
        return cls({section: [_digests(row) for row in rows] for section, rows in sections.items()})

    @classmethod
    def read(cls, text: str) -> RunRows:
        """Read :attr:`text` back; a damaged text gives rows with a different :attr:`digest`."""
        rows: dict[str, list[tuple[str, str]]] = {}
        # Not splitlines(), which would also split at other characters of a damaged file and give an equal digest.
        for line in text.split("\n")[:-1]:
            section, _, digests = line.partition(" ")
            prompt, _, row = digests.partition(" ")
            rows.setdefault(section, []).append((prompt, row))
        return cls(rows)

    @property
    def text(self) -> str:
        """One line per row: its section and both digests."""
        return "".join(f"{section} {' '.join(row)}\n" for section, rows in self.rows.items() for row in rows)

    @property
    def digest(self) -> str:
        """The SHA-256 of :attr:`text`."""
        return text_hash(self.text)

    @property
    def trained_prompts(self) -> frozenset[str]:
        """The digests of all prompts that the run trains on."""
        return frozenset(prompt for section in TRAINED_ON for prompt, _ in self.rows.get(section, ()))

    def difference(self, other: RunRows) -> str | None:
        """Describe the first difference to the present rows; None if there is none."""
        for section in dict.fromkeys((*self.rows, *other.rows)):
            then, now = self.rows.get(section, ()), other.rows.get(section, ())
            if len(then) != len(now):
                return f"{section} had {len(then)} rows when the run began, and has {len(now)} now"
            for number, (before, after) in enumerate(zip(then, now, strict=True), start=1):
                if before != after:
                    return f"row {number} of {section} (counting used rows) differs from when the run began"
        return None


@dataclass(frozen=True)
class RunInputs:
    """Everything that decides the steps of a run besides its rows and settings.

    Attributes:
        hashes: Hash by the names of :data:`NAMES`; a mapping if there are several parts, such as one per reward.
    """

    hashes: Mapping[str, Any]

    def difference(self, recorded: Mapping[str, Any]) -> str | None:
        """Name the first input that differs from the record, with the remedy; None if none does."""
        # In the order of REMEDIES: causes come before what follows from them. Another template changes the tokenizer's
        # fingerprint too, and the template is what the user must restore.
        for name, remedy in REMEDIES.items():
            then, now = _plain(recorded.get(name)), _plain(self.hashes.get(name))
            if then == now:
                continue
            parts = sorted(then.keys() | now.keys()) if isinstance(then, dict) and isinstance(now, dict) else []
            part = next((f" {part}" for part in parts if then.get(part) != now.get(part)), "")
            return f"{NAMES[name]}{part} differs from when the run began: {remedy}"
        return None


def _digests(row: PromptTree | PromptRow | RolloutBuffer) -> tuple[str, str]:
    ids, rest = _contents(row)
    # The row's digest includes its prompt, so that equal completions of different prompts differ.
    return prompt_digest(ids), text_hash(f"{_hash(ids)} {rest}")


def _contents(row: PromptTree | PromptRow | RolloutBuffer) -> tuple[Sequence[int], str]:
    """Return the prompt's ids, and a text with everything else that objectives and rewards read."""
    if isinstance(row, PromptRow):
        return row.prompt_ids, json.dumps([row.prompt, dict(row.columns)], sort_keys=True, default=str)
    if isinstance(row, RolloutBuffer):
        ids, rest = _contents(row.trees[0])
        columns = {name: values.tolist() for name, (values, _) in row.columns.items()}
        return ids, f"{rest} {json.dumps(columns, sort_keys=True)}"
    # What most rows lack is left out, so that the digests of older runs stay the same.
    further = {
        "token_weights": row.token_weights,
        "weight": None if row.weight == 1 else row.weight,
        "counted": row.counted,
    }
    further = {name: value for name, value in further.items() if value is not None}
    return row.prompt_ids, json.dumps(
        [[_hash(ids) for ids in row.completion_ids], row.preference, *([further] if further else [])]
    )


def _hash(ids: Sequence[int]) -> str:
    # Eight bytes per id: with a separator-free text, [1, 23] and [12, 3] would have the same hash.
    return hashlib.sha256(array("q", ids).tobytes()).hexdigest()


def _plain(value: Any) -> Any:
    """Return the value as it reads back from JSON."""
    return json.loads(json.dumps(value, default=str))

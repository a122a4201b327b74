"""Data of axolotl: its types of rows, as layouts and columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from falign.foreign.rows import Value
from falign.foreign.shared import mapping_of
from falign.foreign.translation import Translation

__all__ = ["eval_sources", "train_sources"]

PAIRS: Mapping[str, dict[str, Any]] = {
    "default": {"columns": {}},
    "intel": {"columns": {"prompt": "question"}},
    "icr": {"columns": {"prompt": "input"}},
    "argilla": {"columns": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"}},
    "prompt_pairs": {"columns": {}},
    "argilla_chat": {"format": "implicit"},
    "ultra": {"format": "implicit", "ignore": ["prompt"]},
}
"""Preference rows by the second part of the type: ``chatml.intel``."""

LABELED: Mapping[str, dict[str, Any]] = {
    "argilla": {"columns": {"prompt": "instruction"}},
    "intel": {"columns": {"prompt": "question"}},
    "prompt_pairs": {"columns": {}},
    "ultra": {"columns": {}},
}
TEMPLATES = ("chatml", "llama3", "chat_template")

FIELDS = {
    "field_prompt": "prompt",
    "field_system": "system",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_completion": "completion",
    "field_label": "label",
}
FORMATS = ("prompt_format", "chosen_format", "rejected_format", "completion_format")

READ = {
    "path",
    "split",
    "type",
    "ds_type",
    "data_files",
    "field_messages",
    "field_chosen",
    "field_rejected",
    "message_property_mappings",
    "roles",
    "chat_template",
}


def train_sources(run: Translation, method: str) -> list[dict[str, Any]]:
    """Return the training sources.

    Args:
        run: The translation.
        method: ``dpo``, ``ipo``, ``kto`` or ``sft``.
    """
    if not run["datasets"]:
        run.refuse("datasets", "it is required")
        return []
    return [_source(run, "datasets", i, each, method) for i, each in enumerate(run["datasets"])]


def eval_sources(run: Translation, method: str) -> list[dict[str, Any]]:
    """Return the held-out sources; arguments as :func:`train_sources`."""
    return [_source(run, "test_datasets", i, each, method) for i, each in enumerate(run["test_datasets"] or [])]


def _source(run: Translation, name: str, number: int, given: Value, method: str) -> dict[str, Any]:
    source = mapping_of(given, f"{name}.{number}")
    if rest := sorted(key for key in source.keys() - READ if source[key] is not None):
        run.refuse(name, f"{rest[0]} of source {number}; data.train has path, split, format, columns and ignore")
    files = source.get("data_files")
    path = files[0] if isinstance(files, list) and len(files) == 1 else files or source.get("path")
    if path is None or isinstance(path, list):
        run.refuse(name, f"source {number} must be one path or one file")
        path = ""
    found: dict[str, Any] = {"path": path, "split": source.get("split") or "train"}
    mapping = source.get("message_property_mappings") or {}
    if {**mapping} not in ({}, {"role": "role", "content": "content"}, {"role": "from", "content": "value"}):
        run.refuse(
            name, f"message_property_mappings of source {number}; turns have role and content, or from and value"
        )
    kind = source.get("type")
    if isinstance(kind, Mapping):
        return {**found, **_user_defined(run, name, number, kind)}
    family, _, variant = str(kind or "chat_template").partition(".")
    if method == "sft":
        layout = _messages(source) if family == "chat_template" else None
    elif family == "chat_template" and variant in ("", "default"):
        layout = _conversation(source, labeled=method == "kto")
    else:
        layout = (LABELED if method == "kto" else PAIRS).get(variant or "default") if family in TEMPLATES else None
    if layout is None:
        run.refuse(name, f"type {kind} of source {number} writes prompts of its own; {_advice(method)}")
        return found
    columns = {"columns": layout["columns"]} if layout.get("columns") else {}
    rest = {key: value for key, value in layout.items() if key != "columns"}
    if family in ("chatml", "llama3"):
        run.differ(f"turns of {path} are rendered by the tokenizer's chat template, which should be {family}'s.")
    return {**found, **rest, **columns, "chat": True} if family in TEMPLATES else found


def _advice(method: str) -> str:
    return "use chat_template" if method == "sft" else "use chat_template.default, or fields of your own"


def _messages(source: Mapping[str, Any]) -> dict[str, Any]:
    field = source.get("field_messages") or "messages"
    return {"format": "completion", "columns": {} if field == "messages" else {"messages": field}}


def _conversation(source: Mapping[str, Any], *, labeled: bool) -> dict[str, Any]:
    field = source.get("field_messages") or "messages"
    if labeled:
        return {"format": "unpaired", "columns": {} if field == "messages" else {"messages": field}}
    names = {"conversations": field}
    names |= {side: source[f"field_{side}"] for side in ("chosen", "rejected") if source.get(f"field_{side}")}
    return {"format": "sharegpt", "columns": {ours: theirs for ours, theirs in names.items() if ours != theirs}}


def _user_defined(run: Translation, name: str, number: int, kind: Mapping[str, Any]) -> dict[str, Any]:
    """Return columns of a type with fields, whose texts are continued as they are."""
    for form in FORMATS:
        plain = "{" + form.removesuffix("_format") + "}"
        if kind.get(form) not in (None, plain):
            run.refuse(name, f"{form} of source {number} writes more than {plain}; write the texts into the rows")
    if rest := sorted(kind.keys() - FIELDS.keys() - set(FORMATS)):
        run.refuse(name, f"{rest[0]} of source {number} is unknown")
    columns = {ours: kind[theirs] for theirs, ours in FIELDS.items() if kind.get(theirs) not in (None, ours)}
    return {**({"columns": columns} if columns else {}), "chat": False}

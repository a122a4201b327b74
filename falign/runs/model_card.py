"""Model cards: ``README.md`` of an exported folder, with the method, the data, the figures and how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from falign.errors import ConfigError

if TYPE_CHECKING:
    from falign.runs.loading import OpenRun

__all__ = ["LICENSE_FIELDS", "base_license", "check_license", "model_card"]

LICENSE_FIELDS = ("license", "license_name", "license_link")
"""Fields of a card's metadata that say how a model may be used."""

LIBRARIES = {"adapter": "peft", "merged": "transformers", "classifier": "transformers", "gguf": "gguf"}

LOADING = {
    "adapter": """\
```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

With vLLM, over the base model: `vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules mine={name}`.
""",
    "merged": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

With vLLM: `vllm serve {name}`.
""",
    "classifier": """\
```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
turns = [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]
inputs = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
reward = model(**inputs).logits[0, 0]
```

With vLLM: `vllm serve {name} --runner pooling`. The reward is read at the last token, where the tokenizer of this
folder ends a text as in training; take no other tokenizer.
""",
    "gguf": """\
```bash
llama-cli -m {file} -p "..."
```

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", gguf_file="{file}")
```
""",
}


def model_card(
    run: OpenRun, format: str, *, name: str, files: tuple[str, ...] = (), license: Mapping[str, str] | None = None
) -> ModelCard:
    """Return the card of an export.

    Args:
        run: The finished run.
        format: The format of the export.
        name: Where the reader will find it: a repository, or ``.`` for the folder itself.
        files: Names of its files that the card shows, such as that of GGUF weights.
        license: ``license``, and ``license_name`` and ``license_link`` for one that the Hub does not list; by default
            those in the card of the base model, if it is on this disk.
    """
    config, manifest = run.config, run.folder.read_manifest()
    found = base_license(config.model.path) if license is None else dict(license)
    base, objective = _hub_name(config.model.path), run.folder.read_settings()["objective"]
    hub_sources = [
        source for each in manifest["data"].get("sources", []) if (source := _hub_name(each["path"])) is not None
    ]
    data = ModelCardData(
        base_model=base,
        library_name=LIBRARIES[format],
        pipeline_tag="text-classification" if format == "classifier" else "text-generation",
        datasets=sorted(set(hub_sources)) or None,
        tags=["falign", "reward-model" if format == "classifier" else "alignment", _tag(str(objective["kind"]))],
        ignore_metadata_errors=False,
        **found,  # pyright: ignore[reportArgumentType]
    )
    if base is not None:
        relation = {"adapter": "adapter", "gguf": "quantized"}.get(format, "finetune")
        data["base_model_relation"] = relation
    rank = 0 if config.adapter is None else config.adapter.r
    loading = LOADING[format].format(
        name=name, base=base or "BASE", rank=rank or 16, file=files[0] if files else "model.gguf"
    )
    parts = [
        f"# {run.path.resolve().name}",
        f"{_named(config.model.path)}, trained with falign: {_method(config)}.",
        "## How to load" if name != "." else "## How to load, in this folder",
        loading.strip(),
        "## Training",
        _table(("setting", "value"), _settings(run, objective)),
        "## Data",
        _table(("source", "rows", "used", "dropped", "bad"), _sources(manifest)),
        _counts(manifest),
        *_figures(run),
        "## License",
        _license_text(found, config.model.path),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def base_license(path: str) -> dict[str, str]:
    """Return the license fields in the card of a model on this disk; empty if it has none.

    Args:
        path: A folder, or the name of a repository whose card is in the cache of the Hub.
    """
    card = Path(path).expanduser() / "README.md"
    if not card.is_file():
        if _hub_name(path) is None:
            return {}
        cached = try_to_load_from_cache(path, "README.md")
        if not isinstance(cached, str):
            return {}
        card = Path(cached)
    text = card.read_text(encoding="utf-8", errors="replace")
    head = text.split("---", 2)[1] if text.startswith("---") and text.count("---") > 1 else ""
    try:
        fields = yaml.safe_load(head)
    except yaml.YAMLError:  # a card that nobody can read names no license
        return {}
    return {name: str(fields[name]) for name in LICENSE_FIELDS if isinstance(fields, dict) and fields.get(name)}


def check_license(license: str | None) -> dict[str, str] | None:
    """Return the license fields of an identifier; None if none is given.

    Raises:
        ConfigError: It is not an identifier.
    """
    if license is None:
        return None
    if not license or license != license.strip().lower() or " " in license:
        raise ConfigError(f"license={license!r}: give an identifier of the Hub, such as apache-2.0, mit or other.")
    return {"license": license}


def _hub_name(path: str) -> str | None:
    """Return a path that is the name of a repository, and not one of this disk."""
    if Path(path).expanduser().exists() or path.count("/") != 1 or path.startswith((".", "/", "~")):
        return None
    try:
        validate_repo_id(path)
    except HFValidationError:
        return None
    return path


def _named(path: str) -> str:
    """Return the name of a model or file without the folders of this disk."""
    return path if _hub_name(path) or ":" in path else Path(path).name


def _tag(kind: str) -> str:
    return kind.replace("_", "-").rpartition(":")[2]


def _method(config: Any) -> str:
    method = config.objective.method or config.objective.kind
    title = config.objective.title
    return method if title == config.objective.kind else f"{method}, {title}"


def _settings(run: OpenRun, objective: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    config, manifest = run.config, run.folder.read_manifest()
    yield "objective", _flow(objective)
    reference = {name: value for name, value in manifest["reference"].items() if name in ("kind", "weights")}
    yield "reference", _flow(reference) if reference else "none"
    yield "base model", _named(config.model.path)
    yield "base weights (SHA-256)", manifest["base_weights"]
    yield "adapter", "none: all weights" if config.adapter is None else _flow(config.adapter.model_dump(mode="json"))
    logs = run.folder.metrics()
    yield "steps", str(max((log["step"] for log in logs), default=0))
    training = config.training.model_dump(mode="json")
    changed = {name: training[name] for name in sorted(config.training.model_fields_set) if name in training}
    yield "training", _flow(changed)
    yield "seed", str(config.seed)
    versions = manifest["versions"]
    yield (
        "versions",
        ", ".join(
            f"{name} {versions[name]}" for name in ("falign", "torch", "transformers", "peft") if name in versions
        ),
    )


def _sources(manifest: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    data = manifest["data"]
    for source in (*data.get("sources", []), *data.get("eval_sources", [])):
        dropped = sum(source.get("dropped", {}).values()) if isinstance(source.get("dropped"), dict) else 0
        counts = (source.get("read", ""), source.get("kept", ""), dropped, source.get("bad", 0))
        yield (_named(str(source["path"])), *map(str, counts))


def _counts(manifest: Mapping[str, Any]) -> str:
    data = manifest["data"]
    rows = f"Training rows: {data.get('num_train', '?')}; held out: {data.get('num_eval', 0)}."
    return f"{rows} SHA-256 of all rows as token ids, in order: `{manifest['inputs']['rows']}`."


def _figures(run: OpenRun) -> list[str]:
    before, after = run.summary.before, run.summary.after
    if not after:
        return ["## Measured", "The run had no held-out rows."]
    rows = [(name, _number(before.get(name)), _number(value)) for name, value in sorted(after.items())]
    return ["## Measured on held-out rows", _table(("metric", "before", "after"), rows)]


def _license_text(found: Mapping[str, str], base: str) -> str:
    if found:
        return "; ".join(f"{name}: {value}" for name, value in found.items()) + "."
    return (
        f"Not recorded. The weights are made from {_named(base)}, whose license applies to them; the terms of the data "
        "may apply, too."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _flow(values: Mapping[str, Any]) -> str:
    """Return a mapping on one line, with local paths reduced to their names, and without what is not set."""
    plain = {name: _without_folders(value) for name, value in values.items() if value is not None}
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=10_000).strip()
    return f"`{text}`"


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_folders(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(each) for each in value]
    return _named(value) if isinstance(value, str) and "/" in value else value


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)

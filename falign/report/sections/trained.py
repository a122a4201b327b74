"""The training: method, divergence, model, versions, the command to repeat it, and differences between runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from falign.references import REFERENCE
from falign.report.metric_names import NOTHING, divergence_label, number
from falign.report.runs import ReportedRun
from falign.report.sections.base import Section, path_of
from falign.report.tables import Html, code, details, joined, run_name, table, tag
from falign.runfile.schedule_config import in_words, is_schedule

__all__ = ["trained"]

BESIDE = frozenset({"kind", "divergence", "beta", "target"})


def trained(runs: Sequence[ReportedRun]) -> Section:
    """Describe each run, and how to repeat it."""
    rows = [[label, *(say(run) for run in runs)] for label, say in ROWS.items()]
    rows = [row for row in rows if any(cell != NOTHING for cell in row[1:])]
    body = [table("What was trained", ["", *map(run_name, runs)], rows, text=True, quiet=True)]
    if len(runs) > 1:
        body.append(_differences(runs))
    commands = "\n".join(f"falign train {path_of(run)}/run.yaml output_dir={path_of(run)}-again" for run in runs)
    body += [tag("h3", "To train it again"), code(commands, "command to train it again")]
    for run in runs:
        text = yaml.safe_dump(run.run_file, sort_keys=False, allow_unicode=True)
        name = f" of {run.label}" if len(runs) > 1 else ""
        body.append(details(f"The whole run file{name}", code(text, f"run file{name}")))
    return Section("trained", "What was trained", joined(body))


def _differences(runs: Sequence[ReportedRun]) -> Html:
    flat = [_flat({name: value for name, value in run.run_file.items() if name != "output_dir"}) for run in runs]
    names = dict.fromkeys(name for fields in flat for name, value in fields.items() if value is not None)
    rows = [
        [tag("code", *_breakable(name)), *(_said(fields[name]) if name in fields else NOTHING for fields in flat)]
        for name in names
        if any(fields.get(name) != flat[0].get(name) for fields in flat)
    ]
    if not rows:
        return tag("p", "The run files are equal but for the folder.", attributes={"class": "note"})
    return table("What differs in the run files", ["field", *map(run_name, runs)], rows, text=True)


def _breakable(name: str) -> list[str]:
    """Return the name of a field, with possible line breaks between its parts."""
    first, *others = name.split(".")
    return [first, *(part for other in others for part in (tag("wbr"), f".{other}"))]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        items = enumerate(value)
    if not items:
        return {prefix: value}
    return {name: inner for key, part in items for name, inner in _flat(part, f"{prefix}.{key}".strip(".")).items()}


def _said(value: Any) -> str:
    """Return a value as it is written in the run file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if is_schedule(value):
        return in_words(value)
    return ", ".join(map(_said, value)) if isinstance(value, list) else str(value)


def _method(run: ReportedRun) -> str:
    section = run.objective_section
    name = section.method or str(run.run_file["objective"]["kind"])
    return f"online {name.replace(' on pairs', '')}" if run.online and section.learns_from_preferences else name


def _divergence(run: ReportedRun) -> str:
    name = run.run_file["objective"].get("divergence")
    return NOTHING if name is None else in_words(name, divergence_label)


def _beta(run: ReportedRun) -> str:
    return in_words(run.run_file["objective"].get("beta"), number)


def _target(run: ReportedRun) -> str:
    target = run.run_file["objective"].get("target")
    if not target:
        return NOTHING
    others = [f"{name} {_said(value)}" for name, value in target.items() if name != "kind" and value is not None]
    return ", ".join([target["kind"], *others])


def _settings(run: ReportedRun) -> str:
    others = {
        name: value for name, value in run.run_file["objective"].items() if name not in BESIDE and value is not None
    }
    return ", ".join(f"{name} {_said(value)}" for name, value in others.items()) or NOTHING


def _rewards(run: ReportedRun) -> str:
    return ", ".join(reward.get("name") or reward["kind"] for reward in run.run_file.get("rewards") or []) or NOTHING


def _reference(run: ReportedRun) -> str:
    written = run.run_file.get("references") or {REFERENCE: run.run_file.get("reference") or {}}
    found = {REFERENCE: run.manifest.get("reference", {}), **run.manifest.get("references", {})}
    kinds = {name: found.get(name, {}).get("kind", section.get("kind", "auto")) for name, section in written.items()}
    spoken = {
        name: {"adapter_off": "the model without its adapter"}.get(kind, str(kind).replace("_", " "))
        for name, kind in kinds.items()
    }
    return ", ".join(kind if name == REFERENCE else f"{name}: {kind}" for name, kind in spoken.items())


def _model(run: ReportedRun) -> Html:
    described = run.manifest["model"]
    size = f"{described['architecture']}, {_count(described['total_parameters'])} parameters"
    return joined([run.run_file["model"]["path"], tag("br"), tag("small", size)])


def _adapter(run: ReportedRun) -> str:
    adapter: Mapping[str, Any] | None = run.run_file.get("adapter")
    count = f"{_count(run.manifest['model']['trainable_parameters'])} trained"
    if adapter is None:
        return f"none, all weights: {count}"
    origin = f"from {adapter['init']}" if adapter.get("init") else f"LoRA, r {adapter['r']}, alpha {adapter['alpha']:g}"
    return f"{origin}: {count}"


def _steps(run: ReportedRun) -> str:
    steps = max((log["step"] for log in run.logs), default=0)
    return f"{steps}" if run.ended else f"{steps} so far"


def _time(run: ReportedRun) -> str:
    seconds = next((log["train_runtime"] for log in reversed(run.logs) if "train_runtime" in log), None)
    return NOTHING if seconds is None else f"{seconds / 60:.1f} min"


def _batch(run: ReportedRun) -> str:
    training, rollout = run.run_file["training"], run.run_file["rollout"]
    if run.online:
        return f"{_counted(rollout['prompts'], 'prompt')} × {_counted(rollout['completions'], 'completion')}"
    if training.get("tokens_per_batch"):
        return f"{training['tokens_per_batch']} tokens × {training['gradient_accumulation_steps']}"
    return _counted(training["per_device_train_batch_size"] * training["gradient_accumulation_steps"], "prompt")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _versions(run: ReportedRun) -> str:
    return ", ".join(f"{name} {version}" for name, version in run.manifest["versions"].items())


def _count(number_of: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number_of >= size:
            return f"{number_of / size:.3g} {letter}"
    return str(number_of)


ROWS: dict[str, Callable[[ReportedRun], str]] = {
    "method": _method,
    "divergence": _divergence,
    "β": _beta,
    "target": _target,
    "rewards": _rewards,
    "other settings": _settings,
    "reference": _reference,
    "model": _model,
    "adapter": _adapter,
    "steps": _steps,
    "model kept": lambda run: NOTHING if run.best is None else str(run.best),
    "batch": _batch,
    "learning rate": lambda run: number(run.run_file["training"]["learning_rate"]),
    "seed": lambda run: str(run.run_file["seed"]),
    "time of training": _time,
    "layout": lambda run: str(run.manifest["layout"]),
    "versions": _versions,
}

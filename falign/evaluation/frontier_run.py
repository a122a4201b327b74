"""Reward against divergence, of evaluations of samples that lie on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from falign import divergences
from falign.durable import write_whole
from falign.errors import ConfigError
from falign.evaluation.frontier import IDEALS, check_picture, frontier_point, frontier_summary, plot_frontier
from falign.evaluation.sample_metrics import divergence_metrics, sample_metrics
from falign.evaluation.summaries import Frontier, SampleSummary, check_file, damaged, read_summary
from falign.json_lines import split_lines
from falign.runs.loading import is_run
from falign.runs.named_code import import_from, require_trust

__all__ = ["Evaluated", "evaluate_frontier"]

SAME = ("prompts", "rewards", "max_new_tokens", "temperature", "tokenizer")
"""Settings, besides the reference, that must agree for two evaluations to share a picture."""


class Evaluated(NamedTuple):
    """One evaluation, as its folder has it."""

    folder: Path
    summary: SampleSummary

    def rows(self, name: str) -> list[list[Any]] | None:
        """Return the rows of a file by prompt; None where there is no file."""
        file = check_file(self.folder, name, self.summary)
        if file is None:
            return None
        try:
            rows = [json.loads(line) for line in split_lines(file.read_text(encoding="utf-8"))]
        except ValueError as error:
            raise damaged(file, str(error)) from error
        size, left = divmod(len(rows), self.summary.num_prompts)
        if left or not rows:
            raise damaged(file, f"{len(rows)} rows of {self.summary.num_prompts} prompts")
        return [rows[start : start + size] for start in range(0, len(rows), size)]


def evaluate_frontier(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    name: str | None = None,
    divergence: str = "reverse_kl",
    trust_code: bool = False,
) -> Frontier:
    """Draw reward against divergence, beside the best of n and what each divergence ideally allows.

    Args:
        runs: Run folders, or folders of evaluations of samples.
        out: A picture (``.png``, ``.svg``, ``.pdf``), or ``.json``.
        name: Which evaluation of the runs; all that sampled, if left out.
        divergence: On the horizontal axis.
        trust_code: Whether divergences of a user's own that the evaluations name may be imported.

    Raises:
        ConfigError: There is no such evaluation, one is damaged, or two are of different things.
    """
    target = Path(out)
    if target.suffix != ".json":
        check_picture(target)
    elif not target.parent.is_dir():
        raise ConfigError(f"out={target}: the folder {target.parent} does not exist; create it.")
    found = [each for run in runs for each in _evaluations(str(run), name)]
    own = {str(each.summary.divergence): each.folder for each in found if each.summary.divergence}
    for named, folder in own.items():
        code = {"summary.divergence": named} if ":" in named else {}
        require_trust(code, place=folder / "summary.json", trust_code=trust_code)
    if any(":" in named for named in (divergence, *own)):
        import_from(Path.cwd())
    axis = divergences.get(divergence, field="divergence")
    ideals = {each.name: each for each in map(divergences.get, (*IDEALS, *own)) if each.name != "total_variation"}
    _require_alike(found)
    points, anchors = [], None
    for each in found:
        groups, of_reference = each.rows("samples.jsonl"), each.rows("reference_samples.jsonl")
        assert groups is not None
        anchors = anchors or of_reference
        names = {axis.name: axis, "reverse_kl": divergences.get("reverse_kl")}
        metrics = sample_metrics(groups) | divergence_metrics(groups, names, reference_groups=of_reference)
        point = frontier_point(each.summary.label, metrics, axis.name)
        points.append({**point, "run": each.summary.model, "folder": str(each.folder)})
    data = frontier_summary(points, anchors, axis=(axis.name, axis), ideals=ideals)
    if target.suffix == ".json":
        write_whole(target, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    else:
        plot_frontier(data, target)
    return Frontier.model_validate(data)


def _evaluations(run: str, name: str | None) -> list[Evaluated]:
    """The evaluations of a run that sampled, in the order of their checkpoints, or the one of a folder."""
    folders = sorted(Path(run).glob(f"evaluation/{name or '*'}")) if is_run(run) else [Path(run)]
    found = []
    for folder in folders:
        if (folder / "summary.json").is_file() and (folder / "samples.jsonl").is_file():
            summary = read_summary(folder / "summary.json")
            if not isinstance(summary, SampleSummary):
                continue
            if summary.reference is None or summary.record["temperature"] != 1:
                raise ConfigError(
                    f"{folder} has no divergences: sample with reference=MODEL and temperature=1, or name another "
                    "evaluation."
                )
            found.append(Evaluated(folder, summary))
    if not found:
        command = f"falign evaluate samples {run}"
        raise ConfigError(f"{run} has no finished evaluation{f' {name}' if name else ''} of samples: run `{command}`.")
    return sorted(found, key=lambda each: (each.summary.checkpoint is None, each.summary.checkpoint or 0))


def _require_alike(found: Sequence[Evaluated]) -> None:
    first = found[0]
    for other in found[1:]:
        records = [_compared(each.summary.record) for each in (first, other)]
        if different := [key for key in records[0] if records[0][key] != records[1].get(key)]:
            raise ConfigError(
                f"{first.folder} and {other.folder} differ in {', '.join(different)}, so their rewards or divergences "
                "are of different things: evaluate both with the same prompts, rewards, limit, "
                "max_new_tokens and reference."
            )


def _compared(record: Mapping[str, Any]) -> dict[str, Any]:
    reference = record.get("reference.weights", {k: v for k, v in record.items() if k.startswith("reference.")})
    return {**{key: record[key] for key in SAME}, "reference": reference}

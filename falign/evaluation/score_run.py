"""Scores of a file of completions, from the arguments to the finished file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from falign.choices import require_choice
from falign.data import BadRows, DataSource, read_examples
from falign.durable import checksum, write_whole
from falign.errors import ConfigError, DataError
from falign.evaluation.loading import Scored, load_compared, load_run
from falign.evaluation.score_file import ScoreTotals, TreeStream, score_trees
from falign.evaluation.score_output import ScoreOutput, check_output
from falign.models import base_of, stop_token_ids
from falign.models.tokenizers import tokenizer_fingerprint
from falign.runfile.objects import parse_source
from falign.runs.loading import Named, chat_of_run, is_run, named, reference_name
from falign.terminal import Terminal, progress

__all__ = ["score"]

PROBED_TREES = 16


def score(
    model: Named,
    data: Any,
    out: str | Path,
    *,
    reference: str | Path | None = None,
    divergence: str | None = None,
    beta: float | None = None,
    max_length: int | None = None,
    tokens_per_batch: int = 4096,
    bad_rows: str = "error",
    layout: str = "auto",
    dtype: str | None = None,
    overwrite: bool = False,
    trust_code: bool = False,
    console: Console | None = None,
) -> ScoreTotals:
    """Write log-probs per token, log-ratios and implicit rewards of completions; a stopped call continues if repeated.

    Args:
        model: A run, scored by its own objective; or any model.
        data: Pairs, lists or single completions: rows, the path of a file, or a source with its fields, such as
            ``dict(rows=..., chat=True)``. Without ``chat`` plain texts are read as the run read its own.
        out: File for the scores: ``.jsonl`` or ``.parquet``.
        reference: A model to compare a model with; a run has its own reference.
        divergence: f of a model's implicit reward, by default ``reverse_kl``; a run has its own.
        beta: β of a model's implicit reward, by default 0.1; a run has its own.
        max_length: Maximum length of a prompt with its completion, in tokens; by default the run's own, or 1024.
        tokens_per_batch: Number of tokens scored at once; affects memory and speed.
        bad_rows: ``error`` stops at the first unusable row, ``skip`` counts and skips them.
        layout: ``tree``, ``padded``, or ``auto`` for trees if the models can read them.
        dtype: Data type of both models, by default that of their files; a run has its own.
        overwrite: Replace existing scores, whether complete or not.
        trust_code: Whether code that the run folder names may run.
        console: Shows progress; standard error by default.

    Raises:
        ConfigError: The arguments contradict each other, the model or an existing file.
        DataError: A row is unusable, or all are.
        ModelError: A model is missing, or a value is NaN or infinite.
    """
    source, out = parse_source(data, place="data"), Path(out)
    path, given, trust_code = named(model, trust_code=trust_code)
    require_choice("layout", layout, ["auto", "tree", "padded"])
    require_choice("bad_rows", bad_rows, ["error", "skip"])
    check_output(out, overwrite=overwrite)
    if out.resolve() == Path(source.path).resolve():
        raise ConfigError(f"{out} is the file to be scored: give the scores another name.")
    reference = reference_name(reference)
    own = {"reference": reference, "divergence": divergence, "beta": beta, "dtype": dtype}
    _check_comparison(path, {name: value for name, value in own.items() if value is not None})
    if source.chat is None:
        source = source.with_chat(chat_of_run(path))
    policy: Any = bad_rows
    _require_rows(source, BadRows(policy, skip_by="bad_rows=skip"))
    console = console or Terminal(stderr=True, highlight=False, soft_wrap=True)
    with console.status(f"loading {escape(path)}"):
        if reference is None:
            scored = load_run(path, max_length=max_length, given=given, trust_code=trust_code)
        else:
            scored = load_compared(
                path,
                reference=reference,
                divergence=divergence,
                beta=beta,
                dtype="auto" if dtype is None else dtype,
                max_length=max_length,
            )
    stops = stop_token_ids(base_of(scored.policy), scored.tokenizer)
    trees = TreeStream(
        source,
        scored.tokenizer,
        stop_token_ids=stops,
        window=scored.window,
        bad_rows=policy,
        skip_by="bad_rows=skip",
    )
    rows = iter(trees)
    first = list(islice(rows, PROBED_TREES))
    if not first:
        raise DataError(f"{source.path}: no row can be scored: {trees.message()}.")
    scorer, choice = scored.scorer(first, layout=layout)
    console.print(f"layout: {choice.layout}, {choice.reason}", style=None if choice.as_requested else "yellow")
    record = {
        **scored.record,
        "tokenizer": tokenizer_fingerprint(scored.tokenizer),
        "stop_token_ids": sorted(stops),
        "layout": choice.layout,
        **_record_of_data(source, scored),
    }
    with ScoreOutput(out, record=record, overwrite=overwrite) as output, progress(console, "completions") as show:
        totals = score_trees(
            chain(first, rows),
            scorer,
            output,
            tokens_per_batch=tokens_per_batch,
            on_batch=lambda totals: show(totals.completions),
        )
    # In the format that `sha256sum --check` reads.
    write_whole(out.with_name(f"{out.name}.sha256"), f"{checksum(out)}  {out.name}\n")
    if message := trees.message():
        console.print(f"left out or cut: {message}", style="yellow", markup=False)
    return totals


def _check_comparison(model: str, own: Mapping[str, Any]) -> None:
    """Reject a run with a definition of the implicit reward, and a model without a reference.

    Args:
        model: A run folder or a model.
        own: The arguments that define a model's implicit reward, as far as they are given.
    """
    if is_run(model) and own:
        given = ", ".join(f"`{name}`" for name in own)
        raise ConfigError(
            f"{model} is a run, which is scored as it was trained, and {given} would change its rewards: leave it out, "
            "or export the run as a merged model and score that with reference=MODEL."
        )
    if not is_run(model) and "reference" not in own:
        raise ConfigError(
            f"{model} is not a run folder, so it has no reference: give reference=MODEL, such as the model that it was "
            "trained from."
        )


def _require_rows(source: DataSource, bad_rows: BadRows) -> None:
    """Refuse a source without a usable row, before a model is loaded."""
    if next(read_examples(source, bad_rows=bad_rows), None) is None:
        raise DataError(f"{source.path} has no usable row: give a file with at least one.")


def _record_of_data(source: DataSource, scored: Scored) -> dict[str, Any]:
    """Return the settings that determine the order and the tokens of the rows."""
    local = Path(source.path)
    return {
        "source": str(local.absolute()) if local.exists() else source.path,
        "split": source.split,
        "format": source.format,
        "columns": dict(source.columns),
        "chat": source.chat,
        "ignore": sorted(source.ignore),
        **asdict(scored.window),
    }

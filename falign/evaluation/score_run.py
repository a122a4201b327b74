"""Scores of a file of completions, from arguments to the finished file."""

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
from falign.runs.loading import Named, chat_of_run, is_run, named
from falign.terminal import Terminal, progress

__all__ = ["score"]

PROBED_TREES = 16


def score(
    model: Named,
    data: Any,
    out: str | Path,
    *,
    reference: str | None = None,
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
    """Write log-probs per token, log-ratios and implicit rewards of completions; a stopped call goes on if repeated.

    Args:
        model: A run, scored by its own objective; or any model.
        data: Pairs, lists or single completions: rows, the path of a file, or a source with its fields, such as
            ``dict(rows=..., chat=True)``. Without ``chat`` its plain texts are read as the run read its own.
        out: The scores: ``.jsonl`` or ``.parquet``.
        reference: What a model is compared with; a run has its own.
        divergence: f of a model's implicit reward, ``reverse_kl`` if left out; a run has its own.
        beta: β of a model's implicit reward, 0.1 if left out; a run has its own.
        max_length: The window, prompt and completion together; a run's own, else 1024.
        tokens_per_batch: Tokens scored at once: memory against speed.
        bad_rows: ``error`` stops at a row that cannot be used, ``skip`` counts it.
        layout: ``tree``, ``padded``, or ``auto``: trees where the models read them.
        dtype: Of both models, the checkpoint's if left out; a run has its own.
        overwrite: Replace existing scores, complete or not.
        trust_code: Whether code that the run folder names may run.
        console: Where progress is shown; standard error by default.

    Raises:
        ConfigError: Arguments that contradict each other, the model or what is there.
        DataError: A row cannot be used, or none can.
        ModelError: A model is not there, or a value is not finite.
    """
    source, out = parse_source(data, place="data"), Path(out)
    path, given, trust_code = named(model, trust_code=trust_code)
    require_choice("layout", layout, ["auto", "tree", "padded"])
    require_choice("bad_rows", bad_rows, ["error", "skip"])
    check_output(out, overwrite=overwrite)
    if out.resolve() == Path(source.path).resolve():
        raise ConfigError(f"{out} is the file that is scored: give the scores another name.")
    own = {"reference": reference, "divergence": divergence, "beta": beta, "dtype": dtype}
    trained = is_run(path)
    _check(path, trained=trained, own={name: value for name, value in own.items() if value is not None})
    if source.chat is None:
        source = source.with_chat(chat_of_run(path))
    policy: Any = bad_rows
    if next(read_examples(source, bad_rows=BadRows(policy, skip_by="bad_rows=skip")), None) is None:
        raise DataError(f"{source.path} has no row that can be used: give a file with at least one.")
    console = console or Terminal(stderr=True, highlight=False, soft_wrap=True)
    with console.status(f"loading {escape(path)}"):
        if trained:
            scored = load_run(path, max_length=max_length, given=given, trust_code=trust_code)
        else:
            assert reference is not None
            scored = load_compared(
                path,
                reference=reference,
                divergence="reverse_kl" if divergence is None else divergence,
                beta=0.1 if beta is None else beta,
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
        raise DataError(f"{source.path}: none of its rows can be scored: {_told(trees) or 'there are none'}.")
    scorer, choice = scored.scorer(first, layout=layout)
    console.print(f"layout: {choice.layout}, {choice.reason}", style=None if choice.as_asked else "yellow")
    record = {
        **scored.record,
        "tokenizer": tokenizer_fingerprint(scored.tokenizer),
        "stop_token_ids": sorted(stops),
        "layout": choice.layout,
        **_of_data(source, scored),
    }
    with ScoreOutput(out, record=record, overwrite=overwrite) as output, progress(console, "completions") as show:
        totals = score_trees(
            chain(first, rows),
            scorer,
            output,
            tokens_per_batch=tokens_per_batch,
            on_batch=lambda totals: show(totals.completions),
        )
    # In the form that `sha256sum --check` reads.
    write_whole(out.with_name(f"{out.name}.sha256"), f"{checksum(out)}  {out.name}\n")
    if told := _told(trees):
        console.print(f"not as in the file: {told}", style="yellow", markup=False)
    return totals


def _check(model: str, *, trained: bool, own: Mapping[str, Any]) -> None:
    if trained and own:
        named = ", ".join(f"`{name}`" for name in own)
        raise ConfigError(
            f"{model} is a run, which is scored as it was trained; {named} would make it another one. Leave it out, or "
            "export the run (falign export --format merged) and score that with reference=MODEL."
        )
    if not trained and "reference" not in own:
        raise ConfigError(
            f"{model} is not a run folder, so there is nothing to compare it with: give reference=MODEL, for example "
            "the model that it was trained from."
        )


def _of_data(source: DataSource, scored: Scored) -> dict[str, Any]:
    """Return the settings that decide the order and the tokens of the rows."""
    local = Path(source.path)
    return {
        "source": str(local.absolute()) if local.exists() else source.path,
        "split": source.split,
        "format": source.format,
        "columns": dict(source.columns),
        "chat": source.chat,
        **asdict(scored.window),
    }


def _told(trees: TreeStream) -> str:
    message = f" (the first: {trees.bad_rows.messages[0]})" if trees.bad_rows.messages else ""
    return "; ".join(f"{label} {count}" for label, count in trees.counts()) + message

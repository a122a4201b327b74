"""``falign score``."""

from __future__ import annotations

from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from falign.cli.options import TrustCode
from falign.durable import checksum, write_whole
from falign.errors import ConfigError, DataError
from falign.runs.loading import chat_of_run, is_run
from falign.terminal import Terminal, progress

if TYPE_CHECKING:
    from falign.data import DataSource
    from falign.evaluation import ScoreTotals, TreeStream
    from falign.evaluation.loading import Scored

__all__ = ["score"]

PROBED_TREES = 16


def score(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run folder, scored by its own objective; or any model.")
    ],
    file: Annotated[str, typer.Argument(metavar="FILE", help="Pairs, lists or single completions, as train reads.")],
    out: Annotated[Path, typer.Option("--out", help="The scores: .jsonl or .parquet.")],
    reference: Annotated[
        str | None, typer.Option(help="What a model is compared with; refused for a run, which has its own.")
    ] = None,
    divergence: Annotated[
        str | None, typer.Option(help="f of a model's implicit reward, reverse_kl if left out; refused for a run.")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="β of a model's implicit reward, 0.1 if left out; refused for a run.")
    ] = None,
    format: Annotated[str, typer.Option(help="Layout of the file; auto tells it from the columns.")] = "auto",
    columns: Annotated[str, typer.Option(help="What the file calls falign's columns: '{prompt: question}'.")] = "{}",
    split: Annotated[str, typer.Option()] = "train",
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--plain", help="Whether the file's plain texts are turns; a run's own if left out."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="The window, prompt and completion together; a run's own, else 1024.")
    ] = None,
    tokens_per_batch: Annotated[int, typer.Option(min=2, help="Tokens scored at once: memory against speed.")] = 4096,
    bad_rows: Annotated[str, typer.Option(help="error stops at a row that cannot be used, skip counts it.")] = "error",
    layout: Annotated[str, typer.Option(help="tree, padded, or auto: trees where the models read them.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Of both models, the checkpoint's if left out; refused for a run.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Score anew what is there, whole or begun.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Write log-probs per token, log-ratios and implicit rewards of completions; a stopped call goes on if repeated."""
    from falign.choices import require_choice
    from falign.cli.data import column_mapping
    from falign.data import DataSource
    from falign.evaluation import ScoreOutput, TreeStream, check_output
    from falign.evaluation import score_trees as run
    from falign.evaluation.loading import load_compared, load_run
    from falign.models import base_of, stop_token_ids
    from falign.models.tokenizers import tokenizer_fingerprint

    require_choice("--layout", layout, ["auto", "tree", "padded"])
    require_choice("--bad-rows", bad_rows, ["error", "skip"])
    check_output(out, overwrite=overwrite)
    if out.resolve() == Path(file).resolve():
        raise ConfigError(f"{out} is the file that is scored: give the scores another name.")
    own = {"--reference": reference, "--divergence": divergence, "--beta": beta, "--dtype": dtype}
    trained = is_run(model)
    _check_options(model, trained=trained, given={name: value for name, value in own.items() if value is not None})
    source = DataSource(
        file,
        split=split,
        format=format,
        columns=column_mapping(columns),
        chat=chat_of_run(model) if chat is None else chat,
    )
    _require_rows(source, bad_rows)
    console = Terminal(stderr=True, highlight=False, soft_wrap=True)
    with console.status(f"loading {escape(model)}"):
        if trained:
            scored = load_run(model, max_length=max_length, trust_code=trust_code)
        else:
            assert reference is not None
            scored = load_compared(
                model,
                reference=reference,
                divergence="reverse_kl" if divergence is None else divergence,
                beta=0.1 if beta is None else beta,
                dtype="auto" if dtype is None else dtype,
                max_length=max_length,
            )
    stops = stop_token_ids(base_of(scored.policy), scored.tokenizer)
    stream: Any = {"stop_token_ids": stops, "window": scored.window, "bad_rows": bad_rows, "skip_by": "--bad-rows skip"}
    trees = TreeStream(source, scored.tokenizer, **stream)
    rows = iter(trees)
    first = list(islice(rows, PROBED_TREES))
    if not first:
        raise DataError(f"{file}: none of its rows can be scored: {_told(trees) or 'there are none'}.")
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
        totals = run(
            chain(first, rows),
            scorer,
            output,
            tokens_per_batch=tokens_per_batch,
            on_batch=lambda totals: show(totals.completions, more=f", {totals.tokens:,} tokens"),
        )
    # In the form that `sha256sum --check` reads.
    write_whole(out.with_name(f"{out.name}.sha256"), f"{checksum(out)}  {out.name}\n")
    if told := _told(trees):
        console.print(f"not as in the file: {told}", style="yellow", markup=False)
    _show(totals, out)


def _check_options(model: str, *, trained: bool, given: dict[str, Any]) -> None:
    if trained and given:
        raise ConfigError(
            f"{model} is a run, which is scored as it was trained; {', '.join(given)} would make it another one. Leave "
            "it out, or export the run (falign export --format merged) and score that with --reference."
        )
    if not trained and "--reference" not in given:
        raise ConfigError(
            f"{model} is not a run folder, so there is nothing to compare it with: give --reference MODEL, for example "
            "the model that it was trained from."
        )


def _require_rows(source: DataSource, bad_rows: Any) -> None:
    """Read the first row, so that what is wrong with the file is known before any weight is loaded."""
    from falign.data import BadRows, read_examples

    if next(read_examples(source, bad_rows=BadRows(bad_rows, skip_by="--bad-rows skip")), None) is None:
        raise DataError(f"{source.path} has no row that can be used: give a file with at least one.")


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


def _show(totals: ScoreTotals, out: Path) -> None:
    table = Table("", "", title=escape(str(out)), title_justify="left", show_header=False)
    table.add_row("completions", f"{totals.completions:,}")
    if totals.resumed:
        table.add_row("of them scored by an earlier call", f"{totals.resumed:,}")
    table.add_row("tokens", f"{totals.tokens:,}")
    table.add_row("mean log-ratio", f"{totals.mean_log_ratio:+.4f}")
    table.add_row("mean implicit reward", f"{totals.mean_implicit_reward:+.4f}")
    if totals.reward_accuracy is not None:
        table.add_row("reward accuracy", f"{totals.reward_accuracy:.1%} of {totals.pairs:,} pairs")
    Terminal(highlight=False).print(table)

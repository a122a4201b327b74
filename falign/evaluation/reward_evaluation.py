"""One evaluation on a reward benchmark, from its options to its files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from falign.errors import ConfigError, DataError
from falign.evaluation.summaries import RewardSummary, write_summary
from falign.runs.loading import Given, Named, chat_of_run, is_run, named, result_folder
from falign.terminal import progress

if TYPE_CHECKING:
    from falign.data import Window
    from falign.evaluation import ItemScorer, ItemStream, ItemTree
    from falign.evaluation.benchmarks import Benchmark
    from falign.evaluation.loading import Scored
    from falign.rewards import Reward

__all__ = ["Compared", "Judge", "RewardEvaluation", "evaluate_rewards"]

PROBED_ITEMS = 16
MOST_TOKENS = 4096  # of a window that nobody asked for


class Compared(NamedTuple):
    """The model to compare with, by the options' names; a run has its own."""

    reference: str | None = None
    divergence: str | None = None
    beta: float | None = None
    dtype: str | None = None
    reference_free: bool = False

    def check(self, model: str) -> None:
        """Refuse what makes no sense for the run or model.

        Raises:
            ConfigError: With the options.
        """
        given = [f"`{name}`" for name, value in self._asdict().items() if value not in (None, False)]
        if is_run(model):
            if given:
                raise ConfigError(
                    f"{model} is a run, which is scored as it was trained; {', '.join(given)} would make it another "
                    "one. Leave it out, choose some `scorers`, or export the run (falign export --format merged)."
                )
        elif self.reference_free and (others := [each for each in given if each not in _OF_MODEL]):
            raise ConfigError(f"`reference_free` excludes {', '.join(others)}: there is nothing to compare with.")


_OF_MODEL = ("`reference_free`", "`dtype`")


class Judge(NamedTuple):
    """A classifier that scores beside the policy."""

    path: str
    text: str | None = None
    label: str | None = None

    def load(self) -> tuple[Reward, dict[str, Any]]:
        """Return the classifier as a reward, and what tells it from others.

        Raises:
            ConfigError: The label or the kind of text is unknown.
            ModelError: The classifier cannot be loaded.
        """
        from falign.choices import require_choice
        from falign.models import model_identity
        from falign.rewards.classifier import ClassifierReward, load_classifier

        model, tokenizer = load_classifier(self.path)
        text: Any = self.text or ("chat" if tokenizer.chat_template else "joined")
        require_choice("classifier_text", text, ["chat", "joined", "pair", "completion"])
        record = {**model_identity(model), "text": text, "label": self.label}
        return ClassifierReward(model, tokenizer, text=text, label=self.label), record


@dataclass(frozen=True, kw_only=True)
class RewardEvaluation:
    """Options of one evaluation; see the command for their meaning.

    Attributes:
        scorers: Names of ``SCORERS``; None takes all that there are.
        judge: The classifier, if any.
        num_resamples: Of the intervals; no score depends on it.
        out: The folder of ``items.jsonl`` and ``summary.json``.
    """

    model: str
    compared: Compared
    benchmark: Benchmark
    file: str | None
    split: str | None
    subsets: tuple[str, ...]
    limit: int | None
    scorers: tuple[str, ...] | None
    judge: Judge | None
    max_length: int | None
    long_items: Any
    bad_rows: Any
    layout: str
    seed: int
    num_resamples: int
    out: Path
    overwrite: bool
    given: Given | None = None
    trust_code: bool = False

    def run(self, console: Console, *, tokens_per_batch: int) -> RewardSummary:
        """Score, write the results, and return the summary.

        Args:
            console: Shows progress.
            tokens_per_batch: Tokens scored at once.

        Raises:
            FalignError: Something cannot work; what was scored stays for the next call.
        """
        from falign.data import BadRows
        from falign.evaluation import ItemStream, ScoreOutput, read_items, score_items
        from falign.models import base_of, stop_token_ids
        from falign.models.tokenizers import tokenizer_fingerprint

        names = self._check()
        unread = BadRows(self.bad_rows, skip_by="bad_rows=skip")
        with console.status("reading"):
            items = read_items(self.benchmark, self.file, split=self.split, subsets=self.subsets, bad_rows=unread)
        with console.status(f"loading {escape(self.model)}"):
            scored = self._load()
            judge, judged = (None, {}) if self.judge is None else self.judge.load()
        stops = stop_token_ids(base_of(scored.policy), scored.tokenizer)
        stream = ItemStream(
            items,
            scored.tokenizer,
            stop_token_ids=stops,
            window=scored.window,
            long_items=self.long_items,
            bad_rows=unread,
            limit=self.limit,
        )
        trees = iter(stream)
        first = list(islice(trees, PROBED_ITEMS))
        if not first:
            raise DataError(f"{self.source}: none of its items can be scored: {_told(stream)}.")
        scorer, layout = self._scorer(scored, names, judge, first, console)
        record = {
            **scored.record,
            "tokenizer": tokenizer_fingerprint(scored.tokenizer),
            "stop_token_ids": sorted(stops),
            "layout": layout,
            **{f"classifier.{name}": value for name, value in judged.items()},
            **self._of_items(scored.window, names),
        }
        self.out.mkdir(parents=True, exist_ok=True)
        output = ScoreOutput(self.out / "items.jsonl", record=record, overwrite=self.overwrite)
        count = len(items) if self.limit is None else min(self.limit, len(items))
        with output, _progress(console, count) as show:
            rows = score_items(
                chain(first, trees),
                scorer,
                self.benchmark,
                output,
                tokens_per_batch=tokens_per_batch,
                on_batch=show,
            )
            with console.status("intervals"):
                summary = self._summary(scored, stream, rows, names, record)
            summary = summary.model_copy(update={"files": {"items.jsonl": output.checksum()}})
            # Before the items get their name, so that a call that is stopped here is repeated and not refused.
            write_summary(self.out, summary)
            output.finish()
        if told := _told(stream):
            console.print(f"not scored: {told}", style="yellow", markup=False)
        return summary

    @property
    def source(self) -> str:
        """The items' place: a path, or the name of a data set on the Hub."""
        return self.file or self.benchmark.hub_name or self.benchmark.name

    def _check(self) -> tuple[str, ...]:
        """Refuse what cannot work before anything is read, and return the scorers."""
        from falign.choices import require_choice

        require_choice("layout", self.layout, ["auto", "tree", "padded"])
        require_choice("bad_rows", self.bad_rows, ["error", "skip"])
        require_choice("long_items", self.long_items, ["skip", "cut", "error"])
        self.compared.check(self.model)
        if not is_run(self.model) and self.compared.reference is None and not self.compared.reference_free:
            raise ConfigError(
                f"{self.model} is not a run folder, so there is nothing to compare it with: give reference=MODEL, "
                "for example the model that it was trained from, or reference_free=True."
            )
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"{self.out} is a file: give a folder.")
        if (self.out / "items.jsonl").exists() and not self.overwrite:
            raise ConfigError(
                f"{self.out} holds results: give another name or folder, or overwrite=True to score again."
            )
        return self._names()

    def _names(self) -> tuple[str, ...]:
        from falign.choices import require_choice
        from falign.evaluation.item_scorer import BASELINES, OF_POLICY, OF_REWARD, SCORERS

        available = {*OF_POLICY, *BASELINES}
        if not self.compared.reference_free:
            available |= {"log_ratio", *(OF_REWARD if self._rewarding() else ())}
        if self.judge is not None:
            available.add("classifier")
        if self.scorers == ():
            raise ConfigError(f"`scorers` names none: give some of {', '.join(_ordered(available))}, or leave it out.")
        for name in self.scorers or ():
            require_choice("scorers", name, SCORERS)
            if name not in available:
                reason = {"classifier": "give classifier=MODEL", "log_ratio": "give reference=MODEL"}.get(
                    name, "it needs a reference, and an objective with an implicit reward"
                )
                raise ConfigError(f"scorers={name}: {reason}; here there are {', '.join(_ordered(available))}.")
        return _ordered(available if self.scorers is None else {*self.scorers})

    def _rewarding(self) -> bool:
        """True where an implicit reward is defined: by a model's reference, and by most objectives of runs."""
        from falign.evaluation.loading import run_objective

        return (
            not is_run(self.model) or run_objective(self.model, given=self.given, trust_code=self.trust_code).rewarding
        )

    def _load(self) -> Scored:
        from falign.evaluation.benchmarks import OwnTexts
        from falign.evaluation.loading import load_alone, load_compared, load_run, positions_of

        dtype = self.compared.dtype or "auto"
        if is_run(self.model):
            scored = load_run(
                self.model,
                max_length=self.max_length,
                any_objective=True,
                given=self.given,
                trust_code=self.trust_code,
            )
            if isinstance(self.benchmark, OwnTexts) and self.max_length is None:
                return scored
        elif self.compared.reference is None:
            scored = load_alone(self.model, dtype=dtype, max_length=self.max_length)
        else:
            scored = load_compared(
                self.model,
                reference=self.compared.reference,
                divergence="reverse_kl" if self.compared.divergence is None else self.compared.divergence,
                beta=0.1 if self.compared.beta is None else self.compared.beta,
                dtype=dtype,
                max_length=self.max_length,
            )
        window = scored.window
        if not is_run(self.model):
            window = replace(window, long_prompt="cut", long_completion="cut")
        if self.max_length is None:
            room = min([MOST_TOKENS, *filter(None, map(positions_of, scored.models()))])
            window = replace(window, max_length=room)
        return scored._replace(window=window)

    def _scorer(
        self,
        scored: Scored,
        names: tuple[str, ...],
        judge: Reward | None,
        first: Sequence[ItemTree],
        console: Console,
    ) -> tuple[ItemScorer, str]:
        from falign.evaluation import ComparedScores, ItemScorer, ReferenceFreeScores
        from falign.evaluation.item_scorer import BASELINES

        trees = [tree for _, tree in first]
        if scored.reference is None:
            plain, choice = scored.choose_scorer(trees, layout=self.layout)
            of_trees = ReferenceFreeScores(policy=scored.policy, scorer=plain)
        else:
            compared, choice = scored.scorer(trees, layout=self.layout)
            of_trees = ComparedScores(compared, rewarding=scored.rewarding)
        console.print(f"layout: {choice.layout}, {choice.reason}", style=None if choice.as_asked else "yellow")
        if {*names} <= {"classifier", *BASELINES}:
            of_trees = None  # nobody asks the policy
        scorer = ItemScorer(names=names, of_trees=of_trees, classifier=judge, seed=self.seed)
        return scorer, choice.layout

    def _of_items(self, window: Window, names: tuple[str, ...]) -> dict[str, Any]:
        """Return the inputs of items, tokens and scorers, besides the models."""
        from falign.evaluation.benchmarks import OwnTexts

        local = None if self.file is None else Path(self.file)
        exists = local is not None and local.exists()
        return {
            "benchmark": self.benchmark.name,
            "source": str(local.absolute()) if local is not None and exists else self.source,
            "content": _content(local) if local is not None and exists else None,
            "split": self.split,
            "subsets": list(self.subsets),
            "limit": self.limit,
            "chat": self.benchmark.chat if isinstance(self.benchmark, OwnTexts) else None,
            **asdict(window),
            "long_items": self.long_items,
            "scorers": list(names),
            "seed": self.seed,
        }

    def _summary(
        self,
        scored: Scored,
        stream: ItemStream,
        rows: Sequence[Any],
        names: tuple[str, ...],
        record: dict[str, Any],
    ) -> RewardSummary:
        from falign.evaluation import summarize_scorer
        from falign.evaluation.benchmarks import missing_subsets

        reference = self.compared.reference if scored.reference is None else scored.reference.identity()["kind"]
        objective: Any = scored.objective if scored.rewarding else None
        divergence = getattr(objective, "divergence", None)
        subsets = [row["subset"] for row in rows]
        found = {
            "kind": "rewards",
            "name": self.out.name,
            "benchmark": self.benchmark.name,
            "source": self.source,
            "model": self.model,
            "reference": self.compared.reference or reference,
            "divergence": None if divergence is None else divergence.name,
            "beta": getattr(objective, "beta", None),
            "num_items": len(rows),
            "skipped": stream.skipped(),
            "subsets": dict(Counter(subsets)),
            "missing_subsets": list(missing_subsets(self.benchmark, subsets)),
            "scorers": {
                name: summarize_scorer(rows, self.benchmark, name, num_resamples=self.num_resamples, seed=self.seed)
                for name in names
            },
            "record": record,
        }
        return RewardSummary.model_validate(found)


def evaluate_rewards(
    model: Named,
    benchmark: str,
    file: str | None = None,
    *,
    name: str | None = None,
    subset: Sequence[str] = (),
    split: str | None = None,
    reference: str | None = None,
    divergence: str | None = None,
    beta: float | None = None,
    reference_free: bool = False,
    max_length: int | None = None,
    long_items: str = "skip",
    tokens_per_batch: int = 4096,
    bad_rows: str = "skip",
    layout: str = "auto",
    dtype: str | None = None,
    scorers: Sequence[str] | None = None,
    classifier: str | None = None,
    classifier_text: str | None = None,
    classifier_label: str | None = None,
    chat: bool | None = None,
    seed: int = 0,
    num_resamples: int = 1000,
    out: str | Path | None = None,
    overwrite: bool = False,
    limit: int | None = None,
    trust_code: bool = False,
    console: Console | None = None,
) -> RewardSummary:
    """Score a benchmark under all rewards that a model defines; a stopped call goes on if repeated.

    Args:
        model: A run, scored by its own objective; or any model.
        benchmark: A name of :func:`falign.evaluation.benchmarks.names`; ``preferences`` for any file of pairs or lists.
            Or ``module:Class`` of your own.
        file: Its file or folder; from the Hub if left out.
        name: Results go to ``RUN/evaluation/NAME``; the benchmark's name if left out.
        subset: Only these parts of the benchmark; all if empty.
        split: Of the Hub's data set or a folder.
        reference: What a model is compared with; a run has its own.
        divergence: f of a model's implicit reward, ``reverse_kl`` if left out; a run has its own.
        beta: β of a model's implicit reward, 0.1 if left out; a run has its own.
        reference_free: Score a model without reference, by its log-probabilities.
        max_length: The window. If left out, the run's own for ``preferences``, else what the model allows, at most
            4,096 tokens.
        long_items: Longer ones: ``skip`` leaves them out and counts them, ``cut`` as in training, ``error``.
        tokens_per_batch: Tokens scored at once: memory against speed.
        bad_rows: ``skip`` leaves out rows that cannot be used and counts them, ``error`` stops at one.
        layout: ``tree``, ``padded``, or ``auto``: trees where the models read them.
        dtype: Of both models, the checkpoint's if left out; a run has its own.
        scorers: Some of them; all if left out.
        classifier: A sequence classifier, which becomes another scorer.
        classifier_text: Its input: ``chat``, ``joined``, ``pair`` or ``completion``.
        classifier_label: Name of its label, where it has several.
        chat: Whether a file's plain texts are turns; as the run's were if left out.
        seed: Of the scorer ``random`` and of the intervals.
        num_resamples: Of the bootstrap that the intervals come from.
        out: A folder for the results, needed for a model.
        overwrite: Replace existing scores, complete or not.
        limit: Only so many items, the first ones.
        trust_code: Whether code that the run folder names may run.
        console: Where progress is shown; standard error by default.

    Raises:
        FalignError: Something cannot work; what was scored stays for the next call.
    """
    from falign.terminal import Terminal

    if classifier is None and (classifier_text or classifier_label):
        raise ConfigError("`classifier_text` and `classifier_label` belong to `classifier`: give the model too.")
    path, given, trust_code = named(model, trust_code=trust_code)
    found = _benchmark(path, benchmark, chat)
    evaluation = RewardEvaluation(
        model=path,
        compared=Compared(reference, divergence, beta, dtype, reference_free),
        benchmark=found,
        file=file,
        split=split,
        subsets=tuple(subset),
        limit=limit,
        scorers=None if scorers is None else tuple(scorers),
        judge=None if classifier is None else Judge(classifier, classifier_text, classifier_label),
        max_length=max_length,
        long_items=long_items,
        bad_rows=bad_rows,
        layout=layout,
        seed=seed,
        num_resamples=num_resamples,
        out=result_folder(path, name or found.name, None if out is None else Path(out)),
        overwrite=overwrite,
        given=given,
        trust_code=trust_code,
    )
    console = console or Terminal(stderr=True, highlight=False, soft_wrap=True)
    return evaluation.run(console, tokens_per_batch=tokens_per_batch)


def _benchmark(model: str, name: str, chat: bool | None) -> Benchmark:
    """Return the benchmark, which reads a file's plain texts as the run read its own."""
    from falign.evaluation import benchmarks
    from falign.registry import is_own_name
    from falign.runs.named_code import import_from

    if is_own_name(name):
        import_from(Path.cwd())
    found = benchmarks.get(name)
    if isinstance(found, benchmarks.OwnTexts):
        return found.with_chat(chat_of_run(model) if chat is None else chat)
    if chat is not None:
        raise ConfigError(f"`chat` applies only to preferences: {name} says itself what its texts are.")
    return found


def _ordered(names: set[str]) -> tuple[str, ...]:
    from falign.evaluation.item_scorer import SCORERS

    return tuple(name for name in SCORERS if name in names)


def _content(path: Path) -> str:
    """Return a hash of a file, or of all files of a folder with their names."""
    digest = hashlib.sha256()
    for file in sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]:
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _told(stream: ItemStream) -> str:
    message = f" (the first: {stream.bad_rows.messages[0]})" if stream.bad_rows.messages else ""
    return "; ".join(f"{reason} {count}" for reason, count in stream.skipped().items()) + message


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[int, int], None]]:
    """Show progress, and say once where an earlier call is continued."""
    with progress(console, "items", total=total) as show:
        resuming = True

        def update(done: int, resumed: int) -> None:
            nonlocal resuming
            show(done)
            if resuming and done > resumed:
                resuming = False
                if resumed:
                    console.print(f"going on after {resumed:,} items of an earlier call")

        yield update

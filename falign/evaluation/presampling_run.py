"""Pre-sampling of DPH-RL, ``falign.presample``: prompts that a model solves are rehearsed, the others explored."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from pydantic import AliasGenerator, BaseModel, ConfigDict, Field
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from falign.choices import require_choice, shown
from falign.data import BadRowPolicy, BadRows, InMemory, PromptReport, PromptRow, PromptSource, load_prompts
from falign.data.sources import require_source, rows_of
from falign.durable import checksum, claimed, refuse_link, write_whole
from falign.errors import ConfigError
from falign.evaluation.answering import load_named
from falign.evaluation.sample_inputs import prompts_digest
from falign.models import base_of, model_identity, stop_token_ids, weights_hash
from falign.models.tokenizers import pad_token_id, tokenizer_fingerprint
from falign.rewards import RewardSum, WeightedReward, load_reward
from falign.rewards.combination import row_check
from falign.rewards.groups import passes
from falign.rewards.identity import reward_identity
from falign.rollouts import SampledCompletion, SamplingParams, TransformersEngine
from falign.rollouts.presampling import presampled_chunks
from falign.rollouts.presampling_journal import Finding, PresamplingJournal
from falign.runfile.objects import reward_section
from falign.runs.loading import Named, chat_of_run, chosen_chat, named
from falign.runs.named_code import import_from
from falign.terminal import Terminal, progress
from falign.training.online.groups import judged

__all__ = ["PresamplingSummary", "presample", "prompt_source", "room_of_prompts", "sampler_identity"]

CHUNK_SIZE = 32
EXPLORATION, REHEARSAL, SUMMARY = "exploration.jsonl", "rehearsal.jsonl", "summary.json"


class PresamplingSummary(BaseModel):
    """Counts of pre-sampled prompts; ``summary.json`` has them under the same names, with spaces."""

    model_config = ConfigDict(
        frozen=True, alias_generator=AliasGenerator(serialization_alias=lambda name: name.replace("_", " "))
    )

    prompts: int
    rehearsal: int
    exploration: int
    further_completion_wrong: int = Field(serialization_alias="solved, and the further completion is wrong")
    never_solved: int
    correct_completions: float
    """Share of all completions."""
    too_long: int
    bad_rows: int
    timeouts: int
    errors: int
    resumed: int = Field(exclude=True)
    """Prompts that an earlier call had sampled."""

    def counts(self) -> dict[str, int | float]:
        """Return the numbers under their names in ``summary.json``."""
        return self.model_dump(by_alias=True)


def presample(
    model: Named,
    prompts: Any,
    out: str | Path,
    *,
    verifier: Any,
    num_completions: int = 8,
    threshold: int | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
    template: str | None = None,
    chat: bool | None = None,
    bad_rows: str = "error",
    dtype: str = "auto",
    overwrite: bool = False,
    trust_code: bool = False,
    console: Console | None = None,
) -> PresamplingSummary:
    """Sort prompts by whether a model solves them; repeat a stopped call to continue it.

    The model answers each prompt `num_completions` times at temperature 1. If `threshold` of these completions are
    correct, it answers once more. If that completion is correct too, the prompt is solved and goes to
    ``rehearsal.jsonl``, together with that completion, its token ids and its log-probabilities in nats. All other
    prompts go to ``exploration.jsonl``. ``summary.json`` records the counts and the identity of the model.

    Args:
        model: A run or a model.
        prompts: Rows in memory, a file, a folder, or a dataset on the Hub.
        out: The folder for the three files.
        verifier: A reward that gives 1 to correct completions: a function ``f(prompts, completions, **columns) ->
            list[float]``, another reward, or a name: ``module:function`` or a built-in reward such as
            ``number(answer='label')``.
        num_completions: Completions per prompt.
        threshold: Number of completions that must be correct; by default all of them.
        max_new_tokens: Maximum tokens of a completion.
        seed: Seed of the sampling.
        template: The prompt, with columns of the row in braces: ``"{question}"``.
        chat: Whether a plain prompt is a user's turn. By default as in the run; for a model, whether it has a chat
            template.
        bad_rows: ``error`` stops at a row that cannot be used; ``skip`` counts it and continues.
        dtype: Data type of a model; a run has its own.
        overwrite: Replace existing outputs once the new ones are complete.
        trust_code: Whether code that the run folder names may run.
        console: Where progress is shown; by default standard error.

    Raises:
        ConfigError: An argument is invalid, outputs exist, or a stopped call had other arguments.
        DataError: A row cannot be used, or no row can.
        ModelError: The model is missing or damaged.
        RewardError: The verifier failed.

    Source:
        The pre-sampling of DPH-RL (arXiv:2509.07430).
    """
    console = console or Terminal(stderr=True, highlight=False, soft_wrap=True)
    threshold = num_completions if threshold is None else threshold
    settings = _Settings(num_completions, threshold, max_new_tokens, seed, template, chat, bad_rows)
    settings.check()
    outputs = _Outputs(Path(out))
    outputs.check(overwrite=overwrite)
    reward, source = _reward(verifier), prompt_source(prompts, template)
    name = named(model)[0]
    with console.status(f"loading {escape(name)}"):
        policy, tokenizer = load_named(model, dtype=dtype, trust_code=trust_code)
    engine = TransformersEngine(policy, pad_token_id=pad_token_id(tokenizer))
    engine.publish(policy, version=0)
    room = room_of_prompts(engine.capabilities().max_length, max_new_tokens, model=name)
    chat_of_prompts = chosen_chat(chat_of_run(name) if chat is None else chat, tokenizer, console)
    data = load_prompts(
        [replace(source, chat=chat_of_prompts)],
        tokenizer,
        max_length=room,
        long_prompt="drop",
        bad_rows=settings.bad_rows,
        check=row_check(reward),
    )
    record = {
        **sampler_identity(policy, tokenizer),
        "prompts": prompts_digest(data.train),
        "verifier": verifier if isinstance(verifier, str) else reward_section(verifier).name,
        "identity of the verifier": reward_identity(reward.rewards[0].reward),
        **settings._asdict(),
    }
    judge = _Judge(reward, data.train, tokenizer)
    outputs.folder.mkdir(parents=True, exist_ok=True)
    with claimed(outputs.lock):
        journal = PresamplingJournal(
            outputs.journal, record=record, chunk_size=CHUNK_SIZE, num_prompts=len(data.train), overwrite=overwrite
        )
        resumed = len(journal.findings)
        chunks = presampled_chunks(
            engine,
            [row.prompt_ids for row in data.train],
            judge,
            num_completions=num_completions,
            threshold=threshold,
            params=SamplingParams(max_new_tokens, stop_token_ids=stop_token_ids(base_of(policy), tokenizer)),
            seed=seed,
            start=resumed,
            chunk_size=CHUNK_SIZE,
        )
        with progress(console, "prompts", total=len(data.train), done=resumed) as show:
            for chunk in chunks:
                journal.append(chunk)
                show(len(journal.findings))
        summary = _summary(journal.findings, data.report, judge, settings, resumed=resumed)
        outputs.write(
            _rows_as_given(source, data.train, settings.bad_rows),
            journal.findings,
            summary,
            sampled_by={"model": name, **record},
        )
    return summary


class _Settings(NamedTuple):
    """Arguments on which the findings depend."""

    num_completions: int
    threshold: int
    max_new_tokens: int
    seed: int
    template: str | None
    chat: bool | None
    bad_rows: Any

    def check(self) -> None:
        """Refuse values that cannot work."""
        require_choice("bad_rows", self.bad_rows, BadRowPolicy)
        if not 1 <= self.threshold <= self.num_completions:
            raise ConfigError(f"threshold={self.threshold} must be from 1 to num_completions={self.num_completions}.")


@dataclass(frozen=True)
class _Outputs:
    """The files of one pre-sampling, in one folder."""

    folder: Path

    @property
    def journal(self) -> Path:
        """The findings so far; removed when the files are written."""
        return self.folder / ".presampling.jsonl"

    @property
    def lock(self) -> Path:
        """Held by the process that writes."""
        return self.folder / ".presampling.lock"

    def check(self, *, overwrite: bool) -> None:
        """Refuse a folder whose files would be lost."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"out={self.folder} is a file: give a folder.")
        found = [self.folder / name for name in (EXPLORATION, REHEARSAL, SUMMARY) if (self.folder / name).exists()]
        # Outputs with a journal beside them belong to a stopped call, which is continued.
        if found and not overwrite and not self.journal.exists():
            raise ConfigError(f"{found[0]} exists: name another folder, or give overwrite=True to sample again.")
        for path in found:
            refuse_link(path)

    def write(
        self,
        rows: Sequence[Mapping[str, Any]],
        findings: Sequence[Finding],
        summary: PresamplingSummary,
        *,
        sampled_by: Mapping[str, Any],
    ) -> None:
        """Write prompts to explore as they were given, and prompts to rehearse with their completions."""
        pairs = list(zip(rows, findings, strict=True))
        explored = [row for row, finding in pairs if finding.rehearsal is None]
        rehearsed = [{**row, **finding.rehearsal} for row, finding in pairs if finding.rehearsal is not None]
        for name, chosen in ((EXPLORATION, explored), (REHEARSAL, rehearsed)):
            lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in chosen)
            write_whole(self.folder / name, lines)
        sums = {REHEARSAL: checksum(self.folder / REHEARSAL)}
        content = {**summary.counts(), "sampled_by": sampled_by, "sha256": sums}
        write_whole(self.folder / SUMMARY, json.dumps(content, indent=1))
        self.journal.unlink()  # last: until then the same call continues


@dataclass
class _Judge:
    """Tells which completions are correct, and counts the verifier's failures."""

    reward: RewardSum
    rows: Sequence[PromptRow]
    tokenizer: Any
    timeouts: int = 0
    errors: int = 0

    def __call__(self, prompts: list[int], completions: list[SampledCompletion]) -> list[bool]:
        _, scores = judged(self.reward, [self.rows[i] for i in prompts], completions, self.tokenizer)
        self.timeouts += scores.timeouts
        self.errors += scores.errors
        return [passes(value) for value in scores.total]


def _reward(verifier: Any) -> RewardSum:
    if isinstance(verifier, str):
        if ":" in verifier:  # a custom function
            import_from(Path.cwd())
        reward = load_reward(verifier)
    elif callable(verifier):
        reward = reward_section(verifier).build()
    else:
        raise ConfigError(
            f"`verifier` is {shown(verifier)}: give a function f(prompts, completions, **columns) -> list[float], "
            "another reward, or the name of one."
        )
    return RewardSum((WeightedReward("verifier", reward),))


def prompt_source(prompts: Any, template: str | None) -> PromptSource:
    """Return the source of prompts: rows in memory, a file, a folder, or a dataset on the Hub."""
    if not isinstance(prompts, str | Path):
        rows = InMemory(prompts)
        return PromptSource(rows.path, template=template, rows=rows)
    require_source(prompts)
    return PromptSource(str(prompts), template=template)


def room_of_prompts(positions: int | None, max_new_tokens: int, *, model: str) -> int:
    """Return the most tokens of a prompt that leave room for its completion."""
    room = sys.maxsize if positions is None else positions - max_new_tokens
    if room < 1:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the {positions} positions of {model}: "
            "lower it."
        )
    return room


def sampler_identity(policy: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return hashes of the model that samples, by name."""
    adapter = {"adapter": weights_hash(policy, adapter="default")} if isinstance(policy, PeftModel) else {}
    return {**model_identity(policy), **adapter, "tokenizer": tokenizer_fingerprint(tokenizer)}


def _rows_as_given(source: PromptSource, prompts: Sequence[PromptRow], bad_rows: Any) -> list[Mapping[str, Any]]:
    """Return the row of each prompt with all its columns."""
    assert source.path is not None
    rows = rows_of(source.path, source.rows, split=source.split, bad_rows=BadRows(bad_rows))
    fields = {row.place: row.fields for row in rows}
    return [fields[prompt.place] for prompt in prompts]


def _summary(
    findings: Sequence[Finding], report: PromptReport, judge: _Judge, settings: _Settings, *, resumed: int
) -> PresamplingSummary:
    rehearsed = sum(finding.rehearsal is not None for finding in findings)
    solved = sum(finding.num_correct >= settings.threshold for finding in findings)
    num_correct = sum(finding.num_correct for finding in findings)
    return PresamplingSummary(
        prompts=len(findings),
        rehearsal=rehearsed,
        exploration=len(findings) - rehearsed,
        further_completion_wrong=solved - rehearsed,
        never_solved=sum(finding.num_correct == 0 for finding in findings),
        correct_completions=num_correct / (len(findings) * settings.num_completions),
        too_long=report.dropped,
        bad_rows=report.bad,
        timeouts=judge.timeouts,
        errors=judge.errors,
        resumed=resumed,
    )

"""Pre-sampling of DPH-RL: prompts are divided into those to rehearse and those to explore."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from falign.durable import claimed, refuse_link, write_whole
from falign.errors import ConfigError
from falign.runs.loading import chosen_chat
from falign.terminal import Terminal, progress

if TYPE_CHECKING:
    from falign.data import PromptData, PromptRow
    from falign.rewards import RewardSum
    from falign.rollouts import Engine, SampledCompletion
    from falign.rollouts.presampling_journal import Finding

__all__ = ["Presampling", "PresamplingSummary"]

CHUNK_SIZE = 32
OUTPUTS = ("exploration.jsonl", "rehearsal.jsonl", "summary.json")


class PresamplingSummary(BaseModel):
    """Counts of pre-sampled prompts; ``summary.json`` has them under the same names, with spaces."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=lambda name: name.replace("_", " "))

    prompts: int
    rehearsal: int
    exploration: int
    further_completion_wrong: int = Field(alias="solved, and the further completion is wrong")
    never_solved: int
    correct_completions: float
    """Share of all completions."""
    too_long: int
    bad_rows: int
    timeouts: int
    errors: int
    resumed: int = Field(default=0, exclude=True)
    """Prompts that an earlier call had sampled."""

    def counts(self) -> dict[str, int | float]:
        """Return the numbers under their names in ``summary.json``."""
        return self.model_dump(by_alias=True)


@dataclass
class Presampling:
    """One pre-sampling: its options, and the run from a file of prompts to the outputs.

    Attributes:
        model: Its path or name.
        file: Rows with prompts.
        out: The folder of the outputs.
        verifier: Name of a reward that is 1 for correct completions.
        num_completions: Completions per prompt.
        threshold: Number of them that must be correct.
        max_new_tokens: Tokens of the longest completion.
        seed: Seed of the sampling.
        template: The prompt, with the row's columns in braces.
        chat: Whether a plain prompt is a user's turn; None: if the tokenizer has a chat template.
        bad_rows: ``error`` or ``skip``.
        overwrite: Whether outputs of an earlier call may be replaced.
        console: Where notices and progress are shown.
    """

    model: str
    file: Path
    out: Path
    verifier: str
    num_completions: int
    threshold: int
    max_new_tokens: int
    seed: int
    template: str | None = None
    chat: bool | None = None
    bad_rows: str = "error"
    overwrite: bool = False
    console: Console = field(default_factory=partial(Terminal, stderr=True, highlight=False, soft_wrap=True))
    reward: RewardSum = field(init=False)
    timeouts: int = 0
    errors: int = 0

    def __post_init__(self) -> None:
        from falign.choices import require_choice
        from falign.data.reports import BadRowPolicy
        from falign.rewards import RewardSum, WeightedReward, load_reward
        from falign.runs.named_code import import_from

        require_choice("bad_rows", self.bad_rows, BadRowPolicy)
        if not 1 <= self.threshold <= self.num_completions:
            raise ConfigError(f"threshold={self.threshold} must be from 1 to num_completions={self.num_completions}.")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"out={self.out} is a file: give a folder.")
        found = [self.out / name for name in OUTPUTS if (self.out / name).exists()]
        # Outputs with a journal beside them belong to a stopped call, which this one continues.
        if found and not self.overwrite and not self._journal.exists():
            raise ConfigError(f"{found[0]} exists: name another file, or give overwrite=True to sample again.")
        for path in found:
            refuse_link(path)
        if ":" in self.verifier:  # the user's own function
            import_from(Path.cwd())
        self.reward = RewardSum((WeightedReward("verifier", load_reward(self.verifier)),))

    def run(self, policy: Any, tokenizer: Any) -> PresamplingSummary:
        """Sample, write the outputs, and return the counts of prompts."""
        from falign.models import base_of, stop_token_ids
        from falign.models.tokenizers import pad_token_id
        from falign.rollouts import TransformersEngine

        engine = TransformersEngine(policy, pad_token_id=pad_token_id(tokenizer))
        engine.publish(policy, version=0)
        data = self._prompts(tokenizer, engine.capabilities().max_length)
        record = self._record(policy, tokenizer)
        self.out.mkdir(parents=True, exist_ok=True)
        with claimed(self.out / ".presampling.lock"):
            return self._sample(engine, data, record, tokenizer, stops=stop_token_ids(base_of(policy), tokenizer))

    def _sample(
        self, engine: Engine, data: PromptData, record: Mapping[str, Any], tokenizer: Any, *, stops: frozenset[int]
    ) -> PresamplingSummary:
        """Continue from an earlier, stopped call to the end."""
        from falign.rollouts import SamplingParams
        from falign.rollouts.presampling import presample
        from falign.rollouts.presampling_journal import PresamplingJournal

        rows = data.train
        journal = PresamplingJournal(
            self._journal, record=record, chunk_size=CHUNK_SIZE, num_prompts=len(rows), restart=self.overwrite
        )
        resumed = len(journal.findings)

        def verify(prompts: list[int], rollouts: list[SampledCompletion]) -> list[bool]:
            return self._correct([rows[i] for i in prompts], rollouts, tokenizer)

        results = presample(
            engine,
            [row.prompt_ids for row in rows],
            verify,
            num_completions=self.num_completions,
            threshold=self.threshold,
            params=SamplingParams(self.max_new_tokens, stop_token_ids=stops),
            seed=self.seed,
            start=resumed,
            chunk_size=CHUNK_SIZE,
        )
        with progress(self.console, "prompts", total=len(rows), done=resumed) as show:
            for chunk in results:
                journal.append(chunk)
                show(len(journal.findings))
        return self._finish(data, journal.findings, resumed, sampled_by={"model": self.model, **record})

    @property
    def _journal(self) -> Path:
        return self.out / ".presampling.jsonl"

    def _prompts(self, tokenizer: Any, positions: int | None) -> PromptData:
        from falign.data import PromptSource, load_prompts
        from falign.rewards.combination import row_check

        room = sys.maxsize if positions is None else positions - self.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt in the {positions} positions of "
                f"{self.model}: lower it."
            )
        chat = chosen_chat(self.chat, tokenizer, self.console)
        source = PromptSource(str(self.file), template=self.template, chat=chat)
        bad_rows: Any = self.bad_rows
        return load_prompts(
            [source],
            tokenizer,
            max_length=room,
            long_prompt="drop",
            bad_rows=bad_rows,
            skip_by="bad_rows=skip",
            check=row_check(self.reward),
        )

    def _record(self, policy: Any, tokenizer: Any) -> dict[str, Any]:
        """Return all inputs that the findings depend on."""
        from peft import PeftModel

        from falign.data import DEMOS
        from falign.models import model_identity, weights_hash
        from falign.models.tokenizers import tokenizer_fingerprint
        from falign.rewards.identity import reward_identity

        path = DEMOS.get(str(self.file), self.file)
        files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
        adapter = {"adapter": weights_hash(policy, adapter="default")} if isinstance(policy, PeftModel) else {}
        return {
            **model_identity(policy),
            **adapter,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "content of the file": sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
            **{
                name: getattr(self, name)
                for name in ("verifier", "num_completions", "threshold", "max_new_tokens", "seed", "template", "chat")
            },
            "bad_rows": self.bad_rows,
            "identity of the verifier": reward_identity(self.reward.rewards[0].reward),
        }

    def _correct(self, rows: list[PromptRow], rollouts: list[SampledCompletion], tokenizer: Any) -> list[bool]:
        from falign.rewards.groups import passes
        from falign.training.online.groups import judged

        _, scores = judged(self.reward, rows, rollouts, tokenizer)
        self.timeouts += scores.timeouts
        self.errors += scores.errors
        return [passes(value) for value in scores.total]

    def _finish(
        self, data: PromptData, findings: list[Finding], resumed: int, *, sampled_by: Mapping[str, Any]
    ) -> PresamplingSummary:
        """Write prompts to explore unchanged, and prompts to rehearse with their completions."""
        from falign.data import BadRows, read_rows

        bad_rows: Any = self.bad_rows
        fields = {row.place: row.fields for row in read_rows(self.file, bad_rows=BadRows(bad_rows))}
        found = [(fields[row.place], finding) for row, finding in zip(data.train, findings, strict=True)]
        explored = [row for row, finding in found if finding.rehearsal is None]
        rehearsed = [{**row, **finding.rehearsal} for row, finding in found if finding.rehearsal is not None]
        total = len(findings) * self.num_completions
        summary = {
            "prompts": len(findings),
            "rehearsal": len(rehearsed),
            "exploration": len(explored),
            "solved, and the further completion is wrong": sum(
                finding.num_correct >= self.threshold and finding.rehearsal is None for finding in findings
            ),
            "never solved": sum(finding.num_correct == 0 for finding in findings),
            "correct completions": sum(finding.num_correct for finding in findings) / total,
            "too long": data.report.dropped,
            "bad rows": data.report.bad,
            "timeouts": self.timeouts,
            "errors": self.errors,
        }
        for name, rows in (("exploration.jsonl", explored), ("rehearsal.jsonl", rehearsed)):
            write_whole(self.out / name, (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
        sums = {"rehearsal.jsonl": sha256((self.out / "rehearsal.jsonl").read_bytes()).hexdigest()}
        write_whole(
            self.out / "summary.json", json.dumps({**summary, "sampled_by": sampled_by, "sha256": sums}, indent=1)
        )
        self._journal.unlink()  # last: until then the same command continues
        return PresamplingSummary.model_validate({**summary, "resumed": resumed})

"""One evaluation of a model's completions, from its options to its files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from falign.data import InMemory, PromptRow, PromptSource, load_prompts
from falign.divergences import Divergence, get
from falign.errors import ConfigError, DataError
from falign.evaluation import CompletionScorer, ScoreOutput
from falign.evaluation.frontier import IDEALS, frontier_point, frontier_summary
from falign.evaluation.loading import Scored, held_out_prompts, load_alone, load_run, positions_of
from falign.evaluation.sample_metrics import divergence_metrics, sample_metrics
from falign.evaluation.sample_prompts import sample_prompts
from falign.evaluation.sample_scorer import ReferenceEngine, SampleRow, SampleScorer, ScoredReward
from falign.evaluation.score_output import reopen
from falign.evaluation.summaries import SampleSummary, write_summary
from falign.models import base_of, load_model, load_tokenizer, model_identity, stop_token_ids
from falign.models.heads import share_head
from falign.models.tokenizers import check_same_tokens, pad_token_id, tokenizer_fingerprint
from falign.references import FrozenModel
from falign.rewards import RewardSum, WeightedReward
from falign.rewards.combination import row_check
from falign.rewards.identity import reward_identities
from falign.rollouts import Engine, SamplingParams, TransformersEngine
from falign.runfile import RunConfig
from falign.runfile.reading import load_reward_list
from falign.runfile.reward_config import RewardConfig, build_rewards
from falign.runs import RunFolder
from falign.runs.loading import Given, Named, chosen_chat, is_run, named, result_folder
from falign.runs.named_code import code_of_rewards, import_from, is_recorded, named_code, read_run, require_trust
from falign.scoring import PromptTree, Scorer
from falign.seeds import mixed
from falign.terminal import Terminal, progress
from falign.training.online.groups import Draw, GroupSampler

__all__ = ["Asked", "Compared", "SampleEvaluation", "evaluate_samples"]

FILES = ("samples.jsonl", "reference_samples.jsonl")
USUAL = ("reverse_kl", "forward_kl", "jensen_shannon", "total_variation")
PROBE_TOKENS = 16


class Asked(NamedTuple):
    """The prompts to answer, by the arguments' names."""

    prompts: Any = None
    split: str = "train"
    template: str | None = None
    chat: bool | None = None
    limit: int | None = None


class Compared(NamedTuple):
    """The reference and divergences to compare with, by the options' names."""

    reference: str | None = None
    divergences: tuple[str, ...] = ()
    anchors: bool = True
    num_completions: int | None = None


def evaluate_samples(
    model: Named,
    prompts: Any = None,
    *,
    split: str = "train",
    template: str | None = None,
    chat: bool | None = None,
    limit: int | None = None,
    rewards: str | None = None,
    pass_reward: float | None = None,
    num_completions: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    reference: str | None = None,
    divergence: Sequence[str] = (),
    anchors: bool = True,
    num_reference_completions: int | None = None,
    checkpoint: int | None = None,
    prompts_per_batch: int = 8,
    dtype: str | None = None,
    name: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    trust_code: bool = False,
    console: Console | None = None,
) -> SampleSummary:
    """Sample completions and measure reward, divergence, diversity and pass@k; a stopped call goes on if repeated.

    Args:
        model: A run, or any model.
        prompts: Rows, or a file, folder or Hub name; the run's own held-out prompts if left out.
        split: Of the prompts.
        template: The prompt, with a row's columns in braces: ``"{question}"``.
        chat: Whether a plain prompt is a user's turn; the run's, else with a template, if left out.
        limit: Only so many prompts, the first ones.
        rewards: A YAML file with the section ``rewards`` of a run file, or a run: an online run's rewards, an offline
            run's implicit reward. The run's own if left out.
        pass_reward: The least reward of a completion that passes, for pass@k; an online run has its own.
        num_completions: Per prompt; as the run evaluates, or 8, if left out.
        max_new_tokens: The run's own, or 128, if left out.
        temperature: 0 decodes greedily; divergences need 1.
        seed: Of sampling and intervals.
        reference: What the policy is compared with; the run's own if left out.
        divergence: Names of divergences that are measured besides the usual ones.
        anchors: Also sample the reference, for the frontier's lines.
        num_reference_completions: Of the reference per prompt; as many as the policy's if left out.
        checkpoint: Of a run, the step of a checkpoint.
        prompts_per_batch: Prompts answered at once.
        dtype: Of a model, the checkpoint's if left out.
        name: Results go to ``RUN/evaluation/NAME``; ``samples``, or ``samples-STEP``, if left out.
        out: A folder for the results, needed for a model.
        overwrite: Replace existing samples, complete or not.
        trust_code: Whether code that the run folder names may run.
        console: Where progress is shown; standard error by default.

    Raises:
        FalignError: Something cannot work; what was sampled stays for the next call.
    """
    path, given, trust_code = named(model, trust_code=trust_code)
    evaluation = SampleEvaluation(
        model=path,
        asked=Asked(prompts, split, template, chat, limit),
        rewards=rewards,
        pass_reward=pass_reward,
        num_completions=num_completions,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        compared=Compared(reference, tuple(divergence), anchors, num_reference_completions),
        checkpoint=checkpoint,
        prompts_per_batch=prompts_per_batch,
        dtype=dtype,
        out=samples_folder(path, name=name, checkpoint=checkpoint, out=out),
        overwrite=overwrite,
        given=given,
        trust_code=trust_code,
    )
    return evaluation.run(console or Terminal(stderr=True, highlight=False, soft_wrap=True))


def samples_folder(
    model: str, *, name: str | None = None, checkpoint: int | None = None, out: str | Path | None = None
) -> Path:
    """Return where results go: ``RUN/evaluation/NAME``, or the folder that is given.

    Raises:
        ConfigError: The name is a path, or there is no folder for a model's.
    """
    default = "samples" if checkpoint is None else f"samples-{checkpoint}"
    return result_folder(model, name or default, None if out is None else Path(out))


class Rewarding(NamedTuple):
    """Rewards of completions, and a record that identifies them.

    Attributes:
        rewards: The rewards.
        record: Identifies them.
        tokenizers: Of the models among them that are given token ids, by their paths.
    """

    rewards: RewardSum
    record: Any
    tokenizers: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SampleEvaluation:
    """Options of one evaluation; see the command for their meaning.

    Attributes:
        out: The folder of ``samples.jsonl``, ``reference_samples.jsonl`` and ``summary.json``.
    """

    model: str
    asked: Asked
    rewards: str | None
    pass_reward: float | None
    num_completions: int | None
    max_new_tokens: int | None
    temperature: float
    seed: int
    compared: Compared
    checkpoint: int | None
    prompts_per_batch: int
    dtype: str | None
    out: Path
    overwrite: bool
    given: Given | None = None
    trust_code: bool = False

    def run(self, console: Console) -> SampleSummary:
        """Sample, reward and score, write the files, and return the summary."""
        self._check()
        config = self._config()
        divergences = self._divergences(config)
        with console.status("loading rewards"):
            rewarding = self._rewarding(config)
        with console.status(f"loading {escape(self.model)}"):
            scored = self._load()
        for path, tokenizer in rewarding.tokenizers.items():
            check_same_tokens(scored.tokenizer, tokenizer, f"{self.model} and {path}")
        prompts, source = self._prompts(config, scored, rewarding.rewards, console)
        settings = self._settings(config)
        samplers = self._samplers(config, scored, rewarding.rewards, settings)
        scorer = self._scorer(scored, samplers[0], prompts, console)
        record = {
            **{name: value for name, value in scored.record.items() if not name.startswith("objective.")},
            "tokenizer": tokenizer_fingerprint(scored.tokenizer),
            "layout": scorer.scorer.layout,
            "prompts": _digest(prompts),
            "rewards": rewarding.record,
            **settings,
            "prompts_per_batch": self.prompts_per_batch,
        }
        reopen(self.out / FILES[1], sibling=self.out / FILES[0])  # stopped between the names of the two
        with ExitStack() as stack, _progress(console, len(prompts) * len(samplers)) as show:
            outputs = [
                stack.enter_context(ScoreOutput(self.out / name, record=record, overwrite=self.overwrite))
                for name, _ in zip(FILES, samplers, strict=False)
            ]
            groups = [
                sample_prompts(
                    prompts,
                    sampler,
                    scorer,
                    output,
                    version=0,
                    of_reference=output is not outputs[0],
                    prompts_per_batch=self.prompts_per_batch,
                    on_batch=show,
                )
                for sampler, output in zip(samplers, outputs, strict=True)
            ]
            with console.status("intervals and frontier"):
                found = self._summary(config, scored, groups, divergences, rewarding.rewards.passing)
            found |= {"source": source, "sampling": settings, "record": record}
            found["files"] = {output.path.name: output.checksum() for output in outputs}
            summary = SampleSummary.model_validate(found)
            # Before the samples get their names, so that a call that is stopped here is repeated and not refused.
            write_summary(self.out, summary)
            for output in reversed(outputs):
                output.finish()
        if len(outputs) == 1:  # anchors of an earlier call, which the summary does not name
            (self.out / FILES[1]).unlink(missing_ok=True)
        return summary

    @property
    def _of_policy(self) -> bool:
        """True where samples come from the policy's own distribution, not a sharper or flatter one."""
        return self.temperature == 1.0

    def _check(self) -> None:
        """Refuse settings that cannot work before anything is loaded, and prepare the folder of results."""
        if self.checkpoint is not None and not is_run(self.model):
            raise ConfigError(f"`checkpoint` applies to runs, and {self.model} is not a run folder: leave it out.")
        if self.dtype is not None and is_run(self.model):
            raise ConfigError(f"`dtype`: {self.model} is a run, which has its own (model.dtype); leave it out.")
        if self.asked.prompts is None:
            given = {"`template`": self.asked.template, "`chat`": self.asked.chat}
            if alone := [name for name, value in given.items() if value is not None]:
                raise ConfigError(f"{alone[0]} belongs to `prompts`: a run's own prompts are as its run file says.")
            if not is_run(self.model):
                raise ConfigError(f"{self.model} is not a run folder and has no prompts: give prompts=FILE.")
        if self.pass_reward is not None and math.isnan(self.pass_reward):
            raise ConfigError("pass_reward=nan: give a number; no reward can be compared with NaN.")
        if not is_run(self.model) and self.compared.reference is None and self.compared.divergences:
            raise ConfigError(f"`divergence`: {self.model} has no reference: give reference=MODEL.")
        if not self._of_policy and self.compared.divergences:
            raise ConfigError(
                f"`divergence` needs temperature=1: at {self.temperature:g} another distribution is sampled."
            )
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"{self.out} is a file: give a folder.")
        if (self.out / FILES[0]).exists() and not self.overwrite:
            raise ConfigError(
                f"{self.out} holds results: give another name or folder, or overwrite=True to sample again."
            )
        self.out.mkdir(parents=True, exist_ok=True)

    def _config(self) -> RunConfig | None:
        if not is_run(self.model):
            return None
        # Its rewards are built only where no others are given.
        uses = ["model", "objective", "reference", "references", *(["rewards"] if self.rewards is None else [])]
        config = read_run(RunFolder.open(self.model), uses=uses, trust_code=self.trust_code)
        if named_code(config, uses):
            import_from(Path.cwd())
        return config if self.given is None else self.given.in_place(config, path=Path(self.model))

    def _divergences(self, config: RunConfig | None) -> dict[str, Divergence]:
        """The usual ones, the run's own and those that are asked for, by their names."""
        own = None if config is None else config.objective.model_dump().get("divergence")
        if any(":" in name for name in self.compared.divergences):
            import_from(Path.cwd())
        given = {name: "objective.divergence" for name in filter(None, [own])}
        given |= dict.fromkeys(self.compared.divergences, "divergence")
        found = [get(name, field=given.get(name)) for name in dict.fromkeys((*USUAL, *given))]
        return {divergence.name: divergence for divergence in found}

    def _rewarding(self, config: RunConfig | None) -> Rewarding:
        if self.rewards is None:
            if config is None or config.prompts is None:
                reason = "is not a run folder" if config is None else "learnt from preferences"
                raise ConfigError(
                    f"{self.model} {reason} and has no rewards: give `rewards`, a YAML file with a list of them or a "
                    "run whose implicit reward it is."
                )
            return _listed(config.rewards, config.rollout.outcome)
        if not is_run(self.rewards):
            return self._of_file(Path(self.rewards))
        folder = RunFolder.open(self.rewards)
        other = read_run(folder, uses=[], trust_code=False)
        if other.prompts is not None:
            other = read_run(folder, uses=["rewards"], trust_code=self.trust_code)
            if named_code(other, ["rewards"]):
                import_from(Path.cwd())
            return _listed(other.rewards, other.rollout.outcome)
        scored = load_run(self.rewards, max_length=None, trust_code=self.trust_code)
        assert scored.reference is not None
        scorer = CompletionScorer(
            policy=scored.policy,
            reference=scored.reference,
            objective=scored.objective,
            scorer=Scorer(pad_token_id=pad_token_id(scored.tokenizer), chunk_tokens=scored.chunk_tokens),
        )
        rewards = RewardSum((WeightedReward("implicit", ScoredReward(scorer)),))
        return Rewarding(rewards, scored.record, {self.rewards: scored.tokenizer})

    def _of_file(self, file: Path) -> Rewarding:
        """The rewards of a file that the user gives, or of the record in a run folder, which may be someone else's."""
        listed = load_reward_list(file)
        code = code_of_rewards(listed)
        if is_recorded(file):
            require_trust(code, place=file, trust_code=self.trust_code)
        if code:
            import_from(file.parent, Path.cwd())
        return _listed(listed)

    def _load(self) -> Scored:
        other, dtype = self.compared.reference, self.dtype or "auto"
        if is_run(self.model):
            scored = load_run(
                self.model,
                max_length=None,
                any_objective=True,
                checkpoint=self.checkpoint,
                given=self.given,
                trust_code=self.trust_code,
            )
        else:
            scored = load_alone(self.model, dtype=dtype, max_length=2)  # what is sampled has no window
        if other is None:
            return scored
        check_same_tokens(scored.tokenizer, load_tokenizer(other), f"{self.model} and {other}")
        device = next(scored.policy.parameters()).device
        model = load_model(other, dtype=dtype, device=device)
        share_head(scored.policy, model)
        identity = model_identity(model)
        reference = FrozenModel(
            model, weights=identity["weights"], config=identity["config"], chunk_tokens=scored.chunk_tokens
        )
        kept = {name: value for name, value in scored.record.items() if not name.startswith("reference.")}
        named = {f"reference.{name}": value for name, value in reference.identity().items()}
        return scored._replace(reference=reference, record={**kept, **named})

    def _prompts(
        self, config: RunConfig | None, scored: Scored, rewards: RewardSum, console: Console
    ) -> tuple[list[PromptRow], str]:
        """Return prompts that all rewards can judge, and a name for their source."""
        asked, check = self.asked, row_check(rewards)
        if asked.prompts is None:
            assert config is not None

            def tell(text: str) -> None:
                console.print(text, style="yellow", markup=False)

            rows = held_out_prompts(RunFolder.open(self.model), config, tell=tell)[: asked.limit]
            for row, reason in zip(rows, check(rows), strict=True):
                if reason is not None:
                    raise DataError(f"{row.place}: {reason}. Fix the row, or give prompts=FILE.")
            return rows, f"held-out prompts of {self.model}"
        settings = self._settings(config)
        positions = positions_of(scored.policy)
        room = sys.maxsize if positions is None else positions - settings["max_new_tokens"]
        of_run = None if config is None else config.chat
        chat = chosen_chat(of_run if asked.chat is None else asked.chat, scored.tokenizer, console)
        rows = None if isinstance(asked.prompts, str | Path) else InMemory(asked.prompts)
        place = str(asked.prompts) if rows is None else rows.path
        source = PromptSource(
            place, split=asked.split, template=asked.template, chat=chat, limit=asked.limit, rows=rows
        )
        data = load_prompts([source], scored.tokenizer, max_length=room, long_prompt="drop", skip_by=None, check=check)
        if data.report.dropped:
            raise ConfigError(
                f"{place}: {data.report.dropped} prompts have more than the {room} tokens that are left beside "
                f"max_new_tokens={settings['max_new_tokens']} in the {positions} positions of {self.model}: lower "
                "it, or shorten them."
            )
        return data.train, place

    def _settings(self, config: RunConfig | None) -> dict[str, Any]:
        """Sampling settings; those left out are the run's own evaluation settings."""
        online = None if config is None or config.prompts is None else config.rollout
        count = self.num_completions or (8 if online is None else online.evaluation.completions)
        return {
            "num_completions": count,
            "num_reference_completions": self.compared.num_completions or count,
            "max_new_tokens": self.max_new_tokens or (128 if online is None else online.max_new_tokens),
            "temperature": self.temperature,
            "ignore_stop": online is not None and online.ignore_stop,
            "seed": self.seed,
        }

    def _samplers(
        self, config: RunConfig | None, scored: Scored, rewards: RewardSum, settings: Mapping[str, Any]
    ) -> list[GroupSampler]:
        """Return the policy's, and the reference's where its completions are wanted."""
        stops = frozenset() if settings["ignore_stop"] else stop_token_ids(base_of(scored.policy), scored.tokenizer)
        params = SamplingParams(
            settings["max_new_tokens"], temperature=self.temperature, stop_token_ids=frozenset(stops)
        )
        pad_id = pad_token_id(scored.tokenizer)
        engine = TransformersEngine(scored.policy, pad_token_id=pad_id)
        engine.publish(scored.policy, version=0)

        def sampler(engine: Engine, name: str, seed: int) -> GroupSampler:
            return GroupSampler(engine, rewards, scored.tokenizer, params, completions=settings[name], seed=seed)

        found = [sampler(engine, "num_completions", self.seed)]
        if scored.reference is not None and self.compared.anchors and self._of_policy:
            other = ReferenceEngine(scored.reference, scored.policy, pad_token_id=pad_id)
            found.append(sampler(other, "num_reference_completions", mixed(self.seed, "reference")))
        return found

    def _scorer(
        self, scored: Scored, sampler: GroupSampler, prompts: Sequence[PromptRow], console: Console
    ) -> SampleScorer:
        """Choose the layout on short completions of the longest prompts: made-up ones would be too unlikely."""
        longest = sorted(prompts, key=lambda row: len(row.prompt_ids))[-2:]
        params = replace(sampler.params, max_new_tokens=min(PROBE_TOKENS, sampler.params.max_new_tokens))
        rollouts = sampler.engine.sample([row.prompt_ids for row in longest], 2, params, version=0, seed=0)
        probes = [
            PromptTree(row.prompt_ids, tuple(each.completion_ids for each in rollouts[2 * i : 2 * i + 2]))
            for i, row in enumerate(longest)
        ]
        scorer, choice = scored.choose_scorer(probes, layout="auto")
        console.print(f"layout: {choice.layout}, {choice.reason}", style=None if choice.as_asked else "yellow")
        return SampleScorer(policy=scored.policy, reference=scored.reference, scorer=scorer)

    def _summary(
        self,
        config: RunConfig | None,
        scored: Scored,
        groups: Sequence[list[list[SampleRow]]],
        divergences: Mapping[str, Divergence],
        outcome: str | None,
    ) -> dict[str, Any]:
        own, *others = groups
        pass_reward = self.pass_reward
        if pass_reward is None and config is not None and config.prompts is not None and self.rewards is None:
            pass_reward = config.rollout.pass_reward
        metrics = sample_metrics(own, pass_reward=pass_reward, outcome=outcome, seed=self.seed)
        frontier = None
        if scored.reference is not None and self._of_policy:
            anchors = others[0] if others else None
            metrics |= divergence_metrics(own, divergences, reference_groups=anchors, seed=self.seed)
            if anchors is not None:
                of_reference = sample_metrics(anchors, pass_reward=pass_reward, outcome=outcome, seed=self.seed)
                # The policy's entropy on completions of another model estimates nothing.
                metrics |= {f"reference/{name}": each for name, each in of_reference.items() if name != "entropy"}
                ideals = {**{name: get(name) for name in IDEALS}, **divergences}
                ideals.pop("total_variation", None)
                point = frontier_point(self._label, metrics, "reverse_kl")
                frontier = frontier_summary([point], anchors, axis=("reverse_kl", get("reverse_kl")), ideals=ideals)
        objective = {} if config is None else config.objective.model_dump()
        return {
            "kind": "samples",
            "name": self.out.name,
            "model": self.model,
            "label": self._label,
            "checkpoint": self.checkpoint,
            "reference": self.compared.reference
            or (None if scored.reference is None else scored.reference.identity()["kind"]),
            "divergence": objective.get("divergence"),
            "beta": objective.get("beta"),
            "num_prompts": len(own),
            "num_completions": len(own[0]),
            "pass_reward": pass_reward,
            "metrics": {name: each._asdict() for name, each in metrics.items()},
            "frontier": frontier,
        }

    @property
    def _label(self) -> str:
        name = Path(self.model).name or self.model
        return name if self.checkpoint is None else f"{name}, step {self.checkpoint}"


def _listed(configs: Sequence[RewardConfig], outcome: str | None = None) -> Rewarding:
    paths = [path for config in configs for _, path in config.models_that_read_ids()]
    tokenizers = {path: load_tokenizer(path) for path in paths}
    rewards = build_rewards(configs, outcome=outcome)
    listed = [config.model_dump(mode="json") for config in configs]
    return Rewarding(rewards, {"listed": listed, "identities": reward_identities(rewards)}, tokenizers)


def _digest(prompts: Sequence[PromptRow]) -> str:
    """Return a digest of prompts and of the columns that rewards read."""
    digest = sha256()
    for row in prompts:
        digest.update(json.dumps([row.prompt_ids, row.columns], sort_keys=True, default=str).encode())
    return digest.hexdigest()


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[int, int, Draw | None], None]]:
    """Show progress over both rounds, of the policy and of the reference, and what rewards tell."""
    last = before = 0
    with progress(console, "prompts", total=total) as show:

        def update(done: int, resumed: int, draw: Draw | None) -> None:
            nonlocal before, last
            if done < last:  # the second round, on the reference
                before += last
            last = done
            show(before + done)
            if draw is not None and draw.message:
                console.print(f"reward: {draw.message}", style="yellow", markup=False)

        yield update

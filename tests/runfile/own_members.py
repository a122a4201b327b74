"""Members of a user's own, one for each family that a run file chooses from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import TrainerCallback
from typing_extensions import override

from falign.divergences import Divergence, from_generator
from falign.evaluation.benchmarks import BenchmarkItem
from falign.objectives import Controller, Measure, ObjectiveOutput, Term, pairs_of
from falign.rewards import Identity
from falign.rollouts import Engine, EngineSetup, TransformersEngine


def skewed(a: float = 0.5) -> Divergence:
    """A mixture of two generators."""
    return from_generator(lambda u: a * (u * torch.log(u) - u + 1) + (1 - a) * (u - 1) ** 2, name=f"skewed({a})")


class Bare:
    """Nothing, and no ``__init__``."""


class OfTeacher:
    """A measure that reads a second reference."""

    references = frozenset({"teacher"})

    def __call__(self, at):
        return at.reference("teacher")[:, 0]


@dataclass(frozen=True)
class MassOn:
    """A measure with settings: probability of some tokens, times a factor."""

    ids: list[int]
    factor: float = 1.0

    references = frozenset()

    def __call__(self, at):
        return self.factor * at.logprobs[:, self.ids].exp().sum(-1)


def centred(rewards, prompt_index):
    """An advantage: minus the mean of the rollout."""
    return rewards.float() - rewards.float().mean()


@dataclass(frozen=True)
class Margin:
    """An objective: the squared distance of the margin from a wanted one.

    Args:
        wanted: The margin, nats.
        divergence: Only named, to show that a name becomes a divergence.
    """

    wanted: float
    divergence: Divergence | None = None

    needs = frozenset({"reference_logprobs", "preference"})
    measures: ClassVar[dict[str, Measure]] = {}

    def __post_init__(self):
        if self.wanted <= 0:
            raise ValueError(f"wanted={self.wanted} must be positive")

    def __call__(self, batch):
        log_ratio = (batch.logprobs - batch.reference_logprobs).masked_fill(~batch.completion_mask, 0.0).sum(-1)
        chosen, rejected = pairs_of(batch.preference, batch.prompt_index)
        losses = (log_ratio[chosen] - log_ratio[rejected] - self.wanted) ** 2
        return ObjectiveOutput((Term(losses, torch.ones_like(losses)),), {"margin_loss": losses.detach()})


@dataclass(frozen=True)
class Half:
    """A token weight: one number everywhere."""

    share: float

    needs = frozenset()
    measures: ClassVar[dict[str, Measure]] = {}

    def __call__(self, batch):
        return torch.full_like(batch.logprobs, self.share)


class CountingEngine(Engine):
    """An engine: the model in this process, with its calls counted."""

    def __init__(self, setup: EngineSetup, *, colder: float = 1.0) -> None:
        self.inner = TransformersEngine(setup.policy, pad_token_id=setup.pad_token_id)
        self.colder, self.calls = colder, 0

    @override
    def publish(self, model, version):
        self.inner.publish(model, version)

    @override
    def sample(self, prompt_ids, n, params, *, version, seed, first=0):
        self.calls += 1
        return self.inner.sample(prompt_ids, n, params, version=version, seed=seed, first=first)

    @override
    def retire(self, version):
        self.inner.retire(version)

    @override
    def capabilities(self):
        return self.inner.capabilities()

    @override
    def close(self):
        self.inner.close()


class Alone(CountingEngine):
    """An engine of which only one process can have one."""

    many_processes = False


@dataclass(frozen=True)
class Length:
    """A reward: how near a completion is to a length, in characters."""

    wanted: int = 10
    per: float = 1.0

    def __call__(self, prompts, completions, **columns):
        return [-abs(len(text) - self.wanted) / self.per for text in completions]


@dataclass(frozen=True)
class Tilted:
    """A target: the reference times ``exp(strength · r)``."""

    strength: float

    has_zeros = False
    num_features = 1

    def log_score(self, features):
        return self.strength * features[:, 0].float()


@dataclass(frozen=True)
class TwoWords:
    """A benchmark: the better of two words."""

    name = "two_words"
    hub_name = None
    splits = subsets = ()

    def read(self, path=None, *, split=None, bad_rows):
        for i, line in enumerate(Path(path).read_text().splitlines()):
            row = json.loads(line)
            completions = (row["good"], row["bad"])
            yield BenchmarkItem(f"{path}:{i + 1}", str(i), "", row["question"], completions, (1.0, 0.0), plain=True)

    def outcome(self, item, scores):
        return {"correct": float(scores[0] > scores[1])}

    def summarize(self, subsets, outcomes):
        accuracy = sum(outcome["correct"] for outcome in outcomes) / len(outcomes)
        return {"score": accuracy, "accuracy": accuracy}


def nothing(**settings):
    """Makes no member of any family."""
    return settings


class Times:
    """A transform of a reward."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, values, prompts, **columns):
        return [None if value is None else self.factor * value for value in values]

    def row_errors(self, prompts, **columns):
        return [None for _ in prompts]

    def identity(self):
        return Identity(__name__, {"factor": self.factor})


@dataclass(frozen=True)
class Follow(Controller):
    """The start plus the last measured value."""

    start: float
    metric: str

    def start_state(self):
        return {"value": self.start}

    def value(self, state):
        return state["value"]

    def after(self, state, measured):
        return {"value": self.start + measured}


class Watch(TrainerCallback):
    """A callback of one's own."""


class OtherWatch(Watch):
    """Another one."""

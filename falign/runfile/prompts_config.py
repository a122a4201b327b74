"""The sections of an online run that replace ``data``: prompts, rollouts, rehearsal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from falign.data import InMemory, LengthPolicy, PromptData, PromptSource, RowCheck, load_prompts
from falign.data.chat_template import Tokenizer
from falign.objectives import Stairs
from falign.runfile.base_config import FrozenModel
from falign.runfile.engine_config import CorrectionConfig, EngineConfig, TransformersEngineConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from falign.models.heads import ValueHead

__all__ = [
    "CriticConfig",
    "DifficultyConfig",
    "EvaluationConfig",
    "HorizonConfig",
    "PromptSourceConfig",
    "PromptsConfig",
    "RehearsalDataConfig",
    "RolloutConfig",
    "with_rows",
]


def with_rows(value: Any, handler: Any) -> Any:
    """Validate a source of data, which may have rows in memory instead of a path: ``{rows: InMemory(...)}``."""
    rows = value.get("rows") if isinstance(value, dict) else None
    if not isinstance(rows, InMemory):
        return handler(value)
    section = handler({name: each for name, each in value.items() if name != "rows"} | {"path": rows.path})
    section._rows = rows
    return section


class PromptSourceConfig(FrozenModel):
    """One source of prompts."""

    path: str | None = None
    """As in ``data``, or ``demo:one-digit-arithmetic``."""
    texts: list[str] = []
    """The prompts themselves, instead of a path."""
    split: str = "train"
    template: str | None = None
    """The prompt, with the row's columns in braces: ``"{question} Answer:"``; by default the column ``prompt``."""
    columns: dict[str, str] = {}
    """Other names for columns, of the prompt or for rewards: ``{answer: reward_model.ground_truth}``."""
    chat: bool | None = None
    """``true``: a plain prompt is a user's turn, rendered by the chat template; ``false``: it is continued as it is.
    Must be set for plain prompts if the model has a chat template."""
    system: str | None = None
    """A system turn before every prompt, for rows without a column ``system``."""
    ignore: list[str] = []
    """Columns, and keys of turns, that look like parts of the prompt but are not; rewards do not get them either."""
    limit: int | None = Field(default=None, ge=1)

    _rows: InMemory | None = PrivateAttr(default=None)

    @model_validator(mode="wrap")
    @classmethod
    def _with_rows(cls, value: Any, handler: Any) -> PromptSourceConfig:
        return with_rows(value, handler)

    def build(self) -> PromptSource:
        """Return the source in the form that :mod:`falign.data` reads."""
        lists = {"texts": tuple(self.texts), "ignore": tuple(self.ignore)}
        return PromptSource(**{**self.model_dump(), **lists}, rows=self._rows)


class PromptsConfig(FrozenModel):
    """Prompts of an online run; the other columns of a row go to the rewards."""

    train: list[PromptSourceConfig] = Field(min_length=1)
    eval: list[PromptSourceConfig] = []
    """Separate sources of held-out prompts. Alternatively, ``eval_size`` holds out some of the training prompts."""
    eval_size: int = Field(default=0, ge=0)
    max_length: int = Field(default=512, ge=1)
    """Maximum number of tokens of a prompt."""
    long_prompt: LengthPolicy = "error"
    bad_rows: str = Field(default="error", pattern="^(error|skip)$")

    def build(self, tokenizer: Tokenizer, *, seed: int, check: RowCheck | None = None) -> PromptData:
        """Read, tokenize and split the prompts; ``check`` returns reasons for rows that rewards cannot judge."""
        return load_prompts(
            [source.build() for source in self.train],
            tokenizer,
            max_length=self.max_length,
            long_prompt=self.long_prompt,
            bad_rows="skip" if self.bad_rows == "skip" else "error",
            skip_by="prompts.bad_rows=skip",
            eval_sources=[source.build() for source in self.eval],
            eval_size=self.eval_size,
            seed=seed,
            check=check,
        )


class DifficultyConfig(FrozenModel):
    """A filter that keeps prompts that the policy solves sometimes, but not always."""

    low: float = Field(default=0.1, ge=0, le=1)
    """Smallest share of a prompt's completions that pass."""
    high: float = Field(default=0.9, ge=0, le=1)
    max_rounds: int = Field(default=3, ge=1)
    """Maximum number of draws of prompts per rollout; afterwards rejected prompts fill it up."""

    @model_validator(mode="after")
    def _is_a_range(self) -> DifficultyConfig:
        if self.low > self.high:
            raise ValueError(f"low={self.low:g} is above high={self.high:g}, so no prompt fits; exchange them")
        return self


class HorizonConfig(FrozenModel):
    """A growing limit of the tokens of training completions: ``{start: 16, by: 16, every: 10}``."""

    start: int = Field(ge=1)
    """Tokens in the first rollouts."""
    by: int = Field(ge=1)
    """Tokens by which it grows, up to ``max_new_tokens``."""
    every: int = Field(ge=1)
    """Optimizer steps between two growths; a rollout has the limit of its first step."""


class EvaluationConfig(FrozenModel):
    """Sampling for held-out prompts."""

    completions: int = Field(default=8, ge=1)
    """Completions per prompt; pass@k is estimated for k up to this number."""
    temperature: float = Field(default=1.0, ge=0)
    """0 decodes greedily."""


class RolloutConfig(FrozenModel):
    """Sampling of completions, and the number of updates on each.

    Sampling is from the whole vocabulary: no importance weight can correct for tokens that top-k or top-p leave out.
    """

    prompts: int = Field(default=8, ge=1)
    """Prompts per rollout."""
    completions: int = Field(default=8, ge=1)
    """Completions per prompt: the group."""
    max_new_tokens: int = Field(default=256, ge=1)
    horizon: HorizonConfig | None = None
    """A growing limit for training, up to ``max_new_tokens``: ``{start: 16, by: 16, every: 10}``. Held-out completions
    have ``max_new_tokens``."""
    temperature: float = Field(default=1.0, gt=0)
    """At values other than 1 the samples come from another distribution and are weighted by ``π/π_sampler``."""
    updates: int = Field(default=1, ge=1)
    """Passes over each rollout."""
    minibatches: int = Field(default=1, ge=1)
    """Optimizer steps per pass; prompts are divided among them."""
    ignore_stop: bool = False
    """Sample exactly ``max_new_tokens`` tokens, for texts without a natural end."""
    pass_reward: float = 1.0
    """A completion with at least this reward passes, for pass@k and difficulty."""
    outcome: str | None = None
    """Name of the reward that decides what passes. By default the only one with a weight, or the first of several;
    ``difficulty`` then needs the name."""
    difficulty: DifficultyConfig | None = None
    ranked: Literal["best_worst", "all"] = "best_worst"
    """For preference objectives: the completions of a prompt that are compared by their rewards."""
    max_batch_tokens: int = Field(default=16_384, ge=1)
    """Maximum number of tokens with keys and values in memory during sampling; affects memory and speed only."""
    fit_samples: int = Field(default=512, ge=2)
    """Number of the reference's completions for fitting the weights of ``objective.target.moments``."""
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = TransformersEngineConfig()
    """The engine that samples: ``{kind: transformers}``, ``{kind: vllm, shared_dir: ...}`` or your own,
    ``{kind: module:Name, ...}``."""
    ahead: bool = False
    """Sample the next rollout while the policy learns from the current one; it is weighted by ``π/π_sampler``."""
    correction: CorrectionConfig | None = None
    """``{cap: 2}``: importance weights π/π_sampler, bounded by ``cap``, in place of π/π_old; for policy gradients."""

    @model_validator(mode="after")
    def _samples_beside_training(self) -> RolloutConfig:
        if self.ahead and not self.engine.samples_beside_training:
            raise ValueError(
                "ahead=true: the training process cannot sample at the same time; use an engine of kind vllm, or leave "
                "ahead out"
            )
        return self

    @model_validator(mode="after")
    def _grows(self) -> RolloutConfig:
        if self.horizon is not None and self.horizon.start >= self.max_new_tokens:
            raise ValueError(
                f"horizon.start={self.horizon.start} is not below max_new_tokens={self.max_new_tokens}, at which it "
                "ends, so it does not grow: leave it out, or lower it"
            )
        return self

    def tokens(self, step: int) -> int:
        """Return the maximum number of tokens of the completions that are sampled at a step."""
        if self.horizon is None:
            return self.max_new_tokens
        return Stairs(self.horizon.start, self.max_new_tokens, self.horizon.by, self.horizon.every)(step)

    @property
    def num_updates(self) -> int:
        """Optimizer steps per rollout."""
        return self.updates * self.minibatches


class CriticConfig(FrozenModel):
    """The value head of an objective with ``advantage: gae``."""

    heads: Literal[1, 2] = 1
    """2: two heads, and the soft minimum of their slow copies as the baseline (SAFE)."""
    soft_min: float | None = Field(default=None, gt=0)
    """Only with two heads: α of the soft minimum, in units of reward; 0.3 by default. A small one takes the smaller
    value, a large one the mean."""
    polyak: float | None = Field(default=None, gt=0, le=1)
    """Only with two heads: share of the distance to the heads by which the slow copies move after each step; 0.05 by
    default."""
    warm_up: int = Field(default=0, ge=0)
    """Number of rollouts at the beginning whose updates train the value head alone, not the policy."""

    @model_validator(mode="after")
    def _has_effect(self) -> CriticConfig:
        for name in ("soft_min", "polyak"):
            if self.heads == 1 and getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name):g} is only for heads=2; leave it out, or set heads to 2")
        return self

    def build(self, policy: PreTrainedModel | PeftModel) -> ValueHead:
        """Return the value head.

        Args:
            policy: The policy whose hidden states it reads.
        """
        from falign.models.heads import DoubleValueHead, ValueHead

        if self.heads == 1:
            return ValueHead.of(policy)
        given = {"soft_min": self.soft_min, "polyak": self.polyak}
        return DoubleValueHead.of(policy, **{name: value for name, value in given.items() if value is not None})


class RehearsalDataConfig(FrozenModel):
    """Stored completions of the reference, as ``falign sample --verifier`` writes them."""

    path: str
    """``rehearsal.jsonl``."""
    completions: int = Field(default=8, ge=1)
    """The number of completions per optimizer step."""

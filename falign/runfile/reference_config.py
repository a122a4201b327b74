"""The section ``reference`` of the run file: one model per kind, distinguished by ``kind``."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import override

from falign.errors import ConfigError
from falign.registry import Registry
from falign.runfile.base_config import PythonObject
from falign.runfile.members import OwnSection, union_of_kinds
from falign.runfile.reference_section import BuildContext, PolicySections, ReferenceSection

if TYPE_CHECKING:
    from falign import references

__all__ = [
    "AdapterOffConfig",
    "AdapterReferenceConfig",
    "AutoReferenceConfig",
    "FrozenReferenceConfig",
    "GeometricConfig",
    "MixtureConfig",
    "MovingAverageConfig",
    "OwnReferenceConfig",
    "PeriodicResetConfig",
    "PythonReferenceConfig",
    "ReferenceConfig",
    "ResetOnStallConfig",
    "SoupConfig",
    "VLLMReferenceConfig",
]


class AutoReferenceConfig(ReferenceSection):
    """The policy's initial weights: ``adapter_off``; with ``adapter.init`` that adapter; ``frozen`` without adapter."""

    kind: Literal["auto"] = "auto"

    @property
    def _common(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ReferenceSection.model_fields if name != "kind"}

    @override
    def resolved(self, config: PolicySections) -> ReferenceSection:
        if config.adapter is None:
            return FrozenReferenceConfig(**self._common)
        if config.adapter.init is None:
            return AdapterOffConfig(**self._common)
        return AdapterReferenceConfig(path=config.adapter.init, **self._common)


class AdapterOffConfig(ReferenceSection):
    """The policy without its adapter; no second model in memory."""

    kind: Literal["adapter_off"] = "adapter_off"

    @override
    def check(self, *, field: str, adapter: bool) -> None:
        _require_adapter(self.kind, field=field, adapter=adapter)

    @override
    def starts_as_policy(self, config: PolicySections) -> bool:
        return config.adapter is None or config.adapter.init is None

    @override
    def build(self, context: BuildContext) -> references.Reference:
        from falign.models import weights_hash
        from falign.references import AdapterOff

        return AdapterOff(
            weights=weights_hash(context.policy),
            starts_as_policy=self.starts_as_policy(context.config),
            chunk_tokens=context.config.training.chunk_tokens,
        )


class FrozenReferenceConfig(ReferenceSection):
    """A second model in memory that never changes."""

    kind: Literal["frozen"] = "frozen"
    path: str | None = None
    """The model, if it is not the one in training; it must have the policy's tokens."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fastest"] = "auto"
    """For a separate ``path``, as ``model.dtype``; without one the reference is loaded like the policy."""
    quantization: Literal["nf4", "int8"] | None = None
    """For a separate ``path``, as ``model.quantization``; without one the reference is loaded like the policy."""

    @override
    def model_paths(self) -> Iterator[str]:
        if self.path is not None:
            yield self.path

    @override
    def models_that_read_ids(self, *, field: str, own: str) -> Iterator[tuple[str, str]]:
        if self.path not in (None, own):
            yield f"{field}.path", self.path

    @model_validator(mode="after")
    def _own_fields(self) -> FrozenReferenceConfig:
        if self.path is None and (self.dtype != "auto" or self.quantization is not None):
            name = "dtype" if self.dtype != "auto" else "quantization"
            raise ValueError(
                f"{name} applies only to a reference with its own path; without a path the reference is the model in "
                "training, loaded like the policy: give path, or leave it out"
            )
        return self

    @override
    def starts_as_policy(self, config: PolicySections) -> bool:
        own = (config.model.path, config.model.dtype, config.model.quantization)
        given = (self.path, self.dtype, self.quantization)
        return (config.adapter is None or config.adapter.init is None) and (self.path is None or given == own)

    @override
    def build(self, context: BuildContext) -> references.FrozenModel:
        from falign.models import load_model, model_identity
        from falign.references import FrozenModel

        config = context.config
        if self.path is None:
            model = config.model.build()
        else:
            model = load_model(
                self.path,
                dtype=self.dtype,
                quantization=self.quantization,
                attn_implementation=config.model.attn_implementation,
                revision=config.model.revision if self.path == config.model.path else None,
                trust_remote_code=config.model.trust_remote_code,
            )
            if self.path == config.model.path:
                model = config.model.with_new_tokens(model)
        identity = model_identity(model)
        model.to(context.device)  # pyright: ignore[reportArgumentType]
        return FrozenModel(
            model,
            weights=identity["weights"],
            config=identity["config"],
            starts_as_policy=self.starts_as_policy(context.config),
            chunk_tokens=context.config.training.chunk_tokens,
        )


class AdapterReferenceConfig(ReferenceSection):
    """A frozen adapter over the policy's base, such as the one from supervised tuning."""

    kind: Literal["adapter"] = "adapter"
    path: str
    """The adapter's folder, or a run that trained one."""

    @override
    def model_paths(self) -> Iterator[str]:
        yield self.path

    @override
    def check(self, *, field: str, adapter: bool) -> None:
        _require_adapter(self.kind, field=field, adapter=adapter)

    @override
    def starts_as_policy(self, config: PolicySections) -> bool:
        from falign.models.sources import adapter_folder

        init = None if config.adapter is None else config.adapter.init
        return init is not None and adapter_folder(self.path).resolve() == adapter_folder(init).resolve()

    @override
    def build(self, context: BuildContext) -> references.Reference:
        from falign.models import adapted_weights_hash, load_adapter
        from falign.models.merging import check_supported
        from falign.models.sources import adapter_folder
        from falign.references import AdapterReference

        adapted = load_adapter(context.policy, adapter_folder(self.path), trainable=False, name=context.adapter)
        check_supported(adapted, context.adapter)
        return AdapterReference(
            adapter=context.adapter,
            weights=adapted_weights_hash(adapted, adapter=context.adapter),
            path=self.path,
            starts_as_policy=self.starts_as_policy(context.config),
            chunk_tokens=context.config.training.chunk_tokens,
        )


class SoupConfig(ReferenceSection):
    """The weighted average of adapters over the policy's base, exactly, or of whole checkpoints (SALSA)."""

    kind: Literal["soup"] = "soup"
    paths: list[str]
    """Two or more adapters or checkpoints, or runs that trained them; all of one kind."""
    weights: list[float] | None = None
    """One weight for each, with sum 1; equal weights by default."""

    @override
    def model_paths(self) -> Iterator[str]:
        yield from self.paths

    @override
    def check(self, *, field: str, adapter: bool) -> None:
        from falign.models.soup_members import check_weights

        shares = [1 / len(self.paths)] * len(self.paths) if self.weights is None else self.weights
        try:
            check_weights(shares, members=len(self.paths))
        except ConfigError as error:
            raise ConfigError(f"{field}: {error}") from error

    @override
    def models_that_read_ids(self, *, field: str, own: str) -> Iterator[tuple[str, str]]:
        from falign.models.soup_members import soup_members

        for member in soup_members(self.paths, self.weights):
            if member.kind == "checkpoint":
                yield f"{field}.paths", str(member.folder)

    @override
    def build(self, context: BuildContext) -> references.Reference:
        from peft import PeftModel

        from falign.models.soup import cached_checkpoint_soup, soup_record
        from falign.models.soup_members import soup_members
        from falign.references import Soup

        members = soup_members(self.paths, self.weights)
        if members[0].kind == "checkpoint":
            average = FrozenReferenceConfig(path=str(cached_checkpoint_soup(members)))
            return Soup(average.build(context), record=soup_record(members))
        if not isinstance(context.policy, PeftModel):
            raise ConfigError(
                f"{context.field}.kind=soup of adapters with adapter=null: all weights are trained, so the base would "
                "move with the policy; give merged checkpoints (`falign export --format merged`)."
            )
        return Soup.of_adapters(
            context.policy,
            self.paths,
            weights=self.weights,
            adapter=context.adapter,
            chunk_tokens=context.config.training.chunk_tokens,
        )


class _FollowingConfig(ReferenceSection):
    """A reference that follows the policy."""

    cache: None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Not possible here."""

    @field_validator("cache", mode="before")
    @classmethod
    def _refuse_cache(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("the log-probabilities of a moving reference change at every move; leave the cache out")

    @override
    def check_sharding(self, *, field: str) -> None:
        from falign.references import MovingReference

        raise ConfigError(
            f"{field}.kind={self.kind} under FSDP2: {MovingReference.cannot_shard}. Train with DDP (--launch ddp), or "
            "use a reference that does not move."
        )

    @override
    def starts_as_policy(self, config: PolicySections) -> bool:
        return True

    def rule(self) -> Any:
        """Return the rule by which it follows the policy."""
        raise NotImplementedError

    @property
    def reference_class(self) -> type[references.MovingReference]:
        """The class of the reference."""
        from falign.references import MovingReference

        return MovingReference

    @override
    def build(self, context: BuildContext) -> references.Reference:
        from peft import PeftModel

        from falign.models import adapted_weights_hash

        policy = context.policy
        if not isinstance(policy, PeftModel):
            return self.reference_class(FrozenReferenceConfig().build(context), rule=self.rule())
        return self.reference_class.beside(
            policy,
            rule=self.rule(),
            adapter=context.adapter,
            weights=adapted_weights_hash(policy, adapter="default"),
            chunk_tokens=context.config.training.chunk_tokens,
        )


class _MovingConfig(_FollowingConfig):
    """A reference that follows the policy at intervals."""

    every: int = Field(ge=1)
    """Optimizer steps between two moves. Logs of a step are measured before the move."""

    @override
    def check_rollouts(self, *, field: str, updates: int) -> None:
        from falign.references import check_interval

        check_interval(self.every, place=field, updates=updates)


class MovingAverageConfig(_MovingConfig):
    """An average over the policy's past; each move gives the policy the weight α (TR-DPO's soft update)."""

    kind: Literal["moving_average"] = "moving_average"
    alpha: float = Field(gt=0, le=1)
    """α, the weight of the policy."""
    rank: int | None = Field(default=None, ge=1)
    """Rank of the averaged adapter; four times the policy's by default. The part that exceeds it is logged as
    ``reference/truncation``."""

    @override
    def check(self, *, field: str, adapter: bool) -> None:
        if not adapter and self.rank is not None:
            raise ConfigError(f"{field}.rank={self.rank} with adapter=null: weights have no rank; leave it out.")

    @override
    def rule(self) -> references.MovingRule:
        from falign.references import MovingAverage

        return MovingAverage(alpha=self.alpha, every=self.every, rank=self.rank)


class PeriodicResetConfig(_MovingConfig):
    """The policy as it was at the last reset (TR-DPO's hard update, ProRL)."""

    kind: Literal["periodic_reset"] = "periodic_reset"
    reset_optimizer: bool = False
    """Forget the optimizer's moments too."""

    @override
    def rule(self) -> references.MovingRule:
        from falign.references import PeriodicReset

        return PeriodicReset(every=self.every, reset_optimizer=self.reset_optimizer)


class ResetOnStallConfig(_FollowingConfig):
    """The policy as it was when a held-out metric last stopped improving (ProRL)."""

    kind: Literal["reset_on_stall"] = "reset_on_stall"
    patience: int = Field(ge=1)
    """Evaluations in a row without improvement, after which the reference is set to the policy."""
    metric: str = "reward"
    """A held-out metric, as in the log without ``eval_``: ``reward``, ``pass@1``, ``loss``."""
    min_improvement: float = Field(default=0.0, ge=0)
    """An evaluation improves if it is better than the best one by more than this."""
    larger_is_better: bool = True
    """``false`` for a loss."""
    reset_optimizer: bool = True
    """Forget the optimizer's moments too."""

    @override
    def check_evaluation(self, *, field: str, every: int | None) -> None:
        if every is None:
            raise ConfigError(
                f"{field}.kind=reset_on_stall waits for evaluations, and training.eval_steps is not set: give the "
                "steps between two of them."
            )

    @property
    @override
    def reference_class(self) -> type[references.MovingReference]:
        from falign.references import StallReset

        return StallReset

    @override
    def rule(self) -> references.MovingRule:
        from falign.references import ResetOnStall

        return ResetOnStall(**self.model_dump(exclude={*ReferenceSection.model_fields}))


class _CombinationConfig(ReferenceSection):
    weights: dict[str, float] = Field(min_length=1)
    """The weight of each member, by its name under ``references``; they sum to 1."""
    cache: None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Not possible here; the members may have one."""

    @field_validator("cache", mode="before")
    @classmethod
    def _refuse_cache(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("a combination is computed from its members: give those a cache, or leave it out")

    @property
    @override
    def members(self) -> tuple[str, ...]:
        return tuple(self.weights)


class MixtureConfig(_CombinationConfig):
    """The mixture Σ w p of the next-token distributions of other references."""

    kind: Literal["mixture"] = "mixture"

    @override
    def check(self, *, field: str, adapter: bool) -> None:
        from falign.references.combinations import check_mixture

        check_mixture(self.weights, place=field)

    @override
    def build(self, context: BuildContext) -> references.Reference:
        from falign.references import Mixture

        return Mixture(context.members, self.weights, chunk_tokens=context.config.training.chunk_tokens)


class GeometricConfig(_CombinationConfig):
    """The geometric combination Π pʷ of other references; a negative weight extrapolates away from its member."""

    kind: Literal["geometric"] = "geometric"
    level: Literal["token", "sequence"] = "token"
    """``token``: normalized over the vocabulary at each token, which needs the members' whole distributions;
    ``sequence``: of whole completions, known up to a factor per prompt, for objectives that estimate it (f-DPG)."""

    @property
    @override
    def normalized(self) -> bool:
        return self.level == "token"

    @property
    @override
    def reads_whole(self) -> bool:
        return self.level == "token"

    @override
    def check(self, *, field: str, adapter: bool) -> None:
        from falign.references.combinations import check_geometric

        check_geometric(self.weights, place=field)

    @override
    def build(self, context: BuildContext) -> references.Reference:
        from falign.references import Geometric

        chunk_tokens = context.config.training.chunk_tokens
        return Geometric(context.members, self.weights, level=self.level, chunk_tokens=chunk_tokens)


class VLLMReferenceConfig(ReferenceSection):
    """A model on a vLLM server, for objectives that read the log-probabilities of sampled tokens only."""

    kind: Literal["vllm"] = "vllm"
    url: str = Field(default="http://127.0.0.1:8000", pattern=r"^https?://[^/]+/?$")
    """The server, started without adapters (``MAX_LORA_RANK=0 scripts/vllm_server.sh MODEL``)."""
    model: str | None = None
    """Its name for the model, if it is not the base model."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds for each call, that is, for one completion with its prompt."""
    wait: float = Field(default=300.0, ge=0)
    """Seconds that the server may be unavailable, also at the start; then the run ends and can be resumed."""
    cache: None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Not possible here."""

    @field_validator("cache", mode="before")
    @classmethod
    def _refuse_cache(cls, value: Any) -> None:
        if value is not None:
            raise ValueError(
                "a server gives no hash of its weights, so cached values could not be checked against it: leave the "
                "cache out, or name the model as `kind: frozen`"
            )

    @override
    def check_whole(self, *, field: str, reader: str) -> None:
        raise ConfigError(
            f"{field}.kind=vllm: {reader} reads the whole distributions of this reference, and a server gives the "
            "log-probabilities of given tokens: name the model as `kind: frozen` with its path, or use an objective of "
            "sampled tokens (distillation with level: token)."
        )

    @override
    def build(self, context: BuildContext) -> references.Reference:
        from falign.references import VLLMReference
        from falign.rollouts import PromptScorer

        scorer = PromptScorer(self.url, model=self.model, timeout=self.timeout, wait=self.wait)
        return VLLMReference(scorer, place=context.field)


class OwnReferenceConfig(OwnSection, ReferenceSection, extra="allow"):
    """A reference of your own: ``module:Name``, a subclass of :class:`falign.references.Reference`.

    It is called with ``context`` (:class:`falign.runfile.BuildContext`) and the other keys of the section.
    """

    @override
    def build(self, context: BuildContext) -> references.Reference:
        from falign.references import Reference

        return self.make(REFERENCES, place=context.field, protocol=Reference, context=context)


class PythonReferenceConfig(PythonObject, ReferenceSection):
    """A reference that a program gave as an object, or a function of the policy that makes it."""

    @classmethod
    @override
    def of(cls, value: Any, *, hashed: Any = None, **fields: Any) -> Any:
        """Return the section of a reference or of a function that makes one.

        The code of a reference is that of its class and its plain values; its model is compared by
        ``Reference.identity()``.

        Raises:
            ConfigError: The object is neither, or a reference that moves.
        """
        from torch import nn

        from falign.references import Reference

        if isinstance(value, Reference):
            if value.moves:
                raise ConfigError(
                    f"reference is a {type(value).__name__}, which moves during training, so a resumed run would "
                    "get another object: give a function f(policy) that makes it."
                )
            plain = {name: each for name, each in vars(value).items() if isinstance(each, PLAIN)}
            hashed = functools.partial(type(value), **plain)
        elif isinstance(value, nn.Module):
            raise ConfigError(
                f"reference is a {type(value).__name__}: give FrozenModel(model, "
                "**falign.models.model_identity(model)) of it, or the section dict(kind='frozen', path=...)."
            )
        elif not callable(value):
            raise ConfigError(
                f"reference is a {type(value).__name__}: give a falign.references.Reference, a function f(policy) that "
                "makes one, or the section of a run file as a mapping."
            )
        return super().of(value, hashed=hashed, **fields)

    @override
    def check(self, *, field: str, adapter: bool) -> None:
        self.given(field)

    @override
    def build(self, context: BuildContext) -> references.Reference:
        from falign.references import Reference

        given = self.given(context.field)
        made = given if isinstance(given, Reference) else given(context.policy)
        if not isinstance(made, Reference):
            raise ConfigError(
                f"{context.field}: {self.name} makes a {type(made).__name__}, not a falign.references.Reference."
            )
        model, record = made.own_model, made.identity()
        if model is not None:
            if record.get("weights", record.get("start")) is None:
                raise ConfigError(
                    f"{context.field}: the identity of the {type(made).__name__} has no weights, so a resumed run "
                    "could not check that its model is the same: make it as FrozenModel(model, "
                    "**falign.models.model_identity(model))."
                )
            model.to(context.device)
        return made


PLAIN = (int, float, str, bytes, tuple, frozenset, list, dict)
"""Classes of values that count for the code of a reference: not models, tensors and tokenizers."""

REFERENCES: Registry[Any] = Registry("reference", {}, wanted="subclass of falign.references.Reference")
"""References of a user's own; the built-in kinds are the sections below."""

if TYPE_CHECKING:
    ReferenceConfig = ReferenceSection
else:
    ReferenceConfig = union_of_kinds(
        {
            "auto": AutoReferenceConfig,
            "adapter_off": AdapterOffConfig,
            "frozen": FrozenReferenceConfig,
            "adapter": AdapterReferenceConfig,
            "soup": SoupConfig,
            "moving_average": MovingAverageConfig,
            "periodic_reset": PeriodicResetConfig,
            "reset_on_stall": ResetOnStallConfig,
            "mixture": MixtureConfig,
            "geometric": GeometricConfig,
            "vllm": VLLMReferenceConfig,
            "python": PythonReferenceConfig,
        },
        default="auto",
        own=OwnReferenceConfig,
    )
"""The reference: ``kind`` names one of these; the first is the default."""


def _require_adapter(kind: str, *, field: str, adapter: bool) -> None:
    if not adapter:
        raise ConfigError(
            f"{field}.kind={kind} with adapter=null: all weights are trained, so the base would move with the policy: "
            f"set {field}.kind=frozen."
        )

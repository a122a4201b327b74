"""References inside the policy: its base model without adapter, or with another adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from falign.errors import ModelError
from falign.objectives import TokenWeighting
from falign.references.base import MovingRule, Reference, detached_logprobs, detached_states
from falign.scoring import (
    DEFAULT_CHUNK_TOKENS,
    Adapted,
    CompletionStates,
    Head,
    TokenBatch,
    evaluation_mode,
)

if TYPE_CHECKING:
    from peft import PeftModel

    from falign.scoring import Distribution

__all__ = ["AdapterOff", "AdapterReference", "adapter_acting"]


@dataclass(frozen=True, kw_only=True)
class AdapterOff(Reference):
    """The policy's base model with all adapters off, including a frozen one from supervised tuning.

    Attributes:
        weights: Content hash of the base's weights, for the record.
        starts_as_policy: True if the policy starts equal to its base, with an adapter that changes nothing yet.
        chunk_tokens: Number of positions that reach the head at once.
    """

    weights: str | None = None
    starts_as_policy: bool = False
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS

    @override
    def identity(self) -> dict[str, Any]:
        return {"kind": "adapter_off", "weights": self.weights}

    @override
    def logprobs(self, policy_model: nn.Module, batch: TokenBatch) -> Float[Tensor, "N T"]:
        with self.acting(policy_model):
            return detached_logprobs(policy_model, batch, chunk_tokens=self.chunk_tokens)

    @override
    def states(
        self, policy_model: nn.Module, batch: TokenBatch, *, weighting: TokenWeighting = "none"
    ) -> CompletionStates:
        with self.acting(policy_model):
            states = detached_states(policy_model, batch, weighting=weighting)
        # The head is applied later, when the adapter is on again, so it is wrapped to switch the adapter off.
        own = cast("Distribution", states.distribution)
        return states._replace(distribution=own._replace(head=_without_adapter(own.head)))

    @override
    @contextmanager
    def acting(self, policy_model: nn.Module) -> Iterator[nn.Module]:
        if not isinstance(policy_model, Adapted):
            raise ModelError(
                f"{type(policy_model).__name__} has no adapter to switch off, so the policy would be its own "
                "reference: train a LoRA adapter (peft.get_peft_model), or use a frozen model as reference."
            )
        from falign.models.base_weights import check_base_intact

        check_base_intact(policy_model)
        with _trainable_as_before(policy_model), policy_model.disable_adapter():
            _refuse_trained_base(policy_model)
            yield policy_model


@dataclass(frozen=True, kw_only=True)
class AdapterReference(Reference):
    """The policy's base model with a frozen adapter, held beside the trained one.

    Attributes:
        adapter: The adapter's name in the policy; an adapter named ``ref`` is never exported.
        weights: Content hash of the base and the adapter, for the record.
        path: Folder that the adapter was loaded from, for the record.
        starts_as_policy: True if the policy starts from the same adapter.
        chunk_tokens: Number of positions that reach the head at once.
    """

    adapter: str = "ref"
    weights: str | None = None
    path: str | None = None
    starts_as_policy: bool = False
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS

    @override
    def identity(self) -> dict[str, Any]:
        return {"kind": "adapter", "path": self.path, "weights": self.weights}

    @override
    def logprobs(self, policy_model: nn.Module, batch: TokenBatch) -> Float[Tensor, "N T"]:
        with self.acting(policy_model):
            return detached_logprobs(policy_model, batch, chunk_tokens=self.chunk_tokens)

    @override
    def states(
        self, policy_model: nn.Module, batch: TokenBatch, *, weighting: TokenWeighting = "none"
    ) -> CompletionStates:
        with self.acting(policy_model):
            states = detached_states(policy_model, batch, weighting=weighting)
        # The head is applied later, when the policy's adapter is active again, so it is wrapped to switch adapters.
        own = cast("Distribution", states.distribution)
        head = replace(own.head, embeddings=_HeadUnder(own.head, self.adapter))
        return states._replace(distribution=own._replace(head=head))

    @override
    @contextmanager
    def acting(self, policy_model: nn.Module) -> Iterator[nn.Module]:
        from falign.models.base_weights import check_base_intact

        check_base_intact(policy_model)
        _require_adapter(policy_model, self.adapter)
        with adapter_acting(policy_model, self.adapter):
            _refuse_trained_base(policy_model)
            yield policy_model

    def follow(self, policy_model: nn.Module, rule: MovingRule) -> dict[str, float]:
        """Move the adapter toward the policy's by a rule, and return metrics of the move."""
        return rule.move_adapter(cast("PeftModel", policy_model), self.adapter)

    def tensors(self, policy_model: nn.Module) -> dict[str, Tensor]:
        """Return the adapter's own tensors (no copies), by name."""
        from falign.models.adapter_copies import tensors_of

        return tensors_of(cast("PeftModel", policy_model), self.adapter)


@dataclass(frozen=True)
class _HeadUnder:
    """A head with one fixed adapter, independent of the adapter that is active when it is called."""

    head: Head
    adapter: str

    def __call__(self, hidden: Tensor) -> Tensor:
        layer = self.head.embeddings
        assert isinstance(layer, nn.Module)
        with adapter_acting(layer, self.adapter), evaluation_mode(layer):
            return layer(hidden)


def _without_adapter(head: Head) -> Head:
    from falign.models.structure import without_adapters

    assert isinstance(head.embeddings, nn.Module)
    return replace(head, embeddings=without_adapters(head.embeddings))


@contextmanager
def _trainable_as_before(model: nn.Module) -> Iterator[None]:
    """Restore `requires_grad` on exit: PEFT marks every adapter that it activates as trainable."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)


@contextmanager
def adapter_acting(module: nn.Module, adapter: str) -> Iterator[None]:
    """Activate one adapter, frozen, in place of the active ones, in a model or in one of its layers.

    It works layer by layer, because each PEFT layer has its own active adapters. A layer without this adapter computes
    as in the base.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer, set_adapter
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [
        (layer, [*layer.active_adapters], layer.disable_adapters)
        for layer in module.modules()
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    with _trainable_as_before(module):
        try:
            for layer, _, disabled in layers:
                if disabled:
                    layer.enable_adapters(True)
            set_adapter(module, adapter, inference_mode=True)
            yield
        finally:
            for layer, active, disabled in layers:
                layer.set_adapter(active)
                if disabled:
                    layer.enable_adapters(False)


def _require_adapter(model: nn.Module, adapter: str) -> None:
    """Check that a model has an adapter and does not train it.

    Raises:
        ModelError: The adapter is missing or trained.
    """
    from peft import PeftModel

    known = list(model.peft_config) if isinstance(model, PeftModel) else []
    if adapter not in known:
        raise ModelError(
            f"{type(model).__name__} has no adapter {adapter!r} to be the reference; it has {known}: load one with "
            f"falign.models.load_adapter(model, path, trainable=False, name={adapter!r})."
        )
    trained = [name for name, p in model.named_parameters() if p.requires_grad and f".{adapter}." in name]
    if trained:
        raise ModelError(
            f"{len(trained)} parameters of the reference's adapter {adapter!r} are trained (first: {trained[0]}), so "
            "the reference would move with the policy: freeze them (requires_grad_(False))."
        )


def _refuse_trained_base(model: nn.Module) -> None:
    """Check that no parameter of the base trains, because the base is the reference.

    Raises:
        ModelError: A parameter outside the adapters trains; the message names the first one.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trained:
        raise ModelError(
            f"{len(trained)} parameters outside the adapter are trained (first: {trained[0]}), so with the "
            "adapter off the reference would move with the policy: freeze them, or use a frozen model as "
            "reference."
        )

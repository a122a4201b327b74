"""Which adapters of a model act and which train: switched for a while, and put back exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from falign.errors import ModelError

__all__ = ["adapter_acting", "refuse_trained_base", "require_adapter", "trainable_as_before"]


@contextmanager
def trainable_as_before(model: nn.Module) -> Iterator[None]:
    """Restore on leaving what took gradients: PEFT marks each adapter that it switches on as trainable."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)


@contextmanager
def adapter_acting(module: nn.Module, adapter: str) -> Iterator[None]:
    """Let one adapter act in place of those that do, frozen, in a model or in one of its layers.

    Layer by layer, because PEFT lets each have active adapters of its own. A layer that does not carry the adapter
    acts as in the base.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer, set_adapter
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [
        (layer, [*layer.active_adapters], layer.disable_adapters)
        for layer in module.modules()
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    with trainable_as_before(module):
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


def require_adapter(model: nn.Module, adapter: str) -> None:
    """Raise unless a model carries an adapter that is not trained.

    Raises:
        ModelError: No such adapter, or one that moves with the policy.
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


def refuse_trained_base(model: nn.Module) -> None:
    """Raise if anything trains while no adapter does: it belongs to the base, so to the reference.

    Raises:
        ModelError: With the first such parameter.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trained:
        raise ModelError(
            f"{len(trained)} parameters outside the adapter are trained (first: {trained[0]}), so with the "
            "adapter off the reference would move with the policy: freeze them, or take a frozen model as "
            "reference."
        )

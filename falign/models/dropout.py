"""Dropout of a pretrained model, which is noise in a log-ratio."""

from torch import nn

__all__ = ["disable_dropout"]


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of ``model`` to 0, in modules and in the attributes that attention reads.

    The policy would be scored with it and the reference without, so that log-ratios of several nats are noise before
    the first step. Call it before adapters are added: theirs is a choice of its own.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)

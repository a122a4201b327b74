"""Devices by name."""

import torch

from falign.errors import ConfigError

__all__ = ["named_device"]


def named_device(name: str | torch.device | None) -> torch.device:
    """Return a device; by default the GPU if there is one.

    Raises:
        ConfigError: There is none of that name.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device={str(name)!r} is none: give cpu, cuda or cuda:0, or leave it out.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={str(name)!r} is not there: {torch.cuda.device_count()} GPUs are; leave it out.")
    return device

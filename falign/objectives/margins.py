"""Losses of the margin between the implicit rewards of a chosen and a rejected completion."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from falign.choices import similar
from falign.divergences.base import numbers
from falign.numeric_fields import NumericFields

__all__ = [
    "IPO",
    "MARGIN_LOSSES",
    "Conservative",
    "Exo",
    "MarginLoss",
    "PerTokenLoss",
    "Robust",
    "get_margin_loss",
    "hinge",
    "logistic",
    "squared",
]

MarginLoss = Callable[[Tensor], Tensor]


@runtime_checkable
class PerTokenLoss(Protocol):
    """A margin loss that requires log-ratios per token.

    Attributes:
        per_token_instead_of: The loss of whole completions that error messages recommend.
    """

    @property
    def per_token_instead_of(self) -> str: ...


def logistic(margin: Shaped[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return ``-log σ(m)``: the negative log-likelihood under Bradley-Terry.

    Args:
        margin: ``m``, implicit reward of chosen minus rejected, shape (B,), nats.

    Returns:
        One loss per pair, shape (B,), to be minimized.

    Source:
        Rafailov et al., DPO (arXiv:2305.18290), Eq. 7; Wang et al., f-DPO (arXiv:2309.16240).

    Example:
        >>> logistic(torch.tensor([0.0, 2.0]))
        tensor([0.6931, 0.1269])
    """
    return F.softplus(-numbers(margin, "margin"))


def hinge(margin: Shaped[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return ``max(0, 1 - m)``.

    Args:
        margin: ``m``, implicit reward of chosen minus rejected, shape (B,), nats.

    Returns:
        One loss per pair, shape (B,), to be minimized.

    Source:
        Liu et al., RSO (arXiv:2309.06657), the SLiC loss on normalized likelihoods.

    Example:
        >>> hinge(torch.tensor([0.25, 2.0]))
        tensor([0.7500, 0.0000])
    """
    return torch.relu(1 - numbers(margin, "margin"))


def squared(margin: Shaped[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return ``(m - 1/2)²``: β² times the loss of IPO's Eq. 17, when ``m = β (log u_chosen - log u_rejected)``.

    Args:
        margin: ``m``, implicit reward of chosen minus rejected, shape (B,), nats.

    Returns:
        One loss per pair, shape (B,), to be minimized; beyond ``|m - 1/2| = 1e6`` it continues as the parabola's
        tangent, so that it stays finite where f' grows exponentially.

    Source:
        Azar et al., IPO (arXiv:2310.12036), Eq. 17, with τ = β; scaled by β². The published results use
        :class:`IPO`, with log-ratios per token.

    Example:
        >>> squared(torch.tensor([0.5, 1.5]))
        tensor([0., 1.])
    """
    margin = numbers(margin, "margin")
    # Huber's loss is half the square up to delta, and its tangent beyond.
    return 2 * F.huber_loss(margin, torch.full_like(margin, 0.5), reduction="none", delta=1e6)


@dataclass(frozen=True)
class IPO(NumericFields):
    """``(m/β - 1/(2β))²``: IPO as published, when m comes from log-ratios per token (``length_norm="token"``).

    :class:`falign.objectives.Pairwise` builds it with its own β for ``margin_loss="ipo"``.

    Attributes:
        beta: β, the paper's τ.

    Source:
        Azar et al., IPO (arXiv:2310.12036), Eq. 17. The authors told TRL that the log-ratios are means over
        tokens; this is TRL's ``loss_type="ipo"``.

    Example:
        >>> IPO(beta=0.5)(torch.tensor([1.5]))
        tensor([4.])
    """

    beta: float

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta!r} must be positive and finite.")

    @property
    def per_token_instead_of(self) -> str:
        """Loss of whole completions that error messages recommend."""
        return "squared"

    def __call__(self, margin: Shaped[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Return one loss per pair, shape (B,)."""
        return squared(margin) / self.beta**2


@dataclass(frozen=True)
class Conservative(NumericFields):
    """``-(1-ε) log σ(m) - ε log σ(-m)``: the cross-entropy to labels of which a share ε is flipped.

    The margin that minimizes it is finite, ``log((1-ε)/ε)``: label smoothing keeps a pair from pushing without end.

    Attributes:
        label_smoothing: ε, in [0, 1/2); 0 is the logistic loss.

    Source:
        Mitchell, "A note on DPO with noisy preferences" (2023): conservative DPO, cDPO. TRL 1.16
        ignores ``label_smoothing`` with ``loss_type="sigmoid"``.

    Example:
        >>> Conservative(label_smoothing=0.1)(torch.tensor([1.0]))
        tensor([0.4133])
    """

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(f"conservative needs 0 ≤ label_smoothing < 0.5, got {self.label_smoothing!r}.")

    def __call__(self, margin: Shaped[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Return one loss per pair, shape (B,)."""
        smoothing, margin = self.label_smoothing, numbers(margin, "margin")
        return (1 - smoothing) * F.softplus(-margin) + smoothing * F.softplus(margin)


@dataclass(frozen=True)
class Robust(NumericFields):
    """``(-(1-ε) log σ(m) + ε log σ(-m))/(1-2ε)``: unbiased for the clean loss if a share ε of the labels is flipped.

    Attributes:
        label_noise: ε, in [0, 1/2).

    Source:
        Chowdhury et al., rDPO (arXiv:2403.00409), Eq. 12.

    Example:
        >>> Robust(label_noise=0.1)(torch.tensor([1.0]))
        tensor([0.1883])
    """

    label_noise: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_noise < 0.5:
            raise ValueError(f"robust needs 0 ≤ label_noise < 0.5, got {self.label_noise!r}.")

    def __call__(self, margin: Shaped[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Return one loss per pair, shape (B,); it can be negative."""
        noise, margin = self.label_noise, numbers(margin, "margin")
        return ((1 - noise) * F.softplus(-margin) - noise * F.softplus(margin)) / (1 - 2 * noise)


@dataclass(frozen=True)
class Exo(NumericFields):
    """``KL(p_m‖p_ε)`` with ``p_m = (σ(m), σ(-m))`` and ``p_ε = (1-ε, ε)``: the reverse KL to the smoothed labels.

    Attributes:
        label_smoothing: ε, in (0, 1/2).

    Source:
        Ji et al., EXO (arXiv:2402.00856), Eq. 16, with two completions.

    Example:
        >>> Exo(label_smoothing=0.25)(torch.tensor([0.0]))
        tensor([0.1438])
    """

    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        if not 0.0 < self.label_smoothing < 0.5:
            raise ValueError(f"exo needs 0 < label_smoothing < 0.5, got {self.label_smoothing!r}.")

    def __call__(self, margin: Shaped[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Return one loss per pair, shape (B,)."""
        # Beyond 100 nats σ(-|m|) is below the smallest float32, which would lead to 0 · inf.
        m = torch.clamp(numbers(margin, "margin"), -100.0, 100.0)
        to_chosen = F.logsigmoid(m) - math.log1p(-self.label_smoothing)
        to_rejected = F.logsigmoid(-m) - math.log(self.label_smoothing)
        return torch.sigmoid(m) * to_chosen + torch.sigmoid(-m) * to_rejected


MARGIN_LOSSES: dict[str, MarginLoss | type[Conservative] | type[Robust] | type[Exo]] = {
    "logistic": logistic,
    "hinge": hinge,
    "squared": squared,
    "conservative": Conservative,
    "robust": Robust,
    "exo": Exo,
}
ALIASES = {"sigmoid": "logistic", "cdpo": "conservative", "exo_pair": "exo"}


def get_margin_loss(name: str) -> MarginLoss:
    """Return a margin loss by name.

    Args:
        name: ``logistic``, ``hinge``, ``squared``, ``conservative``, ``robust``, ``robust(0.2)``, ``exo``,
            ``exo(0.01)``; ``cdpo``, and TRL's ``sigmoid`` and ``exo_pair``, are accepted.

    Returns:
        The loss.

    Raises:
        ValueError: The name is unknown, its parameter is out of range, or it is ``ipo``, which needs β.

    Example:
        >>> get_margin_loss("robust(0.2)")
        Robust(label_noise=0.2)
    """
    match = re.fullmatch(r"\s*([a-z_]+)\s*(?:\((.*)\))?\s*", name)
    key = ALIASES.get(match[1], match[1]) if match else name
    if key == "ipo":
        raise ValueError(
            f"margin_loss {name!r} needs log-ratios per token and beta: use it as margin_loss of a pairwise objective, "
            "or build IPO(beta); 'squared' is the loss of whole completions."
        )
    if match is None or key not in MARGIN_LOSSES:
        close = similar(key, [*MARGIN_LOSSES, *ALIASES, "ipo"], cutoff=0.5)
        hint = f"did you mean {close!r}? Choose" if close else "choose"
        raise ValueError(f"margin_loss {name!r} is unknown; {hint} one of {', '.join(MARGIN_LOSSES)}, ipo.")
    loss = MARGIN_LOSSES[key]
    if inspect.isclass(loss):
        return loss() if match[2] is None else loss(_number(match[2], name, key))
    if match[2] is not None:
        raise ValueError(f"margin_loss {name!r}: {key} takes no parameter.")
    return loss


def _number(text: str, name: str, key: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"margin_loss {name!r}: {text!r} is not a number; write {key}(0.1).") from None

"""Methods whose coefficients change during training: SAFE's core, TCOD, Correlated Proxies, ProRL."""

from __future__ import annotations

from falign.divergences import Divergence, PearsonChi2, ReverseKL, resolve
from falign.methods.core import grpo, require_positive
from falign.numeric_fields import numeric_arguments
from falign.objectives.controllers import RootDivergence, TargetDivergence
from falign.objectives.distillation import TEACHER, Distillation
from falign.objectives.groups import CompletionMean
from falign.objectives.measures import Entropy
from falign.objectives.penalty import Level
from falign.objectives.policy_gradient import PolicyGradient
from falign.objectives.schedules import Scheduled, Stairs
from falign.objectives.sum import Sum
from falign.objectives.token_gates import FirstTokens

__all__ = ["SAFE", "TCOD", "CorrelatedProxies", "ProRL"]


@numeric_arguments
def SAFE(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "reverse_kl",
    *,
    target: float = 2.0,
    start: float = 0.1,
    gain: float = 0.1,
    smoothing: float = 0.9,
    entropy: float = 0.01,
    clip: float = 0.2,
    level: Level = "token",
) -> Sum:
    """Return SAFE's core: PPO whose β holds ``D_f(π‖π_ref)`` at a target, and an entropy bonus.

    ``ppo``: :class:`PolicyGradient` with a value head, β from :class:`TargetDivergence`. ``entropy``: ``-c Σ_t H_t``.
    The double soft-min critic is the section ``critic`` of a run: ``{heads: 2, soft_min: 0.3, polyak: 0.05}``.

    Args:
        divergence: f, or its name.
        target: The divergence to hold, in nats per completion.
        start: The first β.
        gain: See :class:`TargetDivergence`.
        smoothing: Weight of the former mean of the divergence.
        entropy: c, weight of the entropy of the next-token distributions on the policy's samples.
        clip: Both clips of ``π/π_old``.
        level: Level of the penalty; see :class:`PolicyGradient`.

    Returns:
        The objective.

    Raises:
        ValueError: The divergence is unknown, or a number is out of range.

    Source:
        Maity, SAFE (arXiv:2602.04651). Its published penalty is a plain number added to the loss, without a gradient,
        and its PID controller follows the reward; here β has the gradient that the paper describes. The bonus, the
        clips and the smoothing are those of its code. Its preview of the KL, which scales steps, is left out.

    Example:
        >>> sorted(SAFE().controllers)
        ['ppo.beta']
    """
    ppo = PolicyGradient(
        resolve(divergence),
        start,
        "gae",
        clip_low=clip,
        clip_high=clip,
        importance="token",
        level=level,
        reduction="token_mean",
    )
    held = Scheduled(ppo, {"beta": TargetDivergence(target, start, gain, smoothing)})
    require_positive(entropy=entropy)
    return Sum({"ppo": held, "entropy": (Distillation(Entropy(), importance="token"), -entropy)})


@numeric_arguments
def TCOD(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "reverse_kl",
    *,
    unit: int = 16,
    every: int = 6,
    longest: int = 256,
    reference: str = TEACHER,
    reduction: CompletionMean = "token_mean",
) -> Scheduled:
    """Return TCOD's f2b: on-policy distillation of the first ``unit · (1 + floor(step/every))`` tokens.

    To not even sample the others, give the run ``rollout.horizon: {start: unit, by: unit, every: every}``.

    Args:
        divergence: f, or its name; the paper has the reverse KL.
        unit: Tokens of a unit; the paper's unit is a turn.
        every: Optimizer steps between two growths of the horizon.
        longest: Largest horizon, in tokens.
        reference: Name of the teacher.
        reduction: See :func:`completion_term`.

    Returns:
        The objective.

    Raises:
        ValueError: The divergence is unknown, or a number is out of range.

    Source:
        Wang et al., TCOD (arXiv:2604.24005): f2b with k = 6 (5 in the code's default) and the advantage
        ``log T - log π_old`` of each token, which is the reverse KL at level ``"token"``. Turns are tokens here; b2f,
        which replays an expert's turns, is left out.

    Example:
        >>> growing = TCOD(unit=16, every=6)
        >>> [growing.at(step).weights[0].tokens for step in (0, 5, 6, 1000)]
        [16, 16, 32, 256]
    """
    distillation = Distillation(
        resolve(divergence),
        reference,
        "token",
        importance="token",
        reduction=reduction,
        weights=(FirstTokens(unit),),
    )
    return Scheduled(distillation, {"weights.0.tokens": Stairs(unit, longest, by=unit, every=every)})


@numeric_arguments
def CorrelatedProxies(  # noqa: N802 - the name of the paper
    divergence: Divergence | str | None = None,
    *,
    strength: float,
    floor: float = 1e-4,
    smoothing: float = 0.9,
    advantage: str = "leave_one_out",
    clip: float | None = None,
) -> Scheduled:
    """Return the objective ``E_π[r] - λ √χ²(π‖π_ref)``, by a χ² penalty with ``β_t = λ / (2 √χ²)``.

    Args:
        divergence: Another f, or its name; the Pearson χ² by default.
        strength: λ, in units of reward: ``σ √(1 - ρ²)`` for a proxy reward of deviation σ and correlation ρ with the
            true one under the reference.
        floor: See :class:`RootDivergence`.
        smoothing: Weight of the former mean of χ².
        advantage: See :class:`PolicyGradient`.
        clip: Both clips of ``π/π_old``; None for none.

    Returns:
        The objective.

    Raises:
        ValueError: A name is unknown, or a number is out of range.

    Source:
        Laidlaw et al., Correlated Proxies (arXiv:2403.03185), who call it ORPO. Their RLHF code takes the root of the
        batch's ``mean(u + 1/u - 2)`` in the loss, whose gradient is half that of χ² plus that of the forward KL, with
        PPO and a clip of 0.4; here the gradient is that of the root of the running mean.

    Example:
        >>> CorrelatedProxies(strength=0.5).at(0).divergence.name
        'pearson_chi2'
    """
    f = PearsonChi2() if divergence is None else resolve(divergence)
    penalized = PolicyGradient(f, 1.0, advantage, clip_low=clip, clip_high=clip)
    return Scheduled(penalized, {"beta": RootDivergence(strength, floor, smoothing)})


@numeric_arguments
def ProRL(  # noqa: N802 - the paper's name
    divergence: Divergence | str | None = None,
    beta: float = 1e-3,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.4,
    level: Level = "token",
) -> PolicyGradient:
    """Return ProRL's objective: GRPO with two clips and a penalty, for a reference that is reset when rewards stall.

    The reset is the reference: ``{kind: reset_on_stall, patience: ..., metric: pass@1}``. Dynamic sampling is
    ``rollout.difficulty``.

    Args:
        divergence: f, or its name; the reverse KL by default.
        beta: β; the paper's value is not settled.
        clip_low: See :class:`PolicyGradient`.
        clip_high: See :class:`PolicyGradient`.
        level: Level of the penalty.

    Returns:
        The objective.

    Raises:
        ValueError: The divergence is unknown, or a number is out of range.

    Source:
        Liu et al., ProRL (arXiv:2505.24864).

    Example:
        >>> ProRL().clip_high
        0.4
    """
    f = ReverseKL() if divergence is None else divergence
    return grpo(f, beta, clip_low=clip_low, clip_high=clip_high, level=level, reduction="token_mean")

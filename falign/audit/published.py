"""Formulas of papers and of their code, written out as functions of log-probabilities.

Names and signs are those of the source: a loss is minimized; a penalty is subtracted from the reward. Clamps that act
only far from the reference (beyond 10 nats) are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from falign import divergences
from falign.divergences import Divergence

__all__ = [
    "chi_po",
    "chi_squared_penalty",
    "dph_rl_alpha",
    "dph_rl_definition",
    "dph_rl_forward",
    "dph_rl_js",
    "dph_rl_mixture",
    "dph_rl_reverse",
    "forward_kl_over_vocabulary",
    "h_dpo",
    "k1",
    "k1_weighted",
    "k2",
    "k2_weighted",
    "k3",
    "k3_of_reference_samples",
    "k3_style_chi_squared",
    "k3_weighted",
    "kdrl",
    "negative_log_likelihood",
    "on_policy_distillation",
    "oreal_kl",
    "policy_to_mixture",
    "reference_to_mixture",
    "reranking",
    "safe",
    "simpo",
    "tcod_jsd",
    "value_estimate",
    "value_with_control_variate",
]

PerToken = Float[Tensor, "..."]


def k1(logprobs: PerToken, reference_logprobs: PerToken) -> PerToken:
    """Return ``log u``, whose mean over samples of π is the reverse KL. Source: Schulman 2020."""
    return logprobs - reference_logprobs


def k2(logprobs: PerToken, reference_logprobs: PerToken) -> PerToken:
    """Return ``(log u)²/2``. Source: Schulman 2020."""
    return (logprobs - reference_logprobs).square() / 2


def k3(logprobs: PerToken, reference_logprobs: PerToken) -> PerToken:
    """Return ``1/u - 1 + log u``. Source: Schulman 2020; Shao et al., GRPO (arXiv:2402.03300), Eq. 4."""
    return torch.expm1(reference_logprobs - logprobs) + logprobs - reference_logprobs


def k1_weighted(logprobs: PerToken, reference_logprobs: PerToken, old_logprobs: PerToken) -> PerToken:
    """Return ``π/π_old`` times k1, differentiated through both factors."""
    return (logprobs - old_logprobs).exp() * k1(logprobs, reference_logprobs)


def k2_weighted(logprobs: PerToken, reference_logprobs: PerToken, old_logprobs: PerToken) -> PerToken:
    """Return ``π/π_old``, a constant, times k2."""
    return (logprobs - old_logprobs).exp().detach() * k2(logprobs, reference_logprobs)


def k3_weighted(logprobs: PerToken, reference_logprobs: PerToken, old_logprobs: PerToken) -> PerToken:
    """Return ``π/π_old`` times k3, differentiated through both. Source: DeepSeek-V3.2 (arXiv:2512.02556)."""
    return (logprobs - old_logprobs).exp() * k3(logprobs, reference_logprobs)


def k3_of_reference_samples(logprobs: PerToken, reference_logprobs: PerToken) -> PerToken:
    """Return ``u - 1 - log u``: k3 with its arguments swapped, for samples of the reference."""
    return k3(reference_logprobs, logprobs)


def value_estimate(divergence: str) -> Callable[..., Tensor]:
    """Return ``f(u)/u``, which estimates D_f on samples of π, as a penalty of each token.

    Source:
        The PPO baseline of f-DPO (arXiv:2309.16240, ``ppo/trainer.py``), with ``--kl_in_reward True``.
    """

    def penalty(logprobs: PerToken, reference_logprobs: PerToken) -> PerToken:
        log_u = logprobs - reference_logprobs
        return divergences.get(divergence).f(log_u) / log_u.exp()

    return penalty


def value_with_control_variate(divergence: str) -> Callable[..., Tensor]:
    """Return ``f(u)/u`` in normal form, differentiated: the control variate is what makes f'(1) = 0.

    Source:
        The PPO baseline of f-DPO (arXiv:2309.16240, ``ppo/trainer.py``), without ``--kl_in_reward``.
    """
    return value_estimate(divergence)


def dph_rl_forward(logprobs: PerToken, reference_logprobs: PerToken) -> PerToken:
    """Return DPH-F on stored samples of the reference: k3 with swapped arguments. Source: arXiv:2509.07430, code."""
    return k3_of_reference_samples(logprobs, reference_logprobs)


def dph_rl_js(logprobs: PerToken, reference_logprobs: PerToken) -> PerToken:
    """Return ``js_low_var`` on stored samples: ``u log u - (u+1) log((u+1)/2)``. Source: arXiv:2509.07430, code."""
    log_u = logprobs - reference_logprobs
    u = log_u.exp()
    return u * log_u - (u + 1) * ((u + 1) / 2).log()


def dph_rl_alpha(alpha: float = 0.2) -> Callable[..., Tensor]:
    """Return ``(u^{1-α} - (1-α)u - α)/(α(α-1))``, on stored samples. Source: arXiv:2509.07430, code."""

    def loss(logprobs: PerToken, reference_logprobs: PerToken) -> PerToken:
        u = (logprobs - reference_logprobs).exp()
        return (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))

    return loss


def _log_mixture(logprobs: PerToken, other: PerToken, weight: float = 0.5) -> PerToken:
    return torch.logaddexp(logprobs + math.log(weight), other + math.log1p(-weight))


def reference_to_mixture() -> Divergence:
    """Return ``KL(π_ref‖M)``, ``M = (π + π_ref)/2``, as a divergence of π to π_ref."""
    return divergences.from_generator(lambda u: (u - 1) / 2 - ((u + 1) / 2).log(), name="kl_of_reference_to_mixture")


def policy_to_mixture() -> Divergence:
    """Return ``KL(π‖M)``, ``M = (π + π_ref)/2``, as a divergence of π to π_ref."""
    return divergences.from_generator(
        lambda u: u * (2 * u / (u + 1)).log() - (u - 1) / 2, name="kl_of_policy_to_mixture"
    )


def dph_rl_definition(logprobs: PerToken, reference_logprobs: PerToken) -> PerToken:
    """Return the half of mode ``js`` on stored samples: k3 of ``KL(π_ref‖M)``. Source: arXiv:2509.07430, code."""
    return k3(reference_logprobs, _log_mixture(logprobs, reference_logprobs))


def dph_rl_mixture(logprobs: PerToken, reference_logprobs: PerToken) -> PerToken:
    """Return the half of mode ``js`` on samples of π: k3 of ``KL(π‖M)``, as a loss. Source: arXiv:2509.07430, code."""
    return k3(logprobs, _log_mixture(logprobs, reference_logprobs))


def dph_rl_reverse(logprobs: PerToken, reference_logprobs: PerToken) -> PerToken:
    """Return the loss of mode ``reverse_kl``: verl's k3. Source: arXiv:2509.07430, code."""
    return k3(logprobs, reference_logprobs)


def k3_style_chi_squared(logprobs: PerToken, reference_logprobs: PerToken) -> PerToken:
    """Return ``u + 1/u - 2``, whose mean over samples of π is χ². Source: arXiv:2403.03185, code of its RLHF part.

    Their loss is λ times the square root of a batch's mean, which has the direction of this term's gradient.
    """
    log_u = logprobs - reference_logprobs
    return log_u.exp() + (-log_u).exp() - 2


def chi_squared_penalty(logprobs: PerToken, reference_logprobs: PerToken) -> PerToken:
    """Return ``u - 1``, the penalty of option ``chi2``. Source: arXiv:2403.03185, code of its RL part."""
    return torch.expm1(logprobs - reference_logprobs)


def tcod_jsd(beta: float = 0.5) -> Callable[..., Tensor]:
    """Return minus the advantage ``β(log T - log M) + (1-β)(log π - log M)``, ``M = βT + (1-β)π``.

    Source:
        ``jsd_advantage`` of TCOD (arXiv:2604.24005), code; each token has its own advantage.
    """

    def penalty(logprobs: PerToken, teacher_logprobs: PerToken) -> PerToken:
        mixture = _log_mixture(teacher_logprobs, logprobs, beta)
        return -(beta * (teacher_logprobs - mixture) + (1 - beta) * (logprobs - mixture))

    return penalty


def on_policy_distillation(scale: float = 1.0) -> Callable[..., Tensor]:
    """Return minus the advantage ``-[log π - log base - λ(log T - log base)]`` of each token.

    Source:
        G-OPD (arXiv:2602.12125), code: λ = 1 is on-policy distillation (also TCOD's ``log T - log old``), λ = 1.25
        ExOPD.
    """

    def penalty(logprobs: PerToken, teacher_logprobs: PerToken, base_logprobs: PerToken) -> PerToken:
        return logprobs - base_logprobs - scale * (teacher_logprobs - base_logprobs)

    return penalty


def kdrl(logprobs: PerToken, teacher_logprobs: PerToken) -> PerToken:
    """Return k2 to the teacher, as a loss on the student's samples. Source: KDRL (arXiv:2506.02208)."""
    return k2(logprobs, teacher_logprobs)


def oreal_kl(logprobs: PerToken, reference_logprobs: PerToken) -> PerToken:
    """Return ``log π_ref - log π``, the option ``kl``. Source: OREAL (arXiv:2502.06781), code."""
    return reference_logprobs - logprobs


def safe(logprobs: Float[Tensor, "N T"], reference_logprobs: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Return the policy loss with advantages of 0, plus a penalty that is a plain number.

    Source:
        SAFE (arXiv:2602.04651), code: ``0.1 (KL - 0.3)₊²`` with ``KL`` from ``kl.item()``.
    """
    policy_loss = -0.0 * (logprobs - logprobs.detach()).exp()
    excess = max((logprobs - reference_logprobs).mean().item() - 0.05, 0.0)
    return policy_loss + 0.1 * excess**2


def forward_kl_over_vocabulary(
    vocabulary_logprobs: Float[Tensor, "N T V"], reference_vocabulary_logprobs: Float[Tensor, "N T V"]
) -> Float[Tensor, "N T"]:
    """Return ``KL(π_ref‖π)`` at each position. Source: SuperHF (arXiv:2310.16763), code; TDPO (arXiv:2404.11999)."""
    return (reference_vocabulary_logprobs.exp() * (reference_vocabulary_logprobs - vocabulary_logprobs)).sum(dim=-1)


def reranking(order: str) -> Callable[..., Tensor]:
    """Return the Plackett–Luce loss of the teacher's ranking of all tokens.

    Args:
        order: ``"prefix"``: with log-sum-exp over the tokens ranked before, as in the code, which is the likelihood of
            the reversed ranking. ``"suffix"``: over the tokens ranked after, the likelihood of the ranking itself.

    Source:
        TSD-KD (arXiv:2603.13260), code.
    """

    def loss(
        vocabulary_logprobs: Float[Tensor, "N T V"], reference_vocabulary_logprobs: Float[Tensor, "N T V"]
    ) -> Float[Tensor, "N T"]:
        best_first = reference_vocabulary_logprobs.argsort(dim=-1, descending=True)
        ranked = vocabulary_logprobs.gather(-1, best_first)
        if order == "prefix":
            return (ranked.logcumsumexp(dim=-1) - ranked).sum(dim=-1)
        return (ranked.flip(-1).logcumsumexp(dim=-1).flip(-1) - ranked).sum(dim=-1)

    return loss


def negative_log_likelihood(logprobs: PerToken) -> PerToken:
    """Return ``-log π``: supervised fine-tuning."""
    return -logprobs


def chi_po(
    chosen_logprobs: Float[Tensor, " P"],
    rejected_logprobs: Float[Tensor, " P"],
    reference_chosen_logprobs: Float[Tensor, " P"],
    reference_rejected_logprobs: Float[Tensor, " P"],
) -> Float[Tensor, " P"]:
    """Return ``-log σ`` of the margin of ``β (u + log u)``. Source: χPO (arXiv:2407.13399), without the clip."""
    chosen, rejected = chosen_logprobs - reference_chosen_logprobs, rejected_logprobs - reference_rejected_logprobs
    return -F.logsigmoid(0.1 * (chosen.exp() + chosen - rejected.exp() - rejected))


def h_dpo(
    chosen_logprobs: Float[Tensor, " P"],
    rejected_logprobs: Float[Tensor, " P"],
    reference_chosen_logprobs: Float[Tensor, " P"],
    reference_rejected_logprobs: Float[Tensor, " P"],
) -> Float[Tensor, " P"]:
    """Return ``-log σ`` of the margin of ``β (a log π - log π_ref)``, a = 0.95. Source: H-DPO (arXiv:2411.07595)."""
    chosen = 0.95 * chosen_logprobs - reference_chosen_logprobs
    return -F.logsigmoid(0.1 * (chosen - 0.95 * rejected_logprobs + reference_rejected_logprobs))


def simpo(
    chosen_logprobs: Float[Tensor, "P T"],
    rejected_logprobs: Float[Tensor, "P T"],
    chosen_mask: Bool[Tensor, "P T"],
    rejected_mask: Bool[Tensor, "P T"],
) -> Float[Tensor, " P"]:
    """Return ``-log σ(β (mean log π_w - mean log π_l) - γ)``. Source: SimPO (arXiv:2405.14734), Eq. 6."""
    chosen = chosen_logprobs.sum(dim=-1) / chosen_mask.sum(dim=-1)
    rejected = rejected_logprobs.sum(dim=-1) / rejected_mask.sum(dim=-1)
    return -F.logsigmoid(2.0 * (chosen - rejected) - 1.0)

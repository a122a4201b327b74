"""Methods on groups of samples: DisCO, best-of-n distillation, SuperHF and OREAL."""

from __future__ import annotations

from collections.abc import Sequence

from falign.divergences import Divergence, resolve
from falign.methods.core import require_positive
from falign.numeric_fields import numeric_arguments
from falign.objectives.base import Objective
from falign.objectives.cloning import Cloning
from falign.objectives.discriminative import Discriminative, Score, TrustRegion
from falign.objectives.distillation import Distillation
from falign.objectives.groups import CompletionMean
from falign.objectives.penalty import Level
from falign.objectives.sum import Sum
from falign.objectives.weights import TokenWeight

__all__ = ["OREAL", "BestOfN", "DisCO", "SuperHF"]

DISCO_TAU: dict[Score, float] = {"log_likelihood": 10.0, "ratio": 1.0}


@numeric_arguments
def DisCO(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "reverse_kl",
    beta: float = 500.0,
    *,
    score: Score = "log_likelihood",
    basic: bool = False,
    tau: float | None = None,
    delta: float = 1e-4,
    pass_reward: float = 1.0,
) -> Sum:
    """Return DisCO: scores of passed against failed samples, plus ``β [D_f(π_old‖π) - δ]₊²`` per token.

    Args:
        divergence: f of the trust region, or its name; the reverse KL is ``KL(π_old‖π)``, as in the paper.
        beta: β. The published code has 1000 on half this gradient.
        score: ``"log_likelihood"`` (log-L) or ``"ratio"`` (L-ratio).
        basic: True for DisCO-b, the plain mean over failed samples.
        tau: τ; None is the published 10 for log-likelihoods and 1 for ratios.
        delta: δ, nats per token.
        pass_reward: The lowest reward that passes.

    Returns:
        The sum of ``disco`` and ``trust``.

    Raises:
        ValueError: ``tau`` is given with ``basic``, a name is unknown, or a number is out of range.

    Source:
        Li et al., DisCO (arXiv:2505.12366). The scripts of their code for DisCO-b select another variant, whose
        function does not accept the argument τ. The trust region is over a whole optimizer step, and its
        estimate is never negative.

    Example:
        >>> DisCO(score="ratio").objectives["disco"].tau
        1.0
    """
    if basic and tau is not None:
        raise ValueError(f"tau={tau!r} with basic=True: DisCO-b has no τ; leave one of them out.")
    temperature = None if basic else DISCO_TAU.get(score) if tau is None else tau
    return Sum(
        {
            "disco": Discriminative(score, temperature, pass_reward),
            "trust": TrustRegion(resolve(divergence), beta, delta),
        }
    )


@numeric_arguments
def BestOfN(reduction: CompletionMean = "token_mean") -> Cloning:  # noqa: N802 - a noun phrase as a name
    """Return best-of-n distillation: cloning of the sample with the highest reward of each prompt.

    Args:
        reduction: See :func:`completion_term`; ``"sequence_sum"`` has the best-of-n law as its optimum for samples of a
            frozen policy.

    Returns:
        The objective; n is ``rollout.completions``.

    Raises:
        ValueError: The reduction is unknown.

    Source:
        The first half of Mukobi et al., SuperHF (arXiv:2310.16763).

    Example:
        >>> BestOfN().completions
        'best'
    """
    return Cloning("best", reduction=reduction)


@numeric_arguments
def SuperHF(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "forward_kl",
    beta: float = 0.35,
    *,
    level: Level = "vocabulary",
    reduction: CompletionMean = "token_mean",
) -> Sum:
    """Return SuperHF: cloning of the best sample of each prompt, plus ``β D_f(π‖π_ref)``.

    Args:
        divergence: f, or its name; the published code has the forward KL, ``KL(π_ref‖π)``.
        beta: β, strength of the prior.
        level: Level of the divergence; see :class:`Distillation`.
        reduction: Reduction of the cloning, and of the divergence below sequence level.

    Returns:
        The sum of ``cloning`` and ``prior``.

    Raises:
        ValueError: The divergence is unknown, or a choice is; or β is not positive and finite.

    Source:
        Mukobi et al., SuperHF (arXiv:2310.16763). The code computes the divergence only at the best samples, from
        logits one position off, and sums it over the samples of a micro-batch; here it is the mean over all
        samples of the policy, at the positions that predict their tokens. Its penalty by the inverse of the
        loss is left out.

    Example:
        >>> SuperHF("jensen_shannon", 0.1).weights
        {'cloning': 1.0, 'prior': 0.1}
    """
    require_positive(beta=beta)
    whole: CompletionMean = "sequence_sum" if level == "sequence" else reduction
    prior = Distillation(resolve(divergence), "reference", level, reduction=whole)
    return Sum({"cloning": Cloning("best", reduction=reduction), "prior": (prior, beta)})


@numeric_arguments
def OREAL(  # noqa: N802 - the paper's name
    divergence: Divergence | str = "reverse_kl",
    beta: float = 0.01,
    *,
    failed_weight: float = 0.5,
    passed_token_weights: Sequence[TokenWeight] = (),
    failed_token_weights: Sequence[TokenWeight] = (),
    level: Level = "token",
    pass_reward: float = 1.0,
) -> Sum:
    """Return OREAL's two halves: cloning of passed samples, and a policy gradient on failed ones, with RLOO advantages.

    Args:
        divergence: f of the penalty to the reference, or its name.
        beta: β of the penalty; 0 leaves it out.
        failed_weight: Weight of the failed half.
        passed_token_weights: Factors of each token of passed samples, in place of the paper's ``w⁺``.
        failed_token_weights: Factors of each token of failed samples, in place of the paper's ``w⁻``.
        level: Level of the penalty; see :class:`Distillation`.
        pass_reward: The lowest reward that passes.

    Returns:
        The sum of ``passed``, ``failed`` and ``prior``; each half is a mean over its own tokens of the step.

    Raises:
        ValueError: A name is unknown or a number is out of range.

    Source:
        Lyu et al., OREAL (arXiv:2502.06781). Left out: the token reward model, which is trained beside the policy and
        gives the weights of tokens, and its selection of one passed and one failed sample per prompt. Their penalty is
        the k3 estimate as a loss, which has the gradient of the forward KL; here it is that of the divergence named.

    Example:
        >>> OREAL().weights
        {'passed': 1.0, 'failed': 0.5, 'prior': 0.01}
    """
    require_positive(failed_weight=failed_weight, **({} if beta == 0 else {"beta": beta}))
    terms: dict[str, Objective | tuple[Objective, float]] = {
        "passed": Cloning("passed", pass_reward, "leave_one_out", passed_token_weights),
        "failed": (Cloning("failed", pass_reward, "leave_one_out", failed_token_weights), failed_weight),
    }
    if beta != 0:
        terms["prior"] = (Distillation(resolve(divergence), "reference", level), beta)
    return Sum(terms)

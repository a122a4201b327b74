"""The divergence of a policy from its reference, by every estimator that the samples allow.

``falign.divergences.estimators`` has the formulas; here are their means over completions, with intervals. All of them
are of ``D_f(π‖π_ref)``, over whole completions or summed over tokens. Samples from another distribution than the policy
take importance weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from falign import divergences
from falign.divergences import Divergence, estimators
from falign.divergences.powers import power
from falign.metrics.intervals import Indices, Interval, bootstrap
from falign.metrics.numbers import Array, Numbers, float_array

__all__ = ["DivergenceFromReference", "Samples", "divergence_estimates", "divergence_values"]

Samples = Literal["policy", "reference", "old"]
Rows = Sequence[Numbers]


def divergence_values(
    divergence: Divergence | str,
    logprobs: Rows,
    reference_logprobs: Rows,
    *,
    samples: Samples = "policy",
    old_logprobs: Rows | None = None,
    token_divergences: Rows | None = None,
) -> dict[str, Tensor]:
    """Return one value per completion for each estimator; their means over the samples are divergences.

    With ``u_t = π/π_ref`` of a token, u that of the completion, and w_t, w the weights ``π/π_s`` of the prefix before
    token t and of the whole completion, 1 on the policy's own samples:

    * ``sequence``: ``w f(u)/u``, which is ``f(u)`` on reference samples; ``D_f`` of whole completions.
    * ``token``: ``Σ_t w_t · w(y_t) f(u_t)/u_t``; ``Σ_t D_f(π(·|s_t)‖π_ref(·|s_t))`` on the policy's own prefixes.
    * ``vocabulary``: ``Σ_t w_t D_f(π(·|s_t)‖π_ref(·|s_t))``: the same with less variance, given ``token_divergences``.
    * ``log_ratio``: ``w log u`` for the reverse KL, ``-(w/u) log u`` for the forward KL: ``sequence`` without the terms
      of mean 0 that keep it from being negative. Its variance stays small where u leaves the range of a sample.

    For the KL divergences all four have the same mean; for every other f whole completions have a different mean.

    Args:
        divergence: f, or its name.
        logprobs: For each completion ``log π`` of its tokens, nats.
        reference_logprobs: ``log π_ref`` of the same tokens.
        samples: Their distribution π_s: the ``"policy"``, the ``"reference"``, or an ``"old"`` policy, at temperature 1
            and without truncation.
        old_logprobs: ``log π_old`` of the same tokens, for old samples.
        token_divergences: ``D_f`` over the whole vocabulary at each token, if it was computed.

    Returns:
        By estimator, one value per completion, float64.

    Raises:
        ValueError: Rows of different lengths, NaN or infinite values, ``old_logprobs`` without old samples or the
            reverse, or an unknown distribution.

    Example:
        >>> divergence_values("forward_kl", [[-1.0, -2.0]], [[-1.5, -2.0]])["sequence"]  # -log u/u + 1 - 1/u
        tensor([0.0902], dtype=torch.float64)
    """
    f = divergences.get(divergence) if isinstance(divergence, str) else divergence
    if samples not in ("policy", "reference", "old"):
        raise ValueError(f"samples={samples!r}: the completions come from 'policy', 'reference' or 'old'.")
    if (samples == "old") != (old_logprobs is not None):
        raise ValueError(f"samples={samples!r} {'needs' if samples == 'old' else 'has no use for'} old_logprobs.")
    policy, mask = _padded(logprobs, "logprobs", like=logprobs)
    reference, _ = _padded(reference_logprobs, "reference_logprobs", like=logprobs)
    sampler = {"policy": policy, "reference": reference}.get(samples)
    if sampler is None:
        sampler, _ = _padded([] if old_logprobs is None else old_logprobs, "old_logprobs", like=logprobs)
    log_ratio, log_weight = policy - reference, policy - sampler
    whole, whole_weight = log_ratio.sum(dim=-1), log_weight.sum(dim=-1)
    before = power(log_weight.cumsum(dim=-1) - log_weight)  # w_t: the product over the tokens before t
    values = {
        "sequence": _value(f, whole, whole_weight, samples),
        "token": (before * _value(f, log_ratio, log_weight, samples)).masked_fill(~mask, 0.0).sum(dim=-1),
    }
    if token_divergences is not None:
        per_token, _ = _padded(token_divergences, "token_divergences", like=logprobs)
        values["vocabulary"] = estimators.loss_from_vocabulary(per_token, policy, mask, old_logprobs=sampler)
    if f == divergences.get("reverse_kl"):
        values["log_ratio"] = power(whole_weight) * whole
    if f == divergences.get("forward_kl"):
        values["log_ratio"] = -power(whole_weight - whole) * whole
    return values


def divergence_estimates(
    divergence: Divergence | str,
    logprobs: Rows,
    reference_logprobs: Rows,
    *,
    samples: Samples = "policy",
    old_logprobs: Rows | None = None,
    token_divergences: Rows | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return the means of :func:`divergence_values`, with the same arguments and with intervals over completions.

    If u varies over orders of magnitude, the few completions that dominate the mean may not be sampled. Then estimate
    and interval are too low together. ``vocabulary`` and ``log_ratio`` suffer least.
    """
    values = divergence_values(
        divergence,
        logprobs,
        reference_logprobs,
        samples=samples,
        old_logprobs=old_logprobs,
        token_divergences=token_divergences,
    )
    columns = torch.stack(list(values.values()), dim=-1).numpy()

    def means(index: Indices) -> Array:
        return columns[index].mean(axis=0)

    several = bootstrap(means, len(columns), level=level, seed=seed)
    ends = zip(several.value.tolist(), several.low.tolist(), several.high.tolist(), strict=True)
    return {name: Interval(*each) for name, each in zip(values, ends, strict=True)}


class DivergenceFromReference(evaluate.Metric):
    """:func:`divergence_estimates` of log π (predictions) and log π_ref (references) of completions' tokens."""

    @override
    def _info(self) -> evaluate.MetricInfo:
        row = datasets.List(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="predictions: log-probabilities of each completion's tokens under the policy. "
            "references: the same under the reference. divergence: a name of falign's. samples: which model the "
            "completions come from.",
            features=datasets.Features({"predictions": row, "references": row}),
        )

    @override
    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]: called with the features by name
        self,
        *,
        predictions: Rows,
        references: Rows,
        divergence: str = "reverse_kl",
        samples: Samples = "policy",
        old_logprobs: Rows | None = None,
        token_divergences: Rows | None = None,
        level: float = 0.95,
        seed: int = 0,
    ) -> dict[str, float]:
        estimates = divergence_estimates(
            divergence,
            predictions,
            references,
            samples=samples,
            old_logprobs=old_logprobs,
            token_divergences=token_divergences,
            level=level,
            seed=seed,
        )
        return {key: value for name, each in estimates.items() for key, value in each.entries(name).items()}


def _value(f: Divergence, log_ratio: Tensor, log_weight: Tensor, samples: Samples) -> Tensor:
    if samples == "policy":
        return estimators.value_from_policy(f, log_ratio)
    if samples == "reference":
        return estimators.value_from_reference(f, log_ratio)
    # π/π_old f(u)/u and π_ref/π_old f(u) are equal; compute the one without a huge power of u.
    above = power(log_weight) * estimators.value_from_policy(f, log_ratio.clamp(min=0.0))
    below = power(log_weight - log_ratio) * estimators.value_from_reference(f, log_ratio.clamp(max=0.0))
    return torch.where(log_ratio > 0, above, below)


def _padded(rows: Rows, name: str, *, like: Rows) -> tuple[Tensor, Tensor]:
    """The rows as one tensor padded with zeros, and the mask of their values."""
    if len(rows) != len(like) or len(like) == 0:
        raise ValueError(f"{name} has {len(rows)} completions and logprobs {len(like)}; give one or more of both.")
    arrays = [float_array(row, f"{name}[{i}]") for i, row in enumerate(rows)]
    for i, (row, other) in enumerate(zip(arrays, like, strict=True)):
        if len(row) != len(other) or len(row) == 0:
            raise ValueError(
                f"{name}[{i}] has {len(row)} tokens and logprobs[{i}] {len(other)}; give one or more, and as many."
            )
    padded = torch.zeros(len(arrays), max(map(len, arrays)), dtype=torch.float64)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in arrays])[:, None]
    padded[mask] = torch.from_numpy(np.concatenate(arrays))
    finite = torch.isfinite(padded)
    if not finite.all():
        i, t = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{i}][{t}] is {arrays[i][t]}; it must be finite: every token has a probability above 0."
        )
    return padded, mask

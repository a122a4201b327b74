"""The rule of dtypes and constants, at the one place where objectives get their numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from falign import CompletionBatch, divergences
from falign.objectives import (
    BinaryConstraint,
    DistributionMatching,
    ExponentialReward,
    Hybrid,
    Listwise,
    Pairwise,
    PolicyGradient,
    Rehearsal,
    Supervised,
    TokenPairwise,
)

JS = divergences.get("jensen_shannon")
OBJECTIVES = {
    "pairwise": Pairwise(JS, beta=0.3),
    "listwise": Listwise(JS, beta=0.3),
    "token_pairwise": TokenPairwise(JS, beta=0.3, weighting="activations"),
    "ppo": PolicyGradient(JS, 0.2, "gae", clip_low=0.2, clip_high=0.3, importance="token"),
    "grpo": PolicyGradient(JS, 0.2, "group_normalised", importance="token", level="token", credit="returns"),
    "vocabulary": PolicyGradient(JS, 0.2, level="vocabulary", credit="returns"),
    "distribution_matching": DistributionMatching(JS, ExponentialReward(0.5)),
    "constraint": DistributionMatching(JS, BinaryConstraint()),
    "rehearsal": Rehearsal(JS),
    "hybrid": Hybrid(PolicyGradient(importance="token"), Rehearsal(JS), 0.5),
    "supervised": Supervised(divergences.get("reverse_kl"), 0.5),
}
CARRIES_GRADIENT = {"logprobs", "measures.divergence", "values"}


def batch_with(dtype: torch.dtype = torch.float32, *, graph: bool = False) -> CompletionBatch:
    """Six completions of three prompts; constants are the leaves themselves times 1, so that they can carry a graph."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leaf = -random(6, 5)
    leaf.requires_grad_()

    def constant(value: torch.Tensor) -> torch.Tensor:
        attached = leaf.sum() * 0 + (leaf.sum() - leaf.sum().detach()).to(dtype)
        return value + attached if graph else value

    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[1, 3:] = False
    return CompletionBatch(
        logprobs=leaf,
        completion_mask=mask,
        prompt_index=torch.tensor([0, 0, 1, 1, 2, 2]),
        reference_logprobs=constant(-random(6, 5)),
        old_logprobs=leaf * 1 if graph else leaf.detach().clone(),
        measures={"divergence": random(6, 5) * leaf.square()},
        preference=constant(torch.tensor([1, 0, 0, 1, 1, 0]).to(dtype)),
        rewards=constant(random(6)),
        from_reference=torch.tensor([False, False, False, False, True, True]),
        token_weights=constant(random(6, 5)),
        features=constant(torch.tensor([[1.0], [0.0], [1.0], [1.0], [1.0], [1.0]], dtype=dtype)),
        log_partition=constant(-random(6)),
        values=leaf * 0.5,
        old_values=leaf * 0.5 if graph else (leaf * 0.5).detach(),
    )


def gradient(objective, batch: CompletionBatch) -> torch.Tensor:
    (slope,) = torch.autograd.grad(objective(batch).mean(), batch.logprobs)
    return slope


@pytest.mark.parametrize("name", OBJECTIVES)
def test_constants_that_still_carry_the_graph_change_no_gradient(name):
    objective = OBJECTIVES[name]
    expected = gradient(objective, batch_with())
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient(objective, batch_with(graph=True)), expected)


def test_only_what_carries_the_policys_gradient_keeps_it():
    batch = batch_with(graph=True)
    attached = {name for name, value in batch.tensors().items() if value.requires_grad}
    assert attached == CARRIES_GRADIENT
    filled = replace(batch, advantages=batch.logprobs * 2, baseline=batch.logprobs.sum(dim=-1))
    assert not filled.require("advantages").requires_grad
    assert not filled.require("baseline").requires_grad


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_anything_is_summed(name, dtype):
    objective = OBJECTIVES[name]
    half = batch_with(dtype)
    wide = half.map(lambda tensor: tensor.float() if tensor.dtype == dtype else tensor)
    output, expected = objective(half), objective(wide)
    for term, other in zip(output.terms, expected.terms, strict=True):
        assert term.losses.dtype == torch.float32
        assert torch.equal(term.losses, other.losses)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("name", ["ppo", "grpo", "constraint", "distribution_matching", "pairwise", "token_pairwise"])
def test_integers_and_booleans_are_numbers(name, dtype):
    objective, numbers = OBJECTIVES[name], torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    fields_ = {"rewards": numbers, "features": numbers[:, None], "preference": numbers}
    weights = torch.ones(6, 5)
    base = batch_with()
    expected = objective(replace(base, **fields_, token_weights=weights))
    given = {field: value.to(dtype) for field, value in fields_.items()}
    actual = objective(replace(base, **given, token_weights=weights.to(dtype)))
    assert actual.mean().item() == expected.mean().item()
    assert actual.terms[0].losses.dtype == torch.float32


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("from_reference", torch.tensor([0, 0, 0, 0, 1, 1]), "from_reference.*int64.*bool"),
        ("from_reference", torch.zeros(6), "from_reference.*float32.*bool"),
        ("completion_mask", torch.ones(6, 5), "completion_mask.*float32.*bool"),
        ("completion_mask", torch.ones(6, 5, dtype=torch.long), "completion_mask.*int64.*bool"),
        ("prompt_index", torch.zeros(6), "prompt_index.*float32.*integer"),
        ("prompt_index", torch.zeros(6, dtype=torch.bool), "prompt_index.*bool.*integer"),
        ("rewards", torch.zeros(6, dtype=torch.complex64), "rewards.*complex64"),
    ],
)
def test_a_dtype_that_means_something_else_is_refused_by_name(field, value, message):
    with pytest.raises(TypeError, match=message):
        replace(batch_with(), **{field: value})

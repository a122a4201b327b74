from itertools import pairwise

import pytest
import torch

from falign import CompletionBatch
from falign.objectives import ObjectiveOutput, Term, reduce_terms, total_weights


def test_unequal_shapes_are_refused_with_both_shapes():
    good = {
        "logprobs": torch.zeros(2, 3),
        "completion_mask": torch.ones(2, 3, dtype=torch.bool),
        "prompt_index": torch.zeros(2, dtype=torch.long),
    }
    CompletionBatch(**good)
    for name, value in {
        "reference_logprobs": torch.zeros(2, 1),
        "token_weights": torch.ones(2),
        "completion_mask": torch.ones(2, 2, dtype=torch.bool),
        "preference": torch.zeros(1),
        "features": torch.zeros(2),
        "values": torch.zeros(2, 4),
        "prompt_index": torch.zeros(3, dtype=torch.long),
    }.items():
        # The annotations are checked too under the test flags; what users see is the ValueError.
        with pytest.raises((ValueError, TypeError), match=name):
            CompletionBatch(**{**good, name: value})


def test_mean_of_two_terms_keeps_their_denominators_apart():
    output = ObjectiveOutput(
        (
            Term(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])),
            Term(torch.tensor([10.0, 20.0, 30.0]), torch.tensor([1.0, 0.0, 1.0]), scale=0.5),
        ),
        {},
    )
    assert output.mean().item() == 2.0 + 0.5 * 20.0


def test_shares_of_micro_batches_add_up_to_the_mean_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    losses, weights = (torch.rand(9, generator=generator, dtype=torch.float64) for _ in range(2))
    whole = (Term(losses, weights, 0.7), Term(losses.square(), torch.ones_like(losses)))
    for cuts in ([9], [4, 5], [1] * 9, [2, 3, 4]):
        parts = [
            tuple(map(lambda term, s=s: Term(term.losses[s], term.weights[s], term.scale), whole)) for s in slices(cuts)
        ]
        denominators = torch.stack([total_weights(part) for part in parts]).sum(0)
        total = sum(reduce_terms(part, denominators) for part in parts)
        assert total.item() == pytest.approx(ObjectiveOutput(whole, {}).mean().item(), rel=1e-14)


def slices(cuts):
    ends = torch.tensor([0, *cuts]).cumsum(0).tolist()
    return [slice(a, b) for a, b in pairwise(ends)]


def test_the_number_of_denominators_is_checked():
    with pytest.raises(ValueError, match="for 1 terms"):
        reduce_terms([Term(torch.zeros(1), torch.ones(1))], torch.ones(2))


def test_a_term_without_weight_counts_as_zero_and_has_no_gradient():
    losses = torch.tensor([2.0, 5.0], requires_grad=True)
    empty = Term(torch.zeros(0), torch.zeros(0))
    output = ObjectiveOutput((Term(losses, torch.zeros(2)), empty, Term(torch.tensor([3.0]), torch.ones(1))), {})
    output.mean().backward()
    assert output.mean().item() == 3.0
    assert reduce_terms(output.terms, total_weights(output.terms)).item() == 3.0
    assert losses.grad.tolist() == [0.0, 0.0]


def test_select_keeps_whole_rows_of_every_field():
    batch = CompletionBatch(
        logprobs=torch.arange(6.0).view(3, 2),
        completion_mask=torch.ones(3, 2, dtype=torch.bool),
        prompt_index=torch.tensor([5, 6, 7]),
        features=torch.arange(9.0).view(3, 3),
        advantages=-torch.arange(6.0).view(3, 2),
        from_reference=torch.tensor([True, False, True]),
    )
    assert batch.from_reference is not None
    kept = batch.select(batch.from_reference)
    assert kept.logprobs.tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert kept.prompt_index.tolist() == [5, 7]
    assert kept.features.tolist() == [[0.0, 1.0, 2.0], [6.0, 7.0, 8.0]]
    assert kept.advantages.tolist() == [[0.0, -1.0], [-4.0, -5.0]]
    assert kept.rewards is None
    assert len(batch.select(torch.zeros(3, dtype=torch.bool)).logprobs) == 0


def test_half_precisions_are_widened_and_others_kept():
    leaf = torch.tensor([[-3e4]], dtype=torch.float16, requires_grad=True)
    batch = CompletionBatch(
        logprobs=leaf,
        completion_mask=torch.ones(1, 1, dtype=torch.bool),
        prompt_index=torch.tensor([0]),
        rewards=torch.ones(1, dtype=torch.float64),
    )
    assert batch.logprobs.dtype == torch.float32
    assert batch.rewards.dtype == torch.float64
    batch.logprobs.sum().backward()
    assert leaf.grad.item() == 1.0

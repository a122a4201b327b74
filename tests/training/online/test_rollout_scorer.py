import math

import pytest
import torch

from falign.errors import EngineError
from falign.rollouts.buffer import padded
from falign.training.online.rollout_scorer import correct, gap_metrics, require_gap

POLICY = [[-1.0, -2.0], [-0.5, -0.25, -3.0]]
SAMPLER = [[-1.5, -1.0], [-2.5, -0.25, -2.9]]


MASK = torch.tensor([[True, True, False], [True, True, True]])


def corrected(**options):
    return correct(padded(POLICY), padded(SAMPLER), MASK, **options)


def weights(found):
    rows = (padded(POLICY) - found.old_logprobs).exp()
    return [row[mask].tolist() for row, mask in zip(rows, MASK, strict=True)]


def test_token_weights_are_the_ratios_to_the_sampler_up_to_the_cap():
    found = corrected(importance="token", cap=1.5)
    expected = [
        [min(math.exp(own - sampled), 1.5) for own, sampled in zip(a, b, strict=True)]
        for a, b in zip(POLICY, SAMPLER, strict=True)
    ]
    for row, wanted in zip(weights(found), expected, strict=True):
        assert row == pytest.approx(wanted)
    assert found.cut.tolist() == [1, 0, 1, 0, 0]


def test_sequence_weights_are_products_up_to_the_cap():
    found = corrected(importance="sequence", cap=3.0)
    assert [math.prod(row) for row in weights(found)] == pytest.approx([math.exp(-0.5), 3.0])
    assert found.cut.tolist() == [0, 1]


def test_the_sampler_itself_is_the_law_where_no_weight_is_cut():
    for importance in ("token", "sequence"):
        found = corrected(importance=importance, cap=100.0)
        for row, mask, sampled in zip(found.old_logprobs, MASK, SAMPLER, strict=True):
            assert row[mask].tolist() == pytest.approx(sampled)
            assert not row[~mask].any()


def test_the_monitor_gives_mean_largest_and_share_outside():
    log_ratio = torch.tensor([0.1, -0.2, 0.7, -0.69, -1.0])
    found = gap_metrics(log_ratio)
    assert found["sampler/logprob_gap"].mean().item() == pytest.approx(2.69 / 5)
    assert found["sampler/logprob_gap_max"].max() == 1.0
    assert found["sampler/ratio_outside"].tolist() == [0, 0, 1, 0, 1]  # e^0.7 > 2 > e^0.69


def test_a_gap_above_the_bound_or_none_at_all_is_refused():
    require_gap(torch.tensor([0.1, -0.1]), 0.11, step=3)
    for log_ratio in (torch.tensor([0.1, -0.2]), torch.tensor([float("nan"), 0.0])):
        with pytest.raises(EngineError, match=r"Step 3: .*rollout.engine.max_gap"):
            require_gap(log_ratio, 0.11, step=3)

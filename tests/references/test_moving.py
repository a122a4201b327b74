import copy

import pytest
import torch

from falign.errors import ModelError
from falign.models.adapter_copies import tensors_of
from falign.models.lora_factors import factors_of
from falign.references import (
    FrozenModel,
    MovingAverage,
    MovingReference,
    PeriodicReset,
    check_same_at_start,
    detached_logprobs,
)
from falign.scoring import completion_scores, pad
from tests.models.tiny import fill_adapter
from tests.scoring.models import TREES, tiny_model, with_lora

BATCH = pad(TREES, pad_token_id=2)
AVERAGE, RESET = MovingAverage(alpha=0.3, every=4), PeriodicReset(every=4)


def adapted(rule):
    policy = with_lora(tiny_model(), trained=True, r=2)
    return policy, MovingReference.beside(policy, rule=rule, weights="abc")


def whole(rule):
    policy = tiny_model()
    return policy, MovingReference(FrozenModel(copy.deepcopy(policy), weights="abc"), rule=rule)


def shift(policy, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                assert ".ref." not in name
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("rule", [AVERAGE, RESET])
@pytest.mark.parametrize("build", [adapted, whole])
def test_it_starts_as_the_policy_and_stays_until_it_is_moved(build, rule):
    policy, reference = build(rule)
    check_same_at_start(policy, reference, BATCH)
    before = reference.logprobs(policy, BATCH)
    shift(policy)
    torch.testing.assert_close(reference.logprobs(policy, BATCH), before, rtol=0, atol=0)
    reference.follow(policy)
    assert (reference.logprobs(policy, BATCH) - before).abs().max() > 1e-3


def test_the_average_of_whole_models_is_the_closed_form():
    policy, reference = whole(AVERAGE)
    expected = {name: p.detach().double() for name, p in policy.named_parameters()}
    for seed in range(5):
        shift(policy, seed)
        reference.follow(policy)
        expected = {n: 0.3 * p.detach().double() + 0.7 * expected[n] for n, p in policy.named_parameters()}
    for name, parameter in reference.held.model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=0, atol=1e-6)
    assert reference.metrics() == {"moves": 5.0}


def test_the_average_of_adapters_is_that_of_the_merged_weights():
    """The oracle is the base with ``W + 0.3 ΔW_1 + 0.7 ΔW_0`` and no adapter at all."""
    policy, reference = adapted(AVERAGE)
    first = copy.deepcopy(factors_of(policy, "default"))
    shift(policy)
    second = factors_of(policy, "default")
    reference.follow(policy)
    oracle = tiny_model().eval()
    with torch.no_grad():
        for name in first:
            delta = 0.7 * first[name].up @ first[name].down + 0.3 * second[name].up @ second[name].down
            oracle.get_submodule(name).weight += delta
        expected = completion_scores(oracle, BATCH).logprobs
    torch.testing.assert_close(reference.logprobs(policy, BATCH), expected, rtol=0, atol=1e-5)
    metrics = reference.metrics()
    assert metrics["moves"] == 1.0
    assert metrics["truncation"] < 1e-6


@pytest.mark.parametrize("build", [adapted, whole])
def test_a_reset_makes_policy_and_reference_one_bit_for_bit(build):
    policy, reference = build(RESET)
    shift(policy)
    reference.follow(policy)
    with torch.no_grad():
        expected = completion_scores(policy.eval(), BATCH).logprobs
    torch.testing.assert_close(reference.logprobs(policy, BATCH), expected, rtol=0, atol=0)
    shift(policy, 2)
    torch.testing.assert_close(reference.logprobs(policy, BATCH), expected, rtol=0, atol=0)


@pytest.mark.parametrize("rule", [AVERAGE, RESET])
@pytest.mark.parametrize("build", [adapted, whole])
def test_what_is_saved_is_gone_on_from_bit_for_bit(build, rule, tmp_path):
    policy, reference = build(rule)
    shift(policy)
    reference.follow(policy)
    measured = reference.metrics()
    reference.save(tmp_path, policy)
    shift(policy, 2)
    expected = reference.logprobs(policy, BATCH)
    reference.follow(policy)
    after = reference.logprobs(policy, BATCH)
    other, anew = build(rule)
    other.load_state_dict({**policy.state_dict(), **{n: t for n, t in other.state_dict().items() if ".ref." in n}})
    anew.load(tmp_path, other)
    assert anew.identity() == {**reference.identity(), "moves": 1}
    assert anew.metrics() == measured
    torch.testing.assert_close(anew.logprobs(other, BATCH), expected, rtol=0, atol=0)
    anew.follow(other)
    torch.testing.assert_close(anew.logprobs(other, BATCH), after, rtol=0, atol=0)


def test_a_state_of_another_reference_is_refused(tmp_path):
    policy, reference = adapted(AVERAGE)
    reference.save(tmp_path, policy)
    other, frozen = whole(AVERAGE)
    with pytest.raises(ModelError, match="is of another reference, only one of them has"):
        frozen.load(tmp_path, other)


def test_the_identity_has_the_rule_the_start_and_the_moves():
    policy, reference = adapted(MovingAverage(alpha=0.3, every=4, rank=5))
    reference.follow(policy)
    assert reference.identity() == {
        **{"kind": "moving_average", "alpha": 0.3, "every": 4, "rank": 5},
        **{"start": "abc", "config": None, "moves": 1},
    }
    _, reset = whole(PeriodicReset(every=7, reset_optimizer=True))
    assert reset.identity() == {
        **{"kind": "periodic_reset", "every": 7, "reset_optimizer": True, "start": "abc", "config": None, "moves": 0}
    }


def test_the_rank_is_four_times_the_policys_or_what_is_asked_for():
    policy, _ = adapted(AVERAGE)
    assert {len(m) for n, m in tensors_of(policy, "ref").items() if "lora_A" in n} == {8}
    policy, _ = adapted(MovingAverage(alpha=0.3, every=4, rank=5))
    assert {len(m) for n, m in tensors_of(policy, "ref").items() if "lora_A" in n} == {5}


def test_16_bit_averages_and_other_models_are_refused():
    policy = tiny_model().bfloat16()
    reference = MovingReference(FrozenModel(copy.deepcopy(policy)), rule=AVERAGE)
    with pytest.raises(ModelError, match=r"is bfloat16, where most moves are smaller than rounding.*float32"):
        reference.follow(policy)
    reference = MovingReference(FrozenModel(tiny_model("gpt2")), rule=AVERAGE)
    with pytest.raises(ModelError, match="not the same model"):
        reference.follow(tiny_model())


def test_rules_refuse_what_is_no_share_and_no_interval():
    for make, message in (
        (lambda: MovingAverage(alpha=0.0, every=1), "alpha=0.0"),
        (lambda: MovingAverage(alpha=1.5, every=1), "alpha=1.5"),
        (lambda: MovingAverage(alpha=0.5, every=0), "every=0"),
        (lambda: PeriodicReset(every=0), "every=0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_an_average_follows_from_an_adapter_that_was_trained_before():
    policy = fill_adapter(with_lora(tiny_model(), r=2, lora_alpha=3, use_rslora=True), scale=0.5)
    reference = MovingReference.beside(policy, rule=AVERAGE)
    expected = detached_logprobs(policy, BATCH)
    torch.testing.assert_close(reference.logprobs(policy, BATCH), expected, rtol=0, atol=1e-5)
    with policy.disable_adapter():
        assert (detached_logprobs(policy, BATCH) - expected).abs().max() > 0.01

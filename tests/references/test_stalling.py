import copy

import pytest
import torch

from falign.errors import ConfigError, TrainingError
from falign.references import FrozenModel, ResetOnStall, StallReset
from falign.scoring import pad
from tests.scoring.models import TREES, tiny_model, with_lora

BATCH = pad(TREES, pad_token_id=2)


def moves_after(rule, values):
    """The numbers of the evaluations after which the reference has moved."""
    policy = tiny_model()
    reference = StallReset(FrozenModel(copy.deepcopy(policy), weights="abc"), rule=rule)
    optimizer, found = torch.optim.AdamW(policy.parameters()), []
    for number, value in enumerate(values):
        reference.observe({"reward": value, "other": -value})
        before = reference.num_moves
        reference.move(policy, number, optimizer)
        found += [number] if reference.num_moves > before else []
        reference.move(policy, number, optimizer)
        assert reference.num_moves == before + (number in found)
    return found


@pytest.mark.parametrize(
    ("rule", "moves"),
    [
        # Best 3 at number 2, then no improvement three times; the value 2.5 at the reset is to be improved on.
        (ResetOnStall(patience=3), [5]),
        (ResetOnStall(patience=1), [3, 4, 7]),
        (ResetOnStall(patience=3, min_improvement=5.0), [3, 6]),
        (ResetOnStall(patience=2, larger_is_better=False), [2, 6]),
        (ResetOnStall(patience=2, metric="other", larger_is_better=False), [4]),
    ],
)
def test_it_moves_after_so_many_evaluations_without_improvement(rule, moves):
    assert moves_after(rule, [1.0, 2.0, 3.0, 3.0, 2.0, 2.5, 2.6, 2.6]) == moves


def test_a_reset_is_a_copy_of_the_policy_and_clears_the_optimizer():
    policy = with_lora(tiny_model(), trained=True, r=2)
    reference = StallReset.beside(policy, rule=ResetOnStall(patience=1), weights="abc")
    trained = [parameter for name, parameter in policy.named_parameters() if ".default." in name]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    sum(parameter.square().sum() for parameter in trained).backward()
    optimizer.step()
    before = reference.logprobs(policy, BATCH)
    reference.observe({"reward": 1.0})
    reference.move(policy, 1, optimizer)
    assert torch.equal(reference.logprobs(policy, BATCH), before)
    assert optimizer.state
    reference.observe({"reward": 0.5})
    reference.move(policy, 2, optimizer)
    assert not optimizer.state
    assert reference.metrics() == {"moves": 1.0, "best": 0.5, "stale_evaluations": 0.0}
    with torch.no_grad():
        expected = reference.logprobs(policy, BATCH)
    assert not torch.equal(expected, before)


def test_the_state_is_saved_also_between_an_evaluation_and_its_move(tmp_path):
    policy = tiny_model()
    rule = ResetOnStall(patience=2)
    first, second = (StallReset(FrozenModel(copy.deepcopy(policy), weights="abc"), rule=rule) for _ in range(2))
    for value in (3.0, 2.0, 1.0):
        first.observe({"reward": value})
    first.save(tmp_path, policy)
    second.load(tmp_path, policy)
    assert second.metrics() == first.metrics()
    second.move(policy, 3, torch.optim.AdamW(policy.parameters()))
    assert second.num_moves == 1


def test_an_unknown_or_invalid_metric_is_refused():
    reference = StallReset(FrozenModel(tiny_model(), weights="abc"), rule=ResetOnStall(patience=2))
    with pytest.raises(ConfigError, match=r"when 'reward' stalls, and the held-out metrics are loss, pass@1: name one"):
        reference.observe({"pass@1": 1.0, "loss": 2.0})
    with pytest.raises(TrainingError, match=r"held-out reward, .* is nan"):
        reference.observe({"reward": float("nan")})
    with pytest.raises(ValueError, match="patience=0"):
        ResetOnStall(patience=0)
    with pytest.raises(ValueError, match=r"min_improvement=-1.0"):
        ResetOnStall(patience=1, min_improvement=-1.0)

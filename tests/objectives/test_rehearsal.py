import math

import pytest
import torch

from falign import CompletionBatch, divergences
from falign.objectives import Objective, Rehearsal
from tests.reference.test_estimators import NAMES

JS = divergences.get("js")
LENGTHS = torch.tensor([3, 1, 2])


def batch_of(log_ratio, dtype=torch.float64, padding=0):
    mask = torch.arange(3 + padding) < LENGTHS[:, None]
    logprobs = torch.nn.functional.pad(log_ratio.to(dtype), (0, padding), value=math.nan)
    return CompletionBatch(
        logprobs=logprobs.masked_fill(~mask, math.nan),
        reference_logprobs=torch.zeros_like(logprobs).masked_fill(~mask, -math.inf),
        completion_mask=mask,
        prompt_index=torch.arange(3),
    )


LOG_RATIO = torch.tensor([[0.5, -1.0, 0.2], [0.7, 9.0, 9.0], [-0.3, 0.4, 9.0]], dtype=torch.float64)


def test_reductions_and_levels_average_what_they_say():
    f = JS.f(LOG_RATIO)
    sums = torch.stack([f[0].sum(), f[1, 0], f[2, :2].sum()])
    expected = {
        ("token", None): sums.sum() / 6,
        ("token", "token_mean"): sums.sum() / 6,
        ("token", "sequence_mean"): (sums / LENGTHS).mean(),
        ("token", "sequence_sum"): sums.mean(),
        ("sequence", None): JS.f(torch.tensor([-0.3, 0.7, 0.1]).double()).mean(),
    }
    for (level, reduction), value in expected.items():
        torch.testing.assert_close(Rehearsal(JS, level, reduction)(batch_of(LOG_RATIO)).mean(), value)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_padding_changes_nothing(level):
    a, b = (Rehearsal(JS, level)(batch_of(LOG_RATIO, padding=padding)) for padding in (0, 2))
    torch.testing.assert_close(a.mean(), b.mean())
    for name, values in a.metrics.items():
        torch.testing.assert_close(b.metrics[name], values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_finite_to_ten_thousand_nats(name, level, dtype):
    for sign in (1, -1):
        log_ratio = sign * torch.tensor([[1e4, 0.0, -50.0], [-1e4, 0.0, 0.0], [100.0, -3.0, 0.0]])
        log_ratio.requires_grad_()
        loss = Rehearsal(divergences.get(name), level)(batch_of(log_ratio, dtype)).mean()
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(log_ratio.grad).all()


def test_a_mean_over_tokens_of_a_whole_completion_is_refused():
    with pytest.raises(ValueError, match="not a sum over tokens; leave reduction out"):
        Rehearsal(JS, "sequence", "token_mean")


@pytest.mark.parametrize("field", ["level", "reduction"])
def test_unknown_choices_are_refused(field):
    with pytest.raises((ValueError, TypeError), match=field):
        Rehearsal(JS, **{field: "word"})


def test_rehearsal_is_an_objective_that_names_its_needs():
    assert isinstance(Rehearsal(JS), Objective)
    assert Rehearsal(JS).needs == {"reference_logprobs"}
    assert Rehearsal(JS).measures == {}

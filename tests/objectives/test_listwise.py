import itertools
import math

import pytest
import torch

from falign import FDPO, CompletionBatch, divergences
from falign.divergences import ReverseKL
from falign.objectives import Listwise, Objective

BARRED = [
    *("reverse_kl", "forward_kl", "jensen_shannon", "jeffreys", "squared_hellinger", "neyman_chi2", "chi2_kl"),
    *("alpha(0.0)", "alpha(0.3)", "alpha(1.0)", "alpha(1.4)", "generalized_js(0.3)", "dual(chi2_kl)"),
]
FOUR = torch.tensor([0.4, -1.1, 0.9, 0.2], dtype=torch.float64)


def batch_of(log_ratio, preference, prompt_index=None, lengths=None) -> CompletionBatch:
    """Completions whose log-ratio is spread evenly over their tokens."""
    n = len(log_ratio)
    lengths = torch.tensor(lengths or [2] * n)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    reference = torch.full(mask.shape, -1.5, dtype=log_ratio.dtype)
    return CompletionBatch(
        logprobs=reference + (log_ratio / lengths)[:, None],
        reference_logprobs=reference,
        completion_mask=mask,
        prompt_index=torch.zeros(n, dtype=torch.long) if prompt_index is None else torch.tensor(prompt_index),
        preference=torch.tensor(preference, dtype=log_ratio.dtype),
    )


def plackett_luce(rewards) -> dict[tuple[int, ...], float]:
    """Probability of every ranking, best first: draw without replacement in proportion to e^r."""
    probabilities = {}
    for order in itertools.permutations(range(len(rewards))):
        left, probability = [math.exp(r) for r in rewards], 1.0
        for i in order:
            probability *= left[i] / sum(left)
            left[i] = 0.0
        probabilities[order] = probability
    return probabilities


def loss_of(objective, *args, **kwargs) -> torch.Tensor:
    return objective(batch_of(*args, **kwargs)).terms[0].losses


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "chi2_kl"])
def test_the_loss_of_each_ranking_is_minus_the_log_of_its_enumerated_probability(name):
    objective = Listwise(divergences.get(name), beta=0.7)
    probabilities = plackett_luce(objective.implicit_reward(FOUR).tolist())
    assert sum(probabilities.values()) == pytest.approx(1.0)
    for order, probability in probabilities.items():
        preference = [float(-order.index(i)) for i in range(4)]
        assert loss_of(objective, FOUR, preference).item() == pytest.approx(-math.log(probability), rel=1e-12)


@pytest.mark.parametrize("preference", [[2.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
def test_with_ties_each_factor_is_the_marginal_probability_of_coming_before_all_that_are_worse(preference):
    objective = Listwise(divergences.get("forward_kl"), beta=0.6)
    probabilities = plackett_luce(objective.implicit_reward(FOUR).tolist())
    expected = 0.0
    for i in range(4):
        worse = [j for j in range(4) if preference[j] < preference[i]]
        first = [p for order, p in probabilities.items() if all(order.index(i) < order.index(j) for j in worse)]
        expected -= math.log(sum(first))
    assert loss_of(objective, FOUR, preference).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", BARRED)
def test_two_completions_are_f_dpo_in_value_gradient_and_metrics(name):
    results = []
    for objective in (Listwise(divergences.get(name), beta=0.3), FDPO(name, beta=0.3)):
        log_ratio = torch.tensor([0.8, -0.4, -1.1, 0.6], dtype=torch.float64, requires_grad=True)
        output = objective(batch_of(log_ratio, [1.0, 0.0, 0.0, 1.0], [0, 0, 1, 1]))
        output.mean().backward()
        results.append((output.terms[0].losses, log_ratio.grad, output.metrics))
    (losses, gradient, metrics), (pair_losses, pair_gradient, pair_metrics) = results
    torch.testing.assert_close(losses, pair_losses, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient, pair_gradient, rtol=1e-13, atol=0)
    assert metrics.keys() - pair_metrics.keys() == {"rewards/top1"}
    for key, values in pair_metrics.items():
        torch.testing.assert_close(metrics[key], values, rtol=1e-14, atol=0)


def test_value_and_gradient_of_three_match_the_closed_form():
    log_ratio = torch.tensor([0.5, 1.0, -0.5], dtype=torch.float64, requires_grad=True)
    losses = loss_of(Listwise(ReverseKL(), beta=2.0), log_ratio, [3.0, 2.0, 1.0])
    losses.sum().backward()
    a, b, c = math.e, math.e**2, math.exp(-1.0)
    assert losses.item() == pytest.approx(-math.log(a / (a + b + c)) - math.log(b / (b + c)))
    expected = [a / (a + b + c) - 1, b / (a + b + c) + b / (b + c) - 1, c / (a + b + c) + c / (b + c)]
    assert log_ratio.grad.tolist() == pytest.approx([2.0 * x for x in expected])


def test_one_loss_per_prompt_in_the_order_of_their_indices():
    objective = Listwise(ReverseKL(), beta=1.0)
    log_ratio = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.7], dtype=torch.float64)
    output = objective(batch_of(log_ratio, [0.0, 2.0, 1.0, 3.0, 5.0, 1.0], [7, 3, 7, 3, 7, 3]))
    assert output.terms[0].weights.tolist() == [1.0, 1.0]
    alone = [
        loss_of(objective, log_ratio[[1, 3, 5]], [2.0, 3.0, 1.0]),
        loss_of(objective, log_ratio[[0, 2, 4]], [0.0, 1.0, 5.0]),
    ]
    torch.testing.assert_close(output.terms[0].losses, torch.cat(alone), rtol=1e-14, atol=0)


def test_a_prompt_without_a_strict_order_has_no_loss():
    log_ratio = torch.tensor([0.1, 0.9, 0.3, 0.4, 0.5], dtype=torch.float64)
    output = Listwise(ReverseKL(), beta=1.0)(batch_of(log_ratio, [1.0, 0.0, 2.0, 2.0, 1.0], [0, 0, 1, 1, 2]))
    assert output.terms[0].losses.shape == (1,)
    assert output.metrics["rewards/top1"].shape == (1,)


@pytest.mark.parametrize("name", BARRED)
def test_losses_and_gradients_are_finite_to_ten_thousand_nats(name):
    objective = Listwise(divergences.get(name), beta=0.1)
    for dtype in (torch.float32, torch.bfloat16):
        for values in itertools.product([1e4, -1e4, 300.0, 0.0], repeat=3):
            log_ratio = torch.tensor(values, requires_grad=True)
            batch = batch_of(log_ratio.to(dtype), [2.0, 1.0, 0.0], lengths=[1, 1, 1])
            loss = objective(batch).mean()
            loss.backward()
            assert torch.isfinite(loss)
            assert torch.isfinite(log_ratio.grad).all()


@pytest.mark.parametrize("name", BARRED)
def test_a_worst_completion_of_probability_zero_has_gradient_zero(name):
    logprobs = torch.tensor([[-1.0, -2.0], [-2.0, -3.0], [-3.0, -math.inf]], requires_grad=True)
    batch = CompletionBatch(
        logprobs=logprobs,
        reference_logprobs=torch.full((3, 2), -2.0),
        completion_mask=torch.ones(3, 2, dtype=torch.bool),
        prompt_index=torch.zeros(3, dtype=torch.long),
        preference=torch.tensor([2.0, 1.0, 0.0]),
    )
    output = Listwise(divergences.get(name), beta=0.1)(batch)
    output.mean().backward()
    assert torch.isfinite(output.mean())
    assert torch.isfinite(logprobs.grad).all()
    assert logprobs.grad[2].tolist() == [0.0, 0.0]


def test_small_losses_keep_their_digits():
    log_ratio = torch.tensor([30.0, 0.0, -30.0])
    loss = loss_of(Listwise(ReverseKL(), beta=1.0), log_ratio, [2.0, 1.0, 0.0])
    assert loss.item() == pytest.approx(2 * math.exp(-30.0), rel=1e-5)


@pytest.mark.parametrize("preference", [[3.0, 1.0, 2.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
def test_the_order_of_completions_changes_nothing(preference):
    objective, preference = Listwise(divergences.get("alpha(0.3)"), beta=0.5), torch.tensor(preference)
    whole = objective(batch_of(FOUR, preference.tolist()))
    for order in itertools.permutations(range(4)):
        output = objective(batch_of(FOUR[list(order)], preference[list(order)].tolist()))
        torch.testing.assert_close(output.terms[0].losses, whole.terms[0].losses, rtol=1e-14, atol=0)
        for name, values in whole.metrics.items():
            torch.testing.assert_close(output.metrics[name].sort().values, values.sort().values, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("length_norm", ["none", "token"])
def test_padding_changes_nothing(length_norm):
    objective = Listwise(divergences.get("alpha(0.3)"), beta=0.5, length_norm=length_norm)
    batch = batch_of(FOUR, [3.0, 0.0, 2.0, 1.0], lengths=[2, 3, 1, 3])
    pad = lambda x, value: torch.nn.functional.pad(x, (0, 4), value=value)  # noqa: E731
    logprobs = pad(batch.logprobs, math.nan).requires_grad_()
    padded = CompletionBatch(
        logprobs=logprobs,
        reference_logprobs=pad(batch.reference_logprobs, -math.inf),
        completion_mask=pad(batch.completion_mask, False),
        prompt_index=batch.prompt_index,
        preference=batch.preference,
    )
    output = objective(padded)
    torch.testing.assert_close(output.terms[0].losses, objective(batch).terms[0].losses, rtol=1e-14, atol=0)
    output.mean().backward()
    assert torch.isfinite(logprobs.grad).all()
    assert (logprobs.grad[~padded.completion_mask] == 0).all()


def test_length_norm_takes_the_ratio_per_token():
    log_ratio = torch.tensor([0.9, -0.6, 0.4], dtype=torch.float64)
    objective = Listwise(divergences.get("forward_kl"), beta=0.5, length_norm="token")
    metrics = objective(batch_of(log_ratio, [2.0, 0.0, 1.0], lengths=[3, 2, 1])).metrics
    assert metrics["rewards/chosen"].item() == pytest.approx(0.5 * (1 - math.exp(-0.3)))
    assert metrics["rewards/rejected"].item() == pytest.approx(0.5 * (1 - math.exp(0.3)))
    assert metrics["logratios/chosen"].item() == pytest.approx(0.9)


def test_metrics_are_of_the_best_and_the_worst_and_of_all_ordered_pairs():
    log_ratio = torch.tensor([0.8, 0.2, 0.8, -0.4, -0.6], dtype=torch.float64, requires_grad=True)
    metrics = Listwise(ReverseKL(), beta=0.5)(batch_of(log_ratio, [3.0, 3.0, 2.0, 1.0, 1.0])).metrics
    assert metrics["rewards/chosen"].item() == pytest.approx(0.25)  # two share the first place
    assert metrics["rewards/rejected"].item() == pytest.approx(-0.25)
    assert metrics["rewards/margins"].item() == pytest.approx(0.5)
    assert metrics["logratios/chosen"].item() == pytest.approx(0.5)
    assert metrics["logps/rejected"].item() == pytest.approx(-3.5)
    # (0,2) ties; (0,3) (0,4) (1,3) (1,4) (2,3) (2,4) are right; (1,2) is wrong.
    assert sorted(metrics["rewards/accuracies"].tolist()) == [0.0, 0.5, *[1.0] * 6]
    assert metrics["rewards/top1"].item() == 0.5  # 0 and 2 share the largest reward
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(("first", "top1"), [(0.3, 0.0), (0.5, 0.5), (0.6, 1.0)])
def test_top1_says_whether_the_best_has_the_largest_reward(first, top1):
    log_ratio = torch.tensor([first, 0.5, 0.1], dtype=torch.float64)
    assert Listwise(ReverseKL())(batch_of(log_ratio, [3.0, 2.0, 1.0])).metrics["rewards/top1"].item() == top1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "must be positive"),
        ({"divergence": divergences.get("pearson_chi2")}, "no closed form.*chi2_kl"),
        ({"divergence": divergences.get("total_variation")}, "no closed form"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Listwise(**{"divergence": ReverseKL(), **arguments})


def test_an_unknown_length_norm_is_refused():
    with pytest.raises((ValueError, TypeError), match="length_norm"):
        Listwise(ReverseKL(), length_norm="char")


def test_a_missing_field_is_named():
    batch = batch_of(torch.zeros(3), [2.0, 1.0, 0.0])
    without = CompletionBatch(batch.logprobs, batch.completion_mask, batch.prompt_index, preference=batch.preference)
    with pytest.raises(ValueError, match="reference_logprobs, which is None"):
        Listwise(ReverseKL())(without)
    with pytest.raises(ValueError, match="no pair"):
        Listwise(ReverseKL())(batch_of(torch.zeros(3), [1.0, 1.0, 1.0]))


def test_listwise_is_an_objective_that_names_its_needs():
    objective = Listwise(ReverseKL())
    assert isinstance(objective, Objective)
    assert objective.needs == {"reference_logprobs", "preference"}
    assert objective.measures == {}

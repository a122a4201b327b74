import math

import pytest
import torch

from falign import FDPO, CompletionBatch, divergences
from falign.divergences import ForwardKL, ReverseKL
from falign.objectives import Conservative, Objective, Pairwise, pairs_of

BARRED = [
    *("reverse_kl", "forward_kl", "jensen_shannon", "jeffreys", "squared_hellinger", "neyman_chi2", "chi2_kl"),
    *("alpha(0.0)", "alpha(0.3)", "alpha(1.0)", "alpha(1.4)", "generalized_js(0.3)", "dual(chi2_kl)"),
]
MARGIN_LOSSES = ["logistic", "hinge", "squared", "conservative(0.2)", "robust(0.2)", "exo(0.05)"]


def batch_of(log_ratio: torch.Tensor, lengths=None, preference=None, prompt_index=None) -> CompletionBatch:
    """Completions whose log-ratio is spread evenly over their tokens."""
    n = len(log_ratio)
    lengths = torch.tensor(lengths or [3] * n)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    reference = torch.full(mask.shape, -1.5, dtype=log_ratio.dtype)
    return CompletionBatch(
        logprobs=reference + (log_ratio / lengths)[:, None],
        reference_logprobs=reference,
        completion_mask=mask,
        prompt_index=torch.arange(n) // 2 if prompt_index is None else torch.tensor(prompt_index),
        preference=torch.tensor([1.0, 0.0] * (n // 2) if preference is None else preference, dtype=log_ratio.dtype),
    )


def test_dpo_value_and_gradient_match_the_closed_form():
    log_ratio = torch.tensor([1.5, 0.5], dtype=torch.float64, requires_grad=True)
    (term,) = Pairwise(ReverseKL(), beta=0.2)(batch_of(log_ratio)).terms
    term.losses.sum().backward()
    assert term.losses.item() == pytest.approx(math.log1p(math.exp(-0.2)))
    assert log_ratio.grad[0].item() == pytest.approx(-0.2 / (1 + math.exp(0.2)))
    assert log_ratio.grad[1].item() == pytest.approx(0.2 / (1 + math.exp(0.2)))


@pytest.mark.parametrize("name", BARRED)
def test_f_dpo_gradient_is_beta_u_f_second_times_the_sigmoid(name):
    divergence, beta = divergences.get(name), 0.3
    log_ratio = torch.tensor([0.8, -0.4, -1.1, 0.6], dtype=torch.float64, requires_grad=True)
    (term,) = Pairwise(divergence, beta=beta)(batch_of(log_ratio)).terms
    term.losses.sum().backward()
    h = 1e-6
    curvature = (divergence.f_prime(log_ratio + h) - divergence.f_prime(log_ratio - h)) / (2 * h)  # u f''(u)
    margin = beta * (divergence.f_prime(log_ratio)[::2] - divergence.f_prime(log_ratio)[1::2])
    weight = beta * torch.sigmoid(-margin).repeat_interleave(2) * torch.tensor([-1.0, 1.0, -1.0, 1.0])
    torch.testing.assert_close(log_ratio.grad, (weight * curvature).detach(), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BARRED)
def test_half_precision_log_probs_are_computed_in_single(name, dtype):
    for pair in ([3e4, -3e4], [-3e4, 3e4], [300.0, -2.0], [1.0, -0.5]):
        log_ratio = torch.tensor(pair, dtype=torch.float32).to(dtype).requires_grad_()
        single = log_ratio.detach().float().requires_grad_()
        terms = [FDPO(name, beta=0.1)(batch_of(x, [1, 1])).terms[0] for x in (log_ratio, single)]
        assert terms[0].losses.dtype == torch.float32
        torch.testing.assert_close(terms[0].losses, terms[1].losses, rtol=2e-2, atol=2e-2)
        terms[0].losses.sum().backward()
        # u f''(u) itself may be beyond float16's largest number, which is an infinity there and no NaN.
        assert not torch.isnan(log_ratio.grad).any()


@pytest.mark.parametrize("margin_loss", MARGIN_LOSSES)
@pytest.mark.parametrize("name", BARRED)
def test_losses_and_gradients_are_finite_to_ten_thousand_nats(name, margin_loss):
    objective = FDPO(name, beta=0.1, margin_loss=margin_loss)
    for dtype in (torch.float32, torch.bfloat16):
        for pair in ([1e4, -1e4], [-1e4, 1e4], [-1e4, -1e4], [300.0, -2.0], [0.0, 0.0]):
            log_ratio = torch.tensor(pair, dtype=torch.float32, requires_grad=True)
            mask = torch.ones(2, 1, dtype=torch.bool)
            batch = CompletionBatch(
                logprobs=log_ratio[:, None].to(dtype),
                reference_logprobs=torch.zeros(2, 1, dtype=dtype),
                completion_mask=mask,
                prompt_index=torch.zeros(2, dtype=torch.long),
                preference=torch.tensor([1.0, 0.0]),
            )
            loss = objective(batch).mean()
            loss.backward()
            assert torch.isfinite(loss)
            assert torch.isfinite(log_ratio.grad).all()


@pytest.mark.parametrize("name", BARRED)
def test_a_rejected_completion_of_probability_zero_has_gradient_zero(name):
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -math.inf]], requires_grad=True)
    batch = CompletionBatch(
        logprobs=logprobs,
        reference_logprobs=torch.full((2, 2), -2.0),
        completion_mask=torch.ones(2, 2, dtype=torch.bool),
        prompt_index=torch.zeros(2, dtype=torch.long),
        preference=torch.tensor([1.0, 0.0]),
    )
    loss = FDPO(name, beta=0.1)(batch).mean()
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.grad.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", BARRED)
def test_swapping_chosen_and_rejected_turns_the_margin_around(name):
    log_ratio = torch.tensor([0.7, -0.2], dtype=torch.float64)
    forward = FDPO(name, beta=0.5)(batch_of(log_ratio)).metrics["rewards/margins"]
    backward = FDPO(name, beta=0.5)(batch_of(log_ratio, preference=[0.0, 1.0])).metrics["rewards/margins"]
    assert forward.item() == -backward.item() != 0.0


@pytest.mark.parametrize("length_norm", ["none", "token"])
def test_padding_changes_nothing(length_norm):
    log_ratio = torch.tensor([0.9, -0.3, 0.1, 0.4], dtype=torch.float64)
    objective = FDPO("alpha(0.3)", beta=0.5, length_norm=length_norm)
    batch = batch_of(log_ratio, lengths=[2, 3, 1, 3])
    pad = lambda x, value: torch.nn.functional.pad(x, (0, 4), value=value)  # noqa: E731
    padded = CompletionBatch(
        logprobs=pad(batch.logprobs, math.nan),
        reference_logprobs=pad(batch.reference_logprobs, -math.inf),
        completion_mask=pad(batch.completion_mask, False),
        prompt_index=batch.prompt_index,
        preference=batch.preference,
    )
    torch.testing.assert_close(objective(padded).terms[0].losses, objective(batch).terms[0].losses, rtol=1e-14, atol=0)


def test_length_norm_takes_the_ratio_per_token():
    log_ratio = torch.tensor([0.9, -0.6], dtype=torch.float64)
    out = FDPO("forward_kl", beta=0.5, length_norm="token")(batch_of(log_ratio, lengths=[3, 2]))
    assert out.metrics["rewards/chosen"].item() == pytest.approx(0.5 * (1 - math.exp(-0.3)))
    assert out.metrics["rewards/rejected"].item() == pytest.approx(0.5 * (1 - math.exp(0.3)))


def test_rewards_are_those_of_the_divergence_and_log_ratios_stand_beside_them():
    log_ratio = torch.tensor([0.9, -0.6], dtype=torch.float64, requires_grad=True)
    metrics = Pairwise(ForwardKL(), beta=0.5)(batch_of(log_ratio)).metrics
    assert metrics["rewards/chosen"].item() == pytest.approx(0.5 * (1 - math.exp(-0.9)))
    assert metrics["logratios/rejected"].item() == pytest.approx(-0.6)
    assert metrics["logps/chosen"].item() == pytest.approx(-4.5 + 0.9)
    assert not any(value.requires_grad for value in metrics.values())


def test_a_tie_counts_half():
    metrics = FDPO()(batch_of(torch.tensor([0.5, 0.5, 0.7, 0.1, -1.0, 1.0]))).metrics
    assert metrics["rewards/accuracies"].tolist() == [0.5, 1.0, 0.0]


def test_every_two_completions_of_a_prompt_that_differ_are_a_pair():
    chosen, rejected = pairs_of(torch.tensor([2.0, 1.0, 1.0, 5.0, 0.0]), torch.tensor([0, 0, 0, 1, 1]))
    assert list(zip(chosen.tolist(), rejected.tolist(), strict=True)) == [(0, 1), (0, 2), (3, 4)]


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("pearson_chi2", "chi2_kl"),
        ("total_variation", "jensen_shannon"),
        ("le_cam", "barrier"),
        ("alpha(-0.5)", "barrier"),
    ],
)
def test_a_divergence_without_barrier_is_refused_with_the_reason(name, instead):
    with pytest.raises(ValueError, match=f"no closed form.*{instead}"):
        FDPO(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "must be positive"),
        ({"beta": math.nan}, "must be positive"),
        ({"margin_loss": "logisitc"}, "did you mean 'logistic'"),
        ({"margin_loss": "hinge(2)"}, "takes no parameter"),
        ({"margin_loss": "conservative(0.5)"}, "0 ≤ label_smoothing < 0.5"),
        ({"margin_loss": "robust(0.7)"}, "label_noise < 0.5"),
        ({"margin_loss": "exo(0)"}, "0 < label_smoothing"),
        ({"divergence": "kl"}, "does not say which"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FDPO(**arguments)


def test_an_unknown_length_norm_is_refused():
    with pytest.raises((ValueError, TypeError), match="length_norm"):  # TypeError where annotations are checked first
        FDPO(length_norm="char")


def test_a_missing_field_is_named():
    batch = batch_of(torch.zeros(2))
    without = CompletionBatch(batch.logprobs, batch.completion_mask, batch.prompt_index, preference=batch.preference)
    with pytest.raises(ValueError, match="reference_logprobs, which is None"):
        FDPO()(without)
    with pytest.raises(ValueError, match="no pair"):
        FDPO()(batch_of(torch.zeros(2), preference=[1.0, 1.0]))


def test_pairwise_is_an_objective_that_names_its_needs():
    objective = FDPO()
    assert isinstance(objective, Objective)
    assert objective.needs == {"reference_logprobs", "preference"}
    assert objective.measures == {}


@pytest.mark.parametrize(
    ("log_ratio", "accuracy"),
    [
        ([1e-7, -1e-7], 0.5),  # rounding at the reference
        ([-3e-7, 3e-7], 0.5),
        ([1e-4, 0.0], 1.0),
        ([0.0, 1e-4], 0.0),
        ([400.0003, 400.0], 0.5),  # of the size of the rewards' own rounding
        ([400.1, 400.0], 1.0),
    ],
)
def test_a_margin_within_rounding_is_a_tie(log_ratio, accuracy):
    output = FDPO("reverse_kl", beta=1.0)(batch_of(torch.tensor(log_ratio, dtype=torch.float64), [1, 1]))
    assert output.metrics["rewards/accuracies"].tolist() == [accuracy]


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
def test_the_best_margin_under_smoothed_labels_is_their_log_odds(smoothing):
    margin = torch.tensor([math.log((1 - smoothing) / smoothing)], dtype=torch.float64, requires_grad=True)
    loss = Conservative(smoothing)(margin)
    loss.sum().backward()
    entropy = -(1 - smoothing) * math.log(1 - smoothing) - smoothing * math.log(smoothing)
    assert loss.item() == pytest.approx(entropy, abs=1e-12)
    assert margin.grad.item() == pytest.approx(0.0, abs=1e-12)

import pytest
import torch

from falign.rollouts.base import SamplingParams
from falign.rollouts.decoding import draw, process_logits, uniform_streams
from tests.rollouts.exact import processed

SETTINGS = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 100},
    {"top_p": 0.8},
    {"top_p": 1e-9},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.6},
]


def logits_of(rows=6, vocabulary=40, seed=0):
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_processed_distribution_is_the_one_written_out(settings):
    logits = logits_of()
    found = process_logits(logits, SamplingParams(1, **settings)).softmax(dim=-1)
    expected = torch.tensor([processed(row, **settings) for row in logits.double().tolist()])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(found > 0, expected > 0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_draw_inverts_the_cumulative_distribution(settings):
    logits = logits_of(rows=1)
    exact = processed(logits[0].double().tolist(), **settings)
    uniforms = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1] + 1e-5
    drawn = draw(logits.expand(2000, -1), SamplingParams(1, **settings), uniforms)
    shares = torch.bincount(drawn.token_ids, minlength=40) / 2000
    torch.testing.assert_close(shares.double(), torch.tensor(exact, dtype=torch.float64), atol=6e-4, rtol=0)
    logprobs = torch.tensor(exact, dtype=torch.float64)[drawn.token_ids].log()
    torch.testing.assert_close(drawn.logprobs.double(), logprobs, atol=2e-6, rtol=0)


def test_a_token_without_probability_is_not_drawn_at_either_end():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    assert draw(logits, SamplingParams(1), torch.zeros(1, dtype=torch.float64)).token_ids == 1
    largest = torch.tensor([1 - 2**-53], dtype=torch.float64) * (1 - 2**-52)  # the largest that a stream can hold
    assert draw(logits, SamplingParams(1), largest).token_ids == 3


def test_an_unlikely_token_of_a_large_vocabulary_keeps_its_probability():
    logits = torch.zeros(1, 200_000)
    logits[0, -1] = -20.0
    target = 1 - 1e-15
    assert draw(logits, SamplingParams(1), torch.tensor([target], dtype=torch.float64)).token_ids == 199_999
    assert draw(logits, SamplingParams(1), torch.tensor([1 - 1e-12], dtype=torch.float64)).token_ids == 199_998


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_nan(temperature, value):
    logits = logits_of(rows=2)
    logits[1, 7] = value
    drawn = draw(logits, SamplingParams(1, temperature=temperature), torch.full((2,), 0.5, dtype=torch.float64))
    assert drawn.logprobs.isnan().tolist() == [False, True]


def test_greedy_decoding_takes_the_likeliest_token_of_a_point_mass():
    logits = logits_of()
    drawn = draw(logits, SamplingParams(1, temperature=0.0, top_k=3), torch.zeros(6, dtype=torch.float64))
    assert torch.equal(drawn.token_ids, logits.argmax(dim=-1))
    assert torch.equal(drawn.logprobs, torch.zeros(6))


def test_a_rows_stream_depends_on_seed_and_row_alone():
    whole = uniform_streams([0, 1, 2, 3], 10, seed=5)
    assert torch.equal(uniform_streams([2], 10, seed=5)[0], whole[2])
    assert torch.equal(uniform_streams([3, 0], 4, seed=5), whole[[3, 0], :4])
    assert len(set(whole.flatten().tolist())) == 40
    assert not torch.equal(uniform_streams([0], 10, seed=6)[0], whole[0])
    assert 0 <= whole.min() <= whole.max() < 1
    assert uniform_streams([0], 1, seed=2**70).shape == (1, 1)

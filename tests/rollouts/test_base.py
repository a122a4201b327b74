import pytest

from falign.errors import RolloutError
from falign.rollouts import SamplingParams


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1 token"),
        ({"temperature": -0.1}, "temperature=-0.1 must be a number"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_a_value_out_of_range_is_refused(options, message):
    with pytest.raises(RolloutError, match=message):
        SamplingParams(**{"max_new_tokens": 4, **options})


def test_only_greedy_decoding_top_k_and_top_p_leave_tokens_out():
    assert not SamplingParams(4, temperature=0.3).truncates
    assert SamplingParams(4, temperature=0.0).truncates
    assert SamplingParams(4, top_k=3).truncates
    assert SamplingParams(4, top_p=0.9).truncates

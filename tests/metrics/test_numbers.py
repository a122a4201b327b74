"""Every metric takes numbers in whatever holds them, and refuses by name and place what is no number."""

import numpy as np
import pytest
import torch

from falign.metrics.calibration import brier_score, calibration, probabilities, reliability_curve
from falign.metrics.divergence import divergence_values
from falign.metrics.entropy import completion_entropy, token_entropy
from falign.metrics.numbers import float_array
from falign.metrics.pass_at_k import pass_at_k
from falign.metrics.reward_accuracy import outcomes, pair_outcomes, reward_accuracy, top1_accuracy
from falign.metrics.win_rate import win_rate

# By name: the function of one row of numbers, and a row of numbers that every dtype below can hold.
FUNCTIONS = {
    "probabilities": (lambda x: probabilities(x).tolist(), (-0.5, 1.25, 2.0)),
    "reliability_curve": (lambda x: reliability_curve(x, x), (0.5, 0.75, 1.0)),
    "brier_score": (lambda x: brier_score(x, x), (0.5, 0.25, 1.0)),
    "calibration": (calibration, (-0.5, 1.25, 2.0)),
    "outcomes": (lambda x: outcomes(x, x).tolist(), (-0.5, 1.25, 2.0)),
    "pair_outcomes": (lambda x: pair_outcomes(x, x).tolist(), (-0.5, 1.25, 2.0)),
    "reward_accuracy": (lambda x: reward_accuracy([x, x], [x, x]), (-0.5, 1.25, 2.0)),
    "top1_accuracy": (lambda x: top1_accuracy([x, x], [x, x]), (-0.5, 1.25, 2.0)),
    "win_rate": (win_rate, (0.5, 0.0, 1.0)),
    "pass_at_k": (lambda x: pass_at_k([x, x], 2), (0.5, 0.0, 1.0)),
    "token_entropy": (lambda x: token_entropy([x, x]), (0.5, 1.25, 2.0)),
    "completion_entropy": (lambda x: completion_entropy([x, x]), (0.5, 1.25, 2.0)),
    "divergence_values": (
        lambda x: {
            name: values.tolist()
            for name, values in divergence_values(
                "jensen_shannon", [x, x], [x, x], samples="old", old_logprobs=[x, x], token_divergences=[x, x]
            ).items()
        },
        (-0.5, -1.25, -2.0),
    ),
}
HOLDERS = {
    "tuple": tuple,
    "array": np.array,
    "float16 array": lambda x: np.array(x, dtype=np.float16),
    "numbers of numpy": lambda x: [np.float32(value) for value in x],
    "tensor": torch.tensor,
    "bfloat16": lambda x: torch.tensor(x, dtype=torch.bfloat16),
    "with a gradient": lambda x: torch.tensor(x, requires_grad=True),
    "tensors of one number": lambda x: [torch.tensor(value, dtype=torch.bfloat16, requires_grad=True) for value in x],
}
WHOLE = {
    "integers": lambda x: [int(value) for value in x],
    "booleans": lambda x: [bool(value) for value in x],
    "int64": lambda x: torch.tensor(x, dtype=torch.int64),
    "bool": lambda x: torch.tensor(x, dtype=torch.bool),
    "array of bool": lambda x: np.array(x, dtype=bool),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_result_is_that_of_a_list_of_floats(name, holder):
    function, row = FUNCTIONS[name]
    assert function(HOLDERS[holder](row)) == function(list(row))


@pytest.mark.parametrize("holder", WHOLE)
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("reliability_curve", "divergence_values")])
def test_integers_and_booleans_are_numbers(name, holder):
    row = [1.0, 0.0, 1.0]
    assert FUNCTIONS[name][0](WHOLE[holder](row)) == FUNCTIONS[name][0](row)


COMPLEX = (torch.tensor([1 + 1j, 0.5]), TypeError, "complex64; it must be real")
TWO_DIMENSIONS = (torch.zeros(2, 2), ValueError, r"has shape \(2, 2\); it must have one dimension")


@pytest.mark.parametrize(("row", "error", "message"), [COMPLEX, TWO_DIMENSIONS], ids=["complex", "two dimensions"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_tensors_are_refused_by_every_function(name, row, error, message):
    with pytest.raises(error, match=message):
        FUNCTIONS[name][0](row)


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        COMPLEX,
        TWO_DIMENSIONS,
        (np.array([1 + 1j, 0.5]), TypeError, r"^rewards\[0\] is .*; it must be a real number"),
        ([0.5, None], TypeError, r"^rewards\[1\] is None; it must be a real number"),
        (["0.5", 0.5], TypeError, r"^rewards\[0\] is '0.5'; it must be a real number"),
        ([[0.5, 0.5]], TypeError, r"^rewards\[0\] is \[0.5, 0.5\]; it must be a real number"),
        (0.5, TypeError, "^rewards is a float; it must be a list, an array or a tensor of numbers"),
        ("0.5", TypeError, "^rewards is a str; it must be a list, an array or a tensor of numbers"),
    ],
)
def test_what_is_no_row_of_numbers_is_refused_by_name_and_place(row, error, message):
    with pytest.raises(error, match=message):
        float_array(row, "rewards")


def test_the_array_is_a_new_one():
    given = np.array([1.0, 2.0])
    float_array(given, "x")[0] = 5.0
    tensor = torch.tensor([1.0, 2.0], dtype=torch.float64)
    float_array(tensor, "x")[0] = 5.0
    assert (given[0], tensor[0].item()) == (1.0, 1.0)

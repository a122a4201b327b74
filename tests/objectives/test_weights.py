import math
from dataclasses import dataclass, field

import pytest
import torch

from falign.divergences import ReverseKL
from falign.errors import ConfigError
from falign.objectives import CompletionBatch, DivergenceTo, Entropy, Measure
from falign.objectives.difficulty import Dads, DifficultyKernel
from falign.objectives.weights import (
    TokenWeight,
    completion_factor,
    get_weight,
    measures_of_weights,
    merge_measures,
    needs_of_weights,
    token_factor,
)


@dataclass
class Constant:
    values: torch.Tensor
    needs: frozenset[str] = frozenset({"reference_logprobs"})
    measures: dict[str, Measure] = field(default_factory=lambda: {"entropy": Entropy()})

    def __call__(self, batch):
        return self.values


def batch_of(rewards=(1.0, 0.0, 0.0, 1.0, 1.0), prompts=(0, 0, 0, 1, 1)):
    mask = torch.tensor([[True, True, False]] * len(rewards))
    return CompletionBatch(
        logprobs=torch.zeros(len(rewards), 3, dtype=torch.float64),
        completion_mask=mask,
        prompt_index=torch.tensor(prompts),
        rewards=torch.tensor(rewards, dtype=torch.float64),
    )


def test_the_difficulty_kernel_is_a_function_of_each_prompts_share_of_passes():
    kernel = DifficultyKernel(a=2.0, b=1.5)(batch_of())
    expected = (1 / 3) ** 2 * (2 / 3) ** 1.5
    assert kernel[:, 0].tolist() == pytest.approx([expected] * 3 + [0.0, 0.0], abs=1e-15)
    # Rewards that are not 0 and 1: the threshold decides.
    graded = batch_of(rewards=(0.5, 0.2, 0.7, 0.1, 0.9))
    assert DifficultyKernel(1.0, 1.0, pass_reward=0.5)(graded)[:, 0].tolist() == pytest.approx([2 / 9] * 3 + [0.25] * 2)


def test_dads_weights_right_answers_of_prompts_that_sometimes_pass():
    weights = Dads()(batch_of())[:, 1].tolist()
    assert weights == pytest.approx([1 - math.exp(-math.e / 3), 1.0, 1.0, 1.0, 1.0], abs=1e-15)


def test_zero_exponents_give_weights_of_exactly_one_even_where_nothing_passes():
    assert DifficultyKernel(0.0, 0.0)(batch_of(rewards=(0, 0, 0, 1, 1))).eq(1).all()


def test_a_list_is_a_product_that_is_constant_and_zero_outside_the_mask():
    values = torch.full((5, 3), 3.0, dtype=torch.float64, requires_grad=True)
    batch = batch_of()
    factor = token_factor([DifficultyKernel(), Constant(values)], batch)
    assert not factor.requires_grad
    assert factor[0].tolist() == pytest.approx([2 / 3, 2 / 3, 0.0])
    assert token_factor([], batch).equal(batch.completion_mask.double())
    assert completion_factor([Constant(values * 2)], batch).tolist() == [6.0] * 5
    uneven = torch.tensor([[1.0, 2.0, 0.0]] * 5)
    with pytest.raises(ValueError, match=r"Constant differ between the tokens of completion 0 \(1 and 2\)"):
        completion_factor([Constant(uneven)], batch)


def test_needs_and_measures_are_unions_and_two_meanings_of_one_name_are_refused():
    weights = [DifficultyKernel(), Constant(torch.zeros(5, 3))]
    assert needs_of_weights(weights) == {"rewards", "reference_logprobs"}
    assert measures_of_weights(weights) == {"entropy": Entropy()}
    with pytest.raises(ValueError, match=r"'entropy'.*rename one"):
        merge_measures({"entropy": Entropy()}, {"entropy": DivergenceTo(ReverseKL())})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(5), r"Constant has shape \(5,\).*one number for each token"),
        (torch.tensor([[1.0, 1.0, 0.0]] * 4 + [[1.0, -2.0, 0.0]]), "Constant is -2 at token 1 of completion 4"),
        (torch.tensor([[1.0, float("nan"), 0.0]] * 5), "Constant is nan at token 1 of completion 0"),
        (torch.tensor([[float("inf"), 1.0, 0.0]] * 5), "Constant is inf at token 0 of completion 0"),
    ],
)
def test_a_weight_of_the_wrong_shape_or_nan_or_negative_is_refused_with_its_place(values, message):
    with pytest.raises(ValueError, match=message):
        token_factor([Constant(values)], batch_of())


def test_values_outside_the_mask_are_not_read():
    values = torch.tensor([[1.0, 1.0, float("nan")]] * 5, dtype=torch.float64)
    assert token_factor([Constant(values)], batch_of())[:, 2].eq(0).all()


def test_weights_are_found_by_name_and_their_settings_checked():
    assert get_weight("difficulty_kernel", b=2.0) == DifficultyKernel(1.0, 2.0)
    assert isinstance(get_weight("difficulty_kernel"), TokenWeight)
    with pytest.raises(ConfigError, match="did you mean 'difficulty_kernel'"):
        get_weight("difficulty_kernl")
    with pytest.raises(ValueError, match=r"a=-1\.0 must be finite and not negative"):
        get_weight("difficulty_kernel", a=-1.0)
    with pytest.raises(ConfigError, match="lacks needs"):
        get_weight("builtins:dict", a=1)
    with pytest.raises(ConfigError, match="unexpected keyword argument 'c'"):
        get_weight("difficulty_kernel", c=1)

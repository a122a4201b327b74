"""SparsePO's learned masks: their formula, the loss with them, and their training."""

import pytest
import torch
from torch.nn import functional as F

from falign.divergences import get
from falign.methods import SparsePO
from falign.objectives import CompletionBatch, TokenPairwise
from falign.references import FrozenModel, objective_inputs
from falign.scoring import Scorer
from falign.scoring.batch import PromptTree
from falign.scoring.learned_masks import LearnedMasks
from tests.models.tiny import tiny_model


@pytest.mark.parametrize("independent", [False, True])
def test_masks_are_norm_linear_relu_mixer_relu_of_each_layer(independent):
    torch.manual_seed(3)
    masks = LearnedMasks(3, 5, independent=independent).double().eval()
    for parameter in masks.parameters():
        parameter.data = torch.randn_like(parameter)
    states = torch.randn(7, 3, 5, dtype=torch.float64)
    found = masks(states)
    for column, which in enumerate((0, -1)):
        numbers = []
        for layer in range(3):
            h = states[:, layer]
            normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            normed = normed * masks.norms[layer].weight + masks.norms[layer].bias
            linear = masks.to_number[layer]
            numbers.append(F.relu(normed @ linear.weight[which] + linear.bias[which]))
        mixer = masks.mixers[which]
        expected = F.relu(torch.stack(numbers, -1) @ mixer.weight[0] + mixer.bias[0])
        torch.testing.assert_close(found[:, column], expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(found[:, 0], found[:, 1]) != independent


def test_the_loss_is_tdpo_weighted_by_the_masks_and_its_gradient_reaches_them():
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.rand(4, 5, generator=generator, dtype=torch.float64)  # noqa: E731
    mask = torch.arange(5) < torch.tensor([[5], [3], [4], [5]])
    ratio, divergence = draw().requires_grad_(), draw().requires_grad_()
    batch = CompletionBatch(
        logprobs=-draw(),
        reference_logprobs=-draw(),
        completion_mask=mask,
        prompt_index=torch.tensor([0, 0, 1, 1]),
        preference=torch.tensor([1.0, 0.0, 0.0, 1.0]),
        measures={"divergence": draw()},
        learned_masks={"ratio": ratio, "divergence": divergence},
    )
    output = SparsePO(beta=0.4, mask="learned_independent", mask_l1=0.3)(batch)
    log_u = (batch.logprobs - batch.reference_logprobs) * mask
    u = (ratio * log_u).sum(-1)
    d = (divergence * batch.measures["divergence"] * mask).sum(-1)
    chosen, rejected = [0, 3], [1, 2]
    margin = 0.4 * ((u[chosen] - u[rejected]) - (d[rejected] - d[chosen]))
    l1 = ((ratio + divergence) * mask).sum() / mask.sum()
    expected = -F.logsigmoid(margin).mean() + 0.3 * l1
    assert output.mean().item() == pytest.approx(expected.item(), abs=1e-14)
    leaves = (ratio, divergence)
    for found, true in zip(
        torch.autograd.grad(output.mean(), leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-15)


def test_masks_of_one_and_no_l1_are_plain_tdpo():
    plain = TokenPairwise(get("forward_kl"), 0.4, variant=1)
    learned = SparsePO(beta=0.4, mask="learned", mask_l1=0.0)
    ones = torch.ones(2, 3, dtype=torch.float64)
    fields = {
        "logprobs": -torch.rand(2, 3, dtype=torch.float64),
        "reference_logprobs": -torch.rand(2, 3, dtype=torch.float64),
        "completion_mask": torch.ones(2, 3, dtype=torch.bool),
        "prompt_index": torch.tensor([0, 0]),
        "preference": torch.tensor([1.0, 0.0]),
        "measures": {"divergence": torch.rand(2, 3, dtype=torch.float64)},
    }
    masked = CompletionBatch(**fields, learned_masks={"ratio": ones, "divergence": ones})
    assert torch.equal(learned(masked).terms[0].losses, plain(CompletionBatch(**fields)).terms[0].losses)


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_masks_come_from_the_references_layers_and_train(layout):
    policy, reference = tiny_model("llama", 1), tiny_model("llama", 2)
    batch = Scorer(layout, pad_token_id=1).lay_out(
        [
            PromptTree((40, 41), ((70, 71, 1), (72, 1)), (1.0, 0.0)),
            PromptTree((50,), ((70, 1), (73, 74, 1)), (0.0, 1.0)),
        ]
    )
    torch.manual_seed(0)
    head = LearnedMasks(2, 64, independent=True)
    objective = SparsePO(beta=0.4, mask="learned_independent")
    inputs = objective_inputs(
        policy, batch, references={"reference": FrozenModel(reference)}, objective=objective, mask_head=head.eval()
    )
    found = inputs.completions.learned_masks["divergence"]
    # Independently: each completion alone, through the reference.
    for row, (prompt, completion) in enumerate(batch.token_ids()):
        with torch.no_grad():
            states = reference(torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states
        at = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
        layers = torch.stack([layer[0, at] for layer in states[1:]], dim=1)
        torch.testing.assert_close(found[row, : len(completion)], head(layers)[:, 1], rtol=1e-4, atol=1e-5)
    objective(inputs.completions).mean().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in head.parameters())
    with pytest.raises(ValueError, match="mask_head is None"):
        objective_inputs(policy, batch, references={"reference": FrozenModel(reference)}, objective=objective)


def test_settings_of_masks_without_masks_are_refused():
    with pytest.raises(ValueError, match=r"mask_l1=0\.1 with mask='mapo'"):
        SparsePO(mask_l1=0.1)
    with pytest.raises(ValueError, match=r"mask_l1=-1\.0"):
        SparsePO(mask="learned", mask_l1=-1.0)

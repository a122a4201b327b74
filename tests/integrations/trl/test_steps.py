"""Optimizer steps of FDPOTrainer and FKTOTrainer: accumulation, evaluation, moving references and resumed runs."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import TrainerCallback

import falign
from falign.errors import TrainingError
from falign.integrations.trl import FDPOTrainer, FKTOTrainer
from falign.methods import KTO
from falign.models.structure import lora_layers
from falign.objectives import Selected, Sum, Supervised
from falign.references import MovingAverage, PeriodicReset
from tests.equivalence.test_trl import BETA, policy, reference_model, tokenizer
from tests.integrations.trl import test_dpo, test_kto
from tests.integrations.trl.test_dpo import LORA
from tests.models.tiny import fill_adapter

__all__ = ["policy", "reference_model", "tokenizer"]

# TRL 1.16 and PEFT 0.21 read an attribute that Transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SUM = Sum({"dpo": falign.FDPO("js_divergence", BETA), "sft": (Selected(Supervised(), "chosen"), 0.3)})


class Gradients(TrainerCallback):
    """The gradient of each optimizer step, before it is clipped."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def gradient_of_a_step(trainer):
    trainer.add_callback(found := Gradients())
    trainer.train()
    return found.steps[-1]


def assert_same_gradients(one, other):
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert ((other[name] - gradient).norm() / gradient.norm()).item() < 1e-5, name


@pytest.mark.parametrize("layout", ["trl", "tree"])
@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_accumulation_changes_nothing_with_a_ragged_last_micro_batch(
    tmp_path, tokenizer, policy, reference_model, layout, kind
):
    config = {"max_steps": 1, "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    module, cls = (test_dpo, FDPOTrainer) if kind == "pairs" else (test_kto, FKTOTrainer)
    objective = SUM if kind == "pairs" else KTO("js_divergence", BETA)
    split = config | {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}
    given = (tokenizer, policy, reference_model)
    of_parts = module.trainer(cls, tmp_path, *given, config=split, objective=objective, layout=layout)
    whole_batch = of_parts.data_collator(list(of_parts.train_dataset))
    assert len(of_parts.train_dataset) % 5 != 0
    whole = copy.deepcopy(of_parts.model)
    loss = of_parts.compute_loss(of_parts.model, whole_batch)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in of_parts.model.named_parameters() if p.grad is not None}
    of_parts.model.zero_grad()
    assert_same_gradients(expected, gradient_of_a_step(of_parts))
    logged = next(log for log in of_parts.state.log_history if "loss" in log)
    assert logged["loss"] == pytest.approx(loss.item(), abs=1e-4)  # TRL logs four digits
    assert not all(torch.equal(p, q) for p, q in zip(whole.parameters(), of_parts.model.parameters(), strict=True))


def moving_trainer(folder, tokenizer, policy, rule, *, kind, layout="trl", reference_model=None, **config):
    given = {"reference": rule, "objective": falign.FDPO("js_divergence", BETA), "layout": layout}
    config = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"} | config
    if kind == "full":
        return test_dpo.trainer(FDPOTrainer, folder, tokenizer, policy, reference_model, config=config, **given)
    model = fill_adapter(get_peft_model(copy.deepcopy(policy), LORA))  # an adapter of the user's: TRL copies it
    return test_dpo.trainer(FDPOTrainer, folder, tokenizer, model, config=config, **given)


class Weights(TrainerCallback):
    """The policy's weights before each step, as whole matrices."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.steps.append(whole_weights(model, "default"))


def whole_weights(model, adapter):
    if not isinstance(model, PeftModel):
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    return {
        name: layer.lora_B[adapter].weight.detach() @ layer.lora_A[adapter].weight.detach() * layer.scaling[adapter]
        for name, layer in lora_layers(model, adapter).items()
    }


@pytest.mark.parametrize("layout", ["trl", "tree"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_moving_average_is_the_closed_form(tmp_path, tokenizer, policy, kind, layout):
    trainer = moving_trainer(
        tmp_path,
        tokenizer,
        policy,
        MovingAverage(alpha=0.3, every=1),
        kind=kind,
        layout=layout,
        reference_model=policy,
        max_steps=4,
    )
    trainer.add_callback(found := Weights())
    trainer.train()
    expected = found.steps[0]
    for policy_weights in found.steps[1:]:
        expected = {name: 0.7 * expected[name] + 0.3 * policy_weights[name] for name in expected}
    held = trainer.model if kind == "lora" else trainer.ref_model
    moved = whole_weights(held, "ref")
    assert max((found.steps[-1][name] - expected[name]).abs().max().item() for name in expected) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(moved[name], value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_after_a_reset_the_policy_is_its_own_reference(tmp_path, tokenizer, policy, kind):
    rule = PeriodicReset(every=2)
    trainer = moving_trainer(tmp_path, tokenizer, policy, rule, kind=kind, reference_model=policy, max_steps=4)
    trainer.train()
    ratios = [log["logratios/chosen"] for log in trainer.state.log_history if "loss" in log]
    assert [abs(each) < 1e-6 for each in ratios] == [True, False, True, False]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_resumed_run_is_the_run(tmp_path, tokenizer, policy, kind):
    rule = MovingAverage(alpha=0.3, every=2)
    config = {"reference_model": policy, "max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    whole = moving_trainer(tmp_path, tokenizer, policy, rule, kind=kind, **config)
    whole.train()
    resumed = moving_trainer(tmp_path, tokenizer, policy, rule, kind=kind, **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    history = [{k: v for k, v in log.items() if k in ("loss", "rewards/margins")} for log in whole.state.log_history]
    again = [{k: v for k, v in log.items() if k in ("loss", "rewards/margins")} for log in resumed.state.log_history]
    assert history == again

    (tmp_path / "checkpoint-3" / "moving_references.json").unlink()
    with pytest.raises(TrainingError, match="the state of the moving reference is missing"):
        moving_trainer(tmp_path, tokenizer, policy, rule, kind=kind, **config).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )

"""FDPOTrainer: TRL's losses and gradients in both layouts, with each of TRL's references."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

import falign
from falign.integrations.trl import FDPOTrainer
from tests.equivalence.test_trl import (
    BETA,
    DIVERGENCES,
    ROWS,
    assert_same,
    policy,
    reference_model,
    tokenizer,
    trl_result,
)
from tests.models.tiny import fill_adapter

__all__ = ["policy", "reference_model", "tokenizer"]

# TRL 1.16 and PEFT 0.21 read an attribute that Transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LAYOUTS = ("trl", "tree", "padded")
LORA = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")


def rows(number=None):
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in ROWS[:number]])


def settings(folder, **further):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(ROWS),
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        **further,
    }


def trainer(cls, folder, tokenizer, policy, reference_model=None, *, config=None, data=None, **further):
    """A trainer of either class, on copies of the models."""
    return cls(
        copy.deepcopy(policy),
        copy.deepcopy(reference_model),
        DPOConfig(**settings(folder, **(config or {}))),
        train_dataset=rows() if data is None else data,
        processing_class=tokenizer,
        **further,
    )


def same_weights(one, other):
    """Move the trained weights of two models to the same place."""
    generator = torch.Generator().manual_seed(0)
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
            theirs[name].data = parameter.data.clone()


def metrics_of(trainer):
    return {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "js_divergence", "alpha_0.3"])
@pytest.mark.parametrize("kind", ["full", "adapter_off", "ref_adapter", "precomputed"])
def test_loss_and_gradient_are_those_of_trl(tmp_path, tokenizer, policy, reference_model, divergence, layout, kind):
    theirs_config, name = DIVERGENCES[divergence]
    config = {"beta": BETA, "precompute_ref_log_probs": kind == "precomputed"}
    given, further = {"reference_model": reference_model}, {}
    if kind == "adapter_off":
        given, further = {}, {"peft_config": LORA}
    if kind == "ref_adapter":
        given, policy = {}, fill_adapter(get_peft_model(policy, LORA), scale=0.2)
    theirs = trainer(DPOTrainer, tmp_path, tokenizer, policy, **given, config=config | theirs_config, **further)
    ours = trainer(
        FDPOTrainer,
        tmp_path,
        tokenizer,
        policy,
        **given,
        config=config,
        objective=falign.FDPO(name, BETA),
        layout=layout,
        **further,
    )
    same_weights(ours.model, theirs.model)
    result = trl_result(ours, next(iter(ours.get_train_dataloader())))
    expected = trl_result(theirs, next(iter(theirs.get_train_dataloader())))
    assert_same(result, expected)
    found, known = metrics_of(ours), metrics_of(theirs)
    assert abs(found["logratios/chosen"]) > 0.1
    given_up = set() if layout == "trl" else {"logits/chosen", "logits/rejected", "mean_token_accuracy"}
    assert known.keys() - found.keys() == given_up
    rewards = {metric for metric in known if metric.startswith("rewards/")}
    for metric in known.keys() - given_up - (set() if divergence == "reverse_kl" else rewards):
        assert found[metric] == pytest.approx(known[metric], rel=1e-5, abs=1e-6), metric


@pytest.mark.parametrize("objective", [falign.FDPO("js_divergence", BETA), falign.TDPO(beta=BETA)])
def test_trees_compute_in_mixed_precision_and_reduce_in_float32(
    tmp_path, tokenizer, policy, reference_model, objective
):
    given = (FDPOTrainer, tmp_path, tokenizer, policy, reference_model)
    exact, mixed = (
        trainer(*given, config={"bf16": bf16}, objective=objective, layout="tree") for bf16 in (False, True)
    )
    types = []
    mixed.model.get_output_embeddings().register_forward_hook(lambda _, args, output: types.append(output.dtype))
    batch = next(iter(exact.get_train_dataloader()))
    expected, found = trl_result(exact, batch), trl_result(mixed, batch)
    assert set(types) == {torch.bfloat16}
    assert found.loss == pytest.approx(expected.loss, abs=3e-2)
    assert found.loss != pytest.approx(expected.loss, abs=1e-6)
    for name, gradient in expected.gradients.items():
        assert found.gradients[name].dtype == torch.float32
        assert torch.cosine_similarity(found.gradients[name].flatten(), gradient.flatten(), dim=0) > 0.98, name

"""FKTOTrainer: TRL's losses, gradients and metrics, and a reference point over the whole step."""

import copy

import pytest
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from falign.integrations.trl import FKTOTrainer
from falign.methods import KTO
from tests.equivalence.test_trl import assert_same, policy, reference_model, tokenizer, trl_result
from tests.equivalence.test_trl_kto import BETA, LABELED, WEIGHTS
from tests.integrations.trl.test_dpo import LAYOUTS, LORA, metrics_of, same_weights, settings

__all__ = ["policy", "reference_model", "tokenizer"]

# TRL 1.16 and PEFT 0.21 read an attribute that Transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def rows():
    return Dataset.from_list([dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in LABELED])


def trainer(cls, folder, tokenizer, policy, reference_model=None, *, config=None, **further):
    given = settings(folder, **{"per_device_train_batch_size": len(LABELED), **(config or {})})
    return cls(
        copy.deepcopy(policy),
        copy.deepcopy(reference_model),
        KTOConfig(**given),
        train_dataset=rows(),
        processing_class=tokenizer,
        **further,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["full", "adapter_off", "precomputed"])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_loss_and_gradient_are_those_of_trl(tmp_path, tokenizer, policy, reference_model, loss_type, layout, kind):
    config = {"beta": BETA, "precompute_ref_log_probs": kind == "precomputed", **WEIGHTS}
    given, further = {"reference_model": reference_model}, {}
    if kind == "adapter_off":
        given, further = {}, {"peft_config": LORA}
    theirs = trainer(
        KTOTrainer, tmp_path, tokenizer, policy, **given, config=config | {"loss_type": loss_type}, **further
    )
    point = "mismatched" if loss_type == "kto" else "zero"
    objective = KTO("reverse_kl", BETA, **WEIGHTS, reference_point=point)
    ours = trainer(
        FKTOTrainer,
        tmp_path,
        tokenizer,
        policy,
        **given,
        config=config,
        objective=objective,
        layout=layout,
        **further,
    )
    same_weights(ours.model, theirs.model)
    result = trl_result(ours, next(iter(ours.get_train_dataloader())))
    expected = trl_result(theirs, next(iter(theirs.get_train_dataloader())))
    assert_same(result, expected)
    found, known = metrics_of(ours), metrics_of(theirs)
    assert found["reference_point"] == pytest.approx(BETA * known["kl"], abs=1e-6)
    given_up = {"kl"} if layout == "trl" else {"kl", "logits/chosen", "logits/rejected"}
    assert known.keys() - found.keys() == given_up
    for metric in known.keys() - given_up:
        assert found[metric] == pytest.approx(known[metric], rel=1e-5, abs=1e-6), metric

"""Objectives, metrics and refusals of the trainers inside TRL."""

import copy
import math
from typing import ClassVar

import pytest
import torch
from peft import PromptTuningConfig
from transformers import MixtralConfig, MixtralForCausalLM
from trl import DPOConfig, DPOTrainer

import falign
from falign.errors import ConfigError
from falign.integrations.trl import FDPOTrainer, FKTOTrainer
from falign.integrations.trl.settings import reads_sums
from falign.methods import KTO
from falign.objectives import (
    Anchored,
    Discriminative,
    DivergenceTo,
    Listwise,
    ObjectiveOutput,
    Pairwise,
    PolicyGradient,
    Selected,
    Sum,
    Supervised,
    Term,
    TokenPairwise,
)
from falign.references import FrozenModel, MovingAverage, objective_inputs
from falign.scoring import pad
from tests.equivalence.test_trl import (
    BETA,
    assert_same,
    falign_result,
    policy,
    reference_model,
    tokenizer,
    trees_of,
    trl_result,
)
from tests.integrations.trl import test_kto
from tests.integrations.trl.test_dpo import metrics_of, rows, settings, trainer

__all__ = ["policy", "reference_model", "tokenizer"]

# TRL 1.16 and PEFT 0.21 read an attribute that Transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

JS = falign.divergences.get("jensen_shannon")


class Own:
    """An objective with the three required members only."""

    needs = frozenset({"preference", "reference_logprobs"})
    measures: ClassVar = {}

    def __call__(self, batch):
        losses = batch.sequence_sum(batch.log_ratio).square() * (0.5 + batch.require("preference"))
        return ObjectiveOutput((Term(losses, torch.ones_like(losses)),), {"own": losses.detach()})


OBJECTIVES = {
    "pairwise": falign.FDPO("alpha(0.4)", BETA, margin_loss="robust(0.1)"),
    "per_token": falign.FDPO("js_divergence", BETA, length_norm="token"),
    "listwise": Listwise(JS, BETA),
    "tdpo": TokenPairwise(JS, beta=BETA, alpha=0.7),
    "sum": Sum(
        {
            "dpo": falign.FDPO("forward_kl", BETA),
            "sft": (Selected(Supervised(), "chosen"), 0.3),
            "anchor": (Selected(Anchored(JS, BETA), "chosen"), 0.2),
        }
    ),
    "own": Own(),
}


@pytest.mark.parametrize("layout", ["trl", "tree"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_gradient_and_metrics_are_those_of_falign(tmp_path, tokenizer, policy, reference_model, name, layout):
    objective = OBJECTIVES[name]
    given = (FDPOTrainer, tmp_path, tokenizer, policy, reference_model)
    if name == "tdpo" and layout == "trl":
        with pytest.raises(ConfigError, match=r"TokenPairwise reads whole distributions .*set layout='tree'"):
            trainer(*given, objective=objective, layout=layout)
        return
    ours = trainer(*given, objective=objective, layout=layout)
    batch = next(iter(ours.get_train_dataloader()))
    result = trl_result(ours, batch)
    alone, reference = copy.deepcopy(policy), FrozenModel(copy.deepcopy(reference_model))
    padded = pad(trees_of(batch), pad_token_id=tokenizer.pad_token_id)
    inputs = objective_inputs(alone, padded, references={"reference": reference}, objective=objective)
    output = objective(inputs.completions)
    output.mean().backward()
    gradients = {each: parameter.grad for each, parameter in alone.named_parameters()}
    assert_same(result._replace(metrics={}), result._replace(loss=output.mean().item(), gradients=gradients))
    found = metrics_of(ours)
    for metric, values in output.metrics.items():
        assert found[metric] == pytest.approx(values.mean().item(), rel=1e-5, abs=1e-6), metric


def test_logged_rewards_are_beta_f_prime_and_those_of_trl_are_not_logged(tmp_path, tokenizer, policy, reference_model):
    given = (FDPOTrainer, tmp_path, tokenizer, policy, reference_model)
    ours = trainer(*given, objective=OBJECTIVES["sum"])
    batch = next(iter(ours.get_train_dataloader()))
    trl_result(ours, batch)
    one = falign.FDPO("forward_kl", BETA)
    reference = FrozenModel(copy.deepcopy(reference_model))
    expected = falign_result(tokenizer, copy.deepcopy(policy), reference, one, batch).metrics
    found = metrics_of(ours)
    assert abs(expected["rewards/chosen"] - BETA * expected["logratios/chosen"]) > 1e-2
    for side in ("chosen", "rejected", "margins", "accuracies"):
        assert found[f"rewards/{side}"] == pytest.approx(expected[f"rewards/{side}"], rel=1e-5, abs=1e-6)

    without = trainer(*given, objective=Own())  # defines no reward
    trl_result(without, batch)
    assert not [name for name in metrics_of(without) if name.startswith("rewards/")]


@pytest.mark.parametrize("layout", ["trl", "tree"])
def test_evaluation_counts_each_pair_once(tmp_path, tokenizer, policy, reference_model, layout):
    config = {"per_device_eval_batch_size": 3}
    ours = trainer(
        FDPOTrainer, tmp_path, tokenizer, policy, reference_model, config=config, eval_dataset=rows(),
        objective=falign.FDPO("js_divergence", BETA), layout=layout,
    )  # fmt: skip
    found = ours.evaluate()
    trl_result(ours, next(iter(ours.get_train_dataloader())))
    for name, value in metrics_of(ours).items():
        if not name.startswith(("entropy", "logits", "num_tokens", "mean_token")):
            assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("layout", ["trl", "tree"])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "alpha(0.5)", "jeffreys"])
def test_numbers_stay_finite_for_extreme_log_ratios(tmp_path, tokenizer, policy, reference_model, name, layout):
    """TRL's own loss is NaN here for the forward KL."""
    far = copy.deepcopy(policy)
    far.lm_head.weight.data *= 3000.0
    ours = trainer(
        FDPOTrainer, tmp_path, tokenizer, far, reference_model, objective=falign.FDPO(name, BETA), layout=layout
    )
    result = trl_result(ours, next(iter(ours.get_train_dataloader())))
    found = metrics_of(ours)
    assert abs(found["logratios/chosen"]) > 1000
    assert math.isfinite(result.loss)
    assert all(gradient.isfinite().all() for gradient in result.gradients.values())
    assert all(map(math.isfinite, found.values()))


def test_an_auxiliary_loss_of_experts_is_inherited_or_refused(tmp_path, tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(
        **sizes, vocab_size=200, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
        max_position_embeddings=128, initializer_range=0.2, output_router_logits=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    given = (tmp_path, tokenizer, model, copy.deepcopy(model))
    settings = {"beta": BETA, "router_aux_loss_coef": 0.5}
    theirs = trainer(DPOTrainer, *given, config=settings)
    ours = trainer(FDPOTrainer, *given, config=settings, objective=falign.FDPO(beta=BETA))
    results = [trl_result(each, next(iter(each.get_train_dataloader()))) for each in (ours, theirs)]
    assert metrics_of(ours)["aux_loss"] > 0.1
    router = next(name for name in results[0].gradients if "gate" in name)
    assert_same(*(each._replace(gradients={router: each.gradients[router]}) for each in results))
    with pytest.raises(ConfigError, match=r"layout='tree' .*set router_aux_loss_coef=0.0"):
        trainer(FDPOTrainer, *given, config=settings, objective=falign.FDPO(beta=BETA), layout="tree")


def test_a_further_reference_and_one_made_from_the_policy(tmp_path, tokenizer, policy, reference_model):
    divergence = DivergenceTo(JS, "teacher")

    class ToTeacher(Own):
        needs = frozenset({"preference"})
        measures: ClassVar = {"to_teacher": divergence}

        def __call__(self, batch):
            losses = batch.sequence_sum(batch.require("measures.to_teacher"))
            return ObjectiveOutput((Term(losses, torch.ones_like(losses)),), {})

    teacher = FrozenModel(copy.deepcopy(reference_model))
    objective = Sum({"dpo": falign.FDPO(beta=BETA), "kd": ToTeacher()})
    given = {"objective": objective, "layout": "tree", "reference": lambda model: FrozenModel(copy.deepcopy(model))}
    ours = trainer(FDPOTrainer, tmp_path, tokenizer, policy, policy, references={"teacher": teacher}, **given)
    result = trl_result(ours, next(iter(ours.get_train_dataloader())))
    assert result.loss > math.log(2) + 0.01
    assert result.metrics["dpo/logratios/chosen"] == pytest.approx(0.0, abs=1e-5)
    with pytest.raises(ConfigError, match="reads the reference 'teacher': give references="):
        trainer(FDPOTrainer, tmp_path, tokenizer, policy, policy, **given)


def test_what_reads_sums_is_found_by_trying():
    sums = {name: reads_sums(falign.objectives.complete(each)) for name, each in OBJECTIVES.items()}
    assert sums == {**dict.fromkeys(OBJECTIVES, True), "tdpo": False}
    assert not reads_sums(Sum({"dpo": falign.FDPO(), "f_sft": Selected(falign.methods.FSFT(), "chosen")}))
    assert reads_sums(KTO())


ARGS = {
    "loss_type": (["hinge"], "margin_loss"),
    "loss_weights": ([0.5], "Sum"),
    "f_divergence_type": ("js_divergence", "FDPO"),
    "f_alpha_divergence_coef": (0.3, "1 minus"),
    "label_smoothing": (0.1, "margin_loss"),
    "label_smoothing_factor": (0.1, "margin losses"),
    "ld_alpha": (0.5, "LD-DPO"),
    "use_weighting": (True, "WPO"),
    "discopop_tau": (0.1, "DiscoPOP"),
    "beta": (0.3, "the objective's beta=0.4 differ"),
}


@pytest.mark.parametrize("name", ARGS)
def test_settings_without_effect_are_refused_by_name(tmp_path, tokenizer, policy, name):
    value, remedy = ARGS[name]
    with pytest.raises(ConfigError, match=rf"DPOConfig\.{name}=.*{remedy}"):
        trainer(FDPOTrainer, tmp_path, tokenizer, policy, config={name: value}, objective=falign.FDPO(beta=BETA))


def test_the_objective_gives_beta_and_the_users_configuration_stays(tmp_path, tokenizer, policy, caplog):
    args = DPOConfig(**settings(tmp_path))
    ours = FDPOTrainer(
        policy,
        copy.deepcopy(policy),
        args,
        train_dataset=rows(),
        processing_class=tokenizer,
        objective=falign.FDPO(beta=BETA),
    )
    assert (ours.args.beta, ours.beta, args.beta) == (BETA, BETA, 0.1)
    assert "DPOConfig.beta=0.1 is TRL's default; the objective's beta=0.4 is used" in caplog.text


REFUSED = {
    "samples": ({"objective": PolicyGradient()}, "reads .*rewards.*FGRPOTrainer"),
    "discriminative": ({"objective": Discriminative()}, "reads rewards.*FGRPOTrainer"),
    "labels": ({"objective": KTO()}, "Unpaired reads labels: take FKTOTrainer"),
    "imitates": ({"objective": Supervised()}, r"Selected\(Supervised\(...\), 'chosen'\)"),
    "weights": ({"objective": Pairwise(JS, weighting="data")}, r"reads token weights \(data\)"),
    "needs": ({"objective": type("Listed", (Own,), {"needs": ["preference"]})()}, "Listed.needs is"),
    "reference": ({"reference": FrozenModel(torch.nn.Linear(1, 1))}, "reference with layout='trl'"),
    "references": ({"references": {"teacher": FrozenModel(torch.nn.Linear(1, 1))}}, "references with layout='trl'"),
    "not_a_reference": ({"reference": lambda model: model, "layout": "tree"}, "is not a reference of falign"),
    "keep_end": ({"layout": "tree", "config": {"truncation_mode": "keep_end"}}, "truncation_mode='keep_end'"),
    "sums": (
        {"objective": TokenPairwise(), "layout": "tree", "config": {"precompute_ref_log_probs": True}},
        "TokenPairwise reads the reference at single tokens",
    ),
    "moving_precomputed": (
        {"reference": MovingAverage(0.5, every=1), "config": {"precompute_ref_log_probs": True}},
        "precompute_ref_log_probs=True and reference",
    ),
    "moving_twice": (
        {"reference": MovingAverage(0.5, every=1), "config": {"sync_ref_model": True}},
        "sync_ref_model=True and reference",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_requests_that_cannot_work_are_refused_by_name(tmp_path, tokenizer, policy, case):
    given, message = REFUSED[case]
    given = {"objective": falign.FDPO(beta=BETA), **given}
    with pytest.raises(ConfigError, match=message):
        trainer(FDPOTrainer, tmp_path, tokenizer, policy, policy, **given)


def test_learned_prompts_are_refused_as_trees(tmp_path, tokenizer, policy):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    given = {"objective": falign.FDPO(beta=BETA), "peft_config": prompt}
    with pytest.raises(falign.errors.ModelError, match="holds a learned prompt"):
        trainer(FDPOTrainer, tmp_path, tokenizer, policy, layout="tree", **given)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"loss_type": "apo_zero_unpaired"}, "reference_point='zero'"),
        ({"desirable_weight": 2.0}, r"KTOConfig\.desirable_weight=2.0 and the objective's desirable_weight=1.5 differ"),
    ],
)
def test_settings_of_kto_are_refused_by_name(tmp_path, tokenizer, policy, config, message):
    with pytest.raises(ConfigError, match=message):
        test_kto.trainer(
            FKTOTrainer, tmp_path, tokenizer, policy, config=config, objective=KTO(beta=BETA, desirable_weight=1.5)
        )
    with pytest.raises(ConfigError, match="Pairwise reads pairs: take FDPOTrainer"):
        test_kto.trainer(FKTOTrainer, tmp_path, tokenizer, policy, objective=falign.FDPO())

"""The numbers of TRL's DPOTrainer, on batches that it made: losses, gradients, metrics, and where the two differ."""

import copy
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from falign import divergences
from falign.methods import FDPO, RPO
from falign.models import add_lora
from falign.objectives import IPO, BaseObjective, CompletionBatch, Exo, Robust, hinge, logistic
from falign.references import AdapterOff, FrozenModel, Reference
from falign.scoring import PromptTree, TokenBatch, TokenScores, completion_scores, pad

# TRL 1.16 and PEFT 0.21 read an attribute that Transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BETA = 0.4
NOISE = 0.15

# Short completions: TRL subtracts sums of log-probabilities, which costs it digits that a long sum does not have.
ROWS = [
    ("why is the sky blue ?", " light is scattered by air", " no idea"),
    ("name a fruit", " apple", " the red car is it"),
    ("what is two plus three , please tell me ?", " five", " six"),
    ("count to four", " one two three four", " four"),
    ("is water wet ?", " yes , water is", " I think so"),
    ("tell me of the red car , no , of the blue car", " the car is red", " blue"),
    ("who scattered the apple ?", " I", " the sky scattered it"),
    ("say no", " no", " yes , five"),
]

# TRL's settings of a divergence, and falign's name of it: its coefficient is 1 - α.
DIVERGENCES = {
    "reverse_kl": ({"f_divergence_type": "reverse_kl"}, "reverse_kl"),
    "forward_kl": ({"f_divergence_type": "forward_kl"}, "forward_kl"),
    "js_divergence": ({"f_divergence_type": "js_divergence"}, "js_divergence"),
    "alpha_0.3": ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}, "alpha(0.7)"),
    "alpha_0.5": ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}, "alpha(0.5)"),
    "alpha_0.7": ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}, "alpha(0.3)"),
}
MARGIN_LOSSES = {
    "sigmoid": ({"loss_type": ["sigmoid"]}, logistic),
    "hinge": ({"loss_type": ["hinge"]}, hinge),
    "robust": ({"loss_type": ["robust"], "label_smoothing": NOISE}, Robust(NOISE)),
    "exo_pair": ({"loss_type": ["exo_pair"], "label_smoothing": NOISE}, Exo(NOISE)),
}


class Result(NamedTuple):
    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<pad>", "<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator([part for row in ROWS for part in row], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=128
    )


@pytest.fixture
def policy(tokenizer):
    return random_llama(tokenizer, seed=12)


@pytest.fixture
def reference_model(tokenizer):
    return random_llama(tokenizer, seed=13)


def random_llama(tokenizer, *, seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.12,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def dpo_trainer(folder, tokenizer, policy, reference_model, *, peft_config=None, **settings):
    args = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(ROWS),
        beta=BETA,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in ROWS]
    return DPOTrainer(
        model=policy,
        ref_model=reference_model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def trl_result(trainer, batch) -> Result:
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return Result(loss.item(), gradients_of(trainer.model), metrics)


def gradients_of(model) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def trees_of(batch) -> list[PromptTree]:
    """Read TRL's rows, all chosen ones before all rejected ones, by its masks alone."""
    prompts, completions = [], []
    for ids, attention, completion in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool(), strict=True
    ):
        prompts.append(tuple(ids[attention & ~completion].tolist()))
        completions.append(tuple(ids[completion].tolist()))
    half = len(prompts) // 2
    assert prompts[:half] == prompts[half:]
    return [
        PromptTree(prompt, pair, preference=(1.0, 0.0))
        for prompt, pair in zip(prompts[:half], zip(completions[:half], completions[half:], strict=True), strict=True)
    ]


def scored(tokenizer, policy, reference: Reference, batch) -> tuple[TokenBatch, TokenScores, CompletionBatch]:
    padded = pad(trees_of(batch), pad_token_id=tokenizer.pad_token_id)
    # Fewer positions at once than the batch has, so that the head's chunks are compared too.
    scores = completion_scores(policy, padded, chunk_tokens=7)
    completions = CompletionBatch(
        logprobs=scores.logprobs,
        completion_mask=padded.completion_mask,
        prompt_index=padded.prompt_index,
        reference_logprobs=reference.logprobs(policy, padded),
        preference=padded.preference,
    )
    return padded, scores, completions


def falign_result(tokenizer, policy, reference: Reference, objective: BaseObjective, batch) -> Result:
    padded, scores, completions = scored(tokenizer, policy, reference, batch)
    output = objective(completions)
    loss = output.mean()
    loss.backward()
    metrics = {name: values.mean().item() for name, values in output.metrics.items()}
    metrics["entropy"] = scores.entropy[padded.completion_mask].mean().item()
    return Result(loss.item(), gradients_of(policy), metrics)


def assert_same(ours: Result, theirs: Result, *, scale: float = 1.0):
    """Compare falign's result with ``scale`` times TRL's."""
    assert ours.loss == pytest.approx(scale * theirs.loss, rel=0, abs=1e-6)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert gradient.norm() > 0, name
        difference = (ours.gradients[name] - scale * gradient).norm() / (scale * gradient.norm())
        assert difference.item() <= 1e-5, name


def results(folder, tokenizer, policy, reference_model, objective, settings) -> tuple[Result, Result]:
    """Return falign's and TRL's results of one batch that TRL made, each on its own copy of the two models."""
    ours, reference = copy.deepcopy(policy), FrozenModel(copy.deepcopy(reference_model))
    trainer = dpo_trainer(folder, tokenizer, policy, reference_model, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    return falign_result(tokenizer, ours, reference, objective, batch), trl_result(trainer, batch)


@pytest.mark.parametrize("margin_loss", MARGIN_LOSSES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_f_dpo_has_the_loss_and_gradient_of_trl(tmp_path, tokenizer, policy, reference_model, divergence, margin_loss):
    (trl_divergence, name), (trl_loss, loss) = DIVERGENCES[divergence], MARGIN_LOSSES[margin_loss]
    objective = FDPO(name, BETA, margin_loss=loss)
    assert_same(*results(tmp_path, tokenizer, policy, reference_model, objective, trl_divergence | trl_loss))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_adapter_has_the_gradient_of_trl_with_the_adapter_off_as_reference(tmp_path, tokenizer, policy, divergence):
    trl_divergence, name = DIVERGENCES[divergence]
    ours = add_lora(copy.deepcopy(policy), r=4, alpha=12, seed=0)
    lora = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = dpo_trainer(tmp_path, tokenizer, policy, None, peft_config=lora, **trl_divergence)
    generator = torch.Generator().manual_seed(0)
    theirs = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    for parameter_name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
            theirs[parameter_name].data = parameter.data.clone()
    batch = next(iter(trainer.get_train_dataloader()))
    result = falign_result(tokenizer, ours, AdapterOff(), FDPO(name, BETA), batch)
    assert max(abs(result.metrics["logratios/chosen"]), abs(result.metrics["logratios/rejected"])) > 0.1
    assert_same(result, trl_result(trainer, batch))


def test_trl_ignores_label_smoothing_with_its_sigmoid_loss(tmp_path, tokenizer, policy, reference_model):
    settings = {"loss_type": ["sigmoid"], "label_smoothing": NOISE}
    ours, theirs = results(tmp_path, tokenizer, policy, reference_model, FDPO("reverse_kl", BETA), settings)
    assert_same(ours, theirs)


@pytest.mark.parametrize("divergence", ["reverse_kl", "js_divergence"])
def test_a_likelihood_of_chosen_completions_is_added_as_in_trl(
    tmp_path, tokenizer, policy, reference_model, divergence
):
    trl_divergence, name = DIVERGENCES[divergence]
    settings = trl_divergence | {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}
    objective = RPO(name, BETA, sft_weight=0.3)
    assert_same(*results(tmp_path, tokenizer, policy, reference_model, objective, settings))


def test_ipo_is_that_of_trl(tmp_path, tokenizer, policy, reference_model):
    settings = {"loss_type": ["ipo"]}
    objective = FDPO("reverse_kl", BETA, margin_loss="ipo")
    assert objective.length_norm == "token"
    ours, theirs = results(tmp_path, tokenizer, policy, reference_model, objective, settings)
    assert_same(ours, theirs)


def test_the_squared_loss_per_token_is_ipo_times_beta_squared(tmp_path, tokenizer, policy, reference_model):
    objective = FDPO("reverse_kl", BETA, margin_loss="squared", length_norm="token")
    ours, theirs = results(tmp_path, tokenizer, policy, reference_model, objective, {"loss_type": ["ipo"]})
    assert_same(ours, theirs, scale=BETA**2)


@pytest.mark.parametrize("margin_loss", ["ipo", IPO(BETA)])
def test_ipo_of_whole_completions_has_another_name(margin_loss):
    with pytest.raises(ValueError, match="choose the loss of whole completions, 'squared'"):
        FDPO("reverse_kl", BETA, margin_loss=margin_loss, length_norm="none")
    assert FDPO("reverse_kl", BETA, margin_loss=margin_loss) == FDPO(
        "reverse_kl", BETA, margin_loss="ipo", length_norm="token"
    )


def test_sigmoid_norm_of_trl_is_f_dpo_per_token_for_the_reverse_kl(tmp_path, tokenizer, policy, reference_model):
    objective = FDPO("reverse_kl", BETA, length_norm="token")
    settings = {"loss_type": ["sigmoid_norm"]}
    assert_same(*results(tmp_path, tokenizer, policy, reference_model, objective, settings))


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "reverse_kl"])
def test_ipo_of_trl_divides_the_link_by_the_length_and_falign_the_log_ratio(
    tmp_path, tokenizer, policy, reference_model, divergence
):
    trl_divergence, name = DIVERGENCES[divergence]
    ours, reference = copy.deepcopy(policy), FrozenModel(copy.deepcopy(reference_model))
    trainer = dpo_trainer(tmp_path, tokenizer, policy, reference_model, loss_type=["ipo"], **trl_divergence)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trl_result(trainer, batch)

    _, _, completions = scored(tokenizer, ours, reference, batch)
    log_ratio = completions.sequence_sum(completions.logprobs - completions.reference_logprobs)
    scores = divergences.get(name).f_prime(log_ratio) / completions.num_tokens
    margin = BETA * (scores[0::2] - scores[1::2])
    ((margin - 0.5) ** 2).mean().backward()
    loss = ((margin - 0.5) ** 2).mean().item()
    assert_same(Result(loss, gradients_of(ours), {}), theirs, scale=BETA**2)

    per_token = FDPO(name, BETA, margin_loss="squared", length_norm="token")(completions).mean().item()
    assert abs(per_token - loss) > 1e-3


def test_metrics_are_those_of_trl_for_the_reverse_kl(tmp_path, tokenizer, policy, reference_model):
    objective = FDPO("reverse_kl", BETA)
    ours, theirs = results(tmp_path, tokenizer, policy, reference_model, objective, {})
    shared = ours.metrics.keys() & theirs.metrics.keys()
    assert shared == ours.metrics.keys() - {"logratios/chosen", "logratios/rejected"}
    for name in shared:
        assert ours.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "reverse_kl"])
def test_rewards_of_trl_are_log_ratios_for_every_divergence_and_those_of_falign_are_not(
    tmp_path, tokenizer, policy, reference_model, divergence
):
    trl_divergence, name = DIVERGENCES[divergence]
    objective = FDPO(name, BETA)
    ours, theirs = results(tmp_path, tokenizer, policy, reference_model, objective, trl_divergence)
    for side in ("chosen", "rejected"):
        assert theirs.metrics[f"rewards/{side}"] == pytest.approx(BETA * ours.metrics[f"logratios/{side}"], abs=1e-6)
        assert abs(ours.metrics[f"rewards/{side}"] - theirs.metrics[f"rewards/{side}"]) > 1e-2


def test_the_pairs_are_moderate_and_lie_on_both_sides_of_the_hinge(tmp_path, tokenizer, policy, reference_model):
    reference = FrozenModel(copy.deepcopy(reference_model))
    trainer = dpo_trainer(tmp_path, tokenizer, policy, reference_model)
    batch = next(iter(trainer.get_train_dataloader()))
    _, _, completions = scored(tokenizer, policy, reference, batch)
    log_ratio = completions.sequence_sum(completions.logprobs - completions.reference_logprobs)
    margin = BETA * (log_ratio[0::2] - log_ratio[1::2])
    assert 1 < log_ratio.abs().max() < 5
    assert margin.min() < 0 < 1 < margin.max()
    assert completions.num_tokens.unique().numel() > 3

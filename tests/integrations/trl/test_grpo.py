"""``FGRPOTrainer``: the penalty's exact mean gradient by enumeration, TRL's own KL term, and a script of TRL's kind."""

from __future__ import annotations

import json
import re

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from falign import divergences
from falign.integrations.trl import FGRPOTrainer
from falign.objectives.penalty import Penalty
from tests.models.tiny import save_tiny
from tests.reference.test_estimators import (
    NAMES,
    OLD,
    REFERENCE,
    gradient,
    textbook_sequence_divergence,
    textbook_token_divergence,
)
from tests.reference.world import COMPLETIONS, WORLD, random_logits, sequence_logprobs, token_logprobs

# TRL 1.16 and PEFT 0.21 use names that Transformers 5.23 has changed.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning")

BETA = 0.3
DIVERGENCES = [name for name in NAMES if name in divergences.names()] + ["alpha(0.3)", "generalized_js(0.9)"]
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
PROMPTS = Dataset.from_list([{"prompt": f"question {i}: "} for i in range(4)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def vowels(completions, **columns):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder.parent / "out"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 5,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return GRPOConfig(**{**settings, **changes})


def loaded(folder, seed=0):
    """The saved model, moved away from the weights on disk, which are the reference."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def built(cls, folder, changes=None, **options):
    return cls(
        loaded(folder),
        vowels,
        arguments(folder, **(changes or {})),
        PROMPTS,
        processing_class=AutoTokenizer.from_pretrained(folder),
        **options,
    )


# The penalty's mean gradient, over every completion of a small world


@pytest.fixture(scope="module")
def trainer(folder):
    return in_training(built(FGRPOTrainer, folder, divergence="reverse_kl", beta=BETA))


@pytest.fixture(scope="module")
def plain(folder):
    return in_training(built(GRPOTrainer, folder, {"beta": BETA}))


def in_training(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def loss_of(trainer, rows, logits, monkeypatch, **further):
    """The loss of a micro-batch of the world's completions with advantages of 0, in float64."""
    policy = token_logprobs(logits)[rows]

    def scored(*_, **__):  # the world's policy is a table of logits, not a model of text
        return policy, torch.zeros_like(policy).detach(), None

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", scored)
    ids = torch.ones(len(rows), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": WORLD.tokens[rows],
        "completion_mask": WORLD.mask[rows].long(),
        "advantages": torch.zeros(len(rows), dtype=torch.float64),
        "num_items_in_batch": torch.tensor(float(len(rows)), dtype=torch.float64),
        "ref_per_token_logps": token_logprobs(REFERENCE)[rows],
    }
    return trainer._compute_loss(trainer.model, inputs | further)


def mean_gradient(trainer, logits, monkeypatch):
    """The gradient of ``E_π`` of the loss, one completion in a micro-batch."""
    law = sequence_logprobs(logits).detach().exp()
    monkeypatch.setattr(trainer, "loss_type", "luspo")
    mean = sum(weight * loss_of(trainer, [row], logits, monkeypatch) for row, weight in enumerate(law))
    return gradient(mean, logits)


def exact_gradient(divergence, level, credit, logits):
    if level == "sequence":
        return gradient(textbook_sequence_divergence(divergence, logits), logits)
    law = logits if credit == "returns" else logits.detach()
    return gradient(textbook_token_divergence(divergence, logits, law), logits)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_mean_gradient_is_that_of_the_divergence_named(name, trainer, monkeypatch):
    logits, divergence = random_logits(0).requires_grad_(), divergences.get(name)
    monkeypatch.setattr(trainer, "penalty", Penalty(divergence, "sequence"))
    mean = mean_gradient(trainer, logits, monkeypatch)
    torch.testing.assert_close(mean, BETA * exact_gradient(divergence, "sequence", "fixed_prefix", logits))
    # Each completion once, with TRL's weights: those of a sampler that draws all equally often, then a step of π_old.
    every = list(range(len(COMPLETIONS)))
    further = {
        "old_per_token_logps": token_logprobs(OLD),
        "importance_sampling_ratio": len(every) * sequence_logprobs(OLD).exp()[:, None],
    }
    for credit in ("fixed_prefix", "returns"):
        for loss_type in ("luspo", "dapo"):
            monkeypatch.setattr(trainer, "penalty", Penalty(divergence, "token", credit))
            monkeypatch.setattr(trainer, "loss_type", loss_type)
            mean = gradient(loss_of(trainer, every, logits, monkeypatch, **further), logits)
            torch.testing.assert_close(mean, BETA * exact_gradient(divergence, "token", credit, logits))


def test_the_mean_over_the_others_of_a_micro_batch_is_subtracted_from_each_completion(trainer, monkeypatch):
    logits, divergence = random_logits(0).requires_grad_(), divergences.get("jensen_shannon")
    monkeypatch.setattr(trainer, "penalty", Penalty(divergence, "sequence"))
    monkeypatch.setattr(trainer, "loss_type", "luspo")
    rows = [3, 17, 30]
    logprobs = sequence_logprobs(logits)[rows]
    slopes = divergence.f_prime(logprobs.detach() - sequence_logprobs(REFERENCE)[rows])
    centered = slopes - (slopes.sum() - slopes) / 2
    torch.testing.assert_close(
        gradient(loss_of(trainer, rows, logits, monkeypatch), logits),
        gradient(BETA * (centered * logprobs).mean(), logits),
    )


def test_the_kl_term_of_trl_has_another_gradient_unless_it_is_corrected(plain, monkeypatch):
    logits = random_logits(0).requires_grad_()
    reverse, forward = (
        BETA * exact_gradient(divergences.get(f"{name}_kl"), "token", "fixed_prefix", logits)
        for name in ("reverse", "forward")
    )
    monkeypatch.setattr(plain.args, "use_bias_correction_kl", False)
    of_k3 = mean_gradient(plain, logits, monkeypatch)
    torch.testing.assert_close(of_k3, forward)
    assert torch.cosine_similarity(of_k3.flatten(), reverse.flatten(), dim=0) < 0.9
    monkeypatch.setattr(plain.args, "use_bias_correction_kl", True)
    torch.testing.assert_close(mean_gradient(plain, logits, monkeypatch), reverse)


# TRL's own numbers


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_reverse_kl_of_tokens_is_the_kl_term_of_trl(loss_type, folder, trainer, plain, monkeypatch):
    """Loss, gradient and ``kl`` are TRL's in every loss type, also where completions are from an older policy."""
    monkeypatch.setattr(trainer, "penalty", Penalty(divergences.get("reverse_kl"), "token", importance="token"))
    inputs = random_inputs(trainer)
    found = {}
    for name, each in (("falign", trainer), ("trl", plain)):
        monkeypatch.setattr(each, "loss_type", loss_type)
        monkeypatch.setattr(each, "current_gradient_accumulation_steps", 2)
        each._metrics["train"].clear()
        loss = each._compute_loss(each.model, inputs)
        gradients = torch.autograd.grad(loss, list(each.model.parameters()))
        found[name] = loss, gradients, each._metrics["train"]
    torch.testing.assert_close(found["falign"][0], found["trl"][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["falign"][1], found["trl"][1], rtol=1e-4, atol=1e-6)
    ours, theirs = found["falign"][2], found["trl"][2]
    assert set(ours) - set(theirs) == {"divergence/reverse_kl", "logratios/policy"}
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=1e-5), name


def random_inputs(trainer):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 200, (4, 9), generator=generator)
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[1, 3:] = mask[2, 1:] = 0
    inputs = {
        "prompt_ids": ids[:, :4],
        "prompt_mask": torch.ones(4, 4, dtype=torch.long),
        "completion_ids": ids[:, 4:],
        "completion_mask": mask,
        "advantages": torch.randn(4, generator=generator),
        "num_items_in_batch": torch.tensor(29.0),
    }
    with torch.no_grad():
        whole = torch.cat([inputs["prompt_mask"], mask], dim=1)
        logprobs, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, whole, 5)
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        inputs[name] = logprobs + 0.2 * torch.randn(logprobs.shape, generator=generator)
    return inputs


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_numbers_stay_finite_far_from_the_reference(level, trainer, monkeypatch):
    inputs = random_inputs(trainer)
    inputs["ref_per_token_logps"] += 1e4 * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    monkeypatch.setattr(trainer, "loss_type", "grpo")
    for name in DIVERGENCES:
        monkeypatch.setattr(trainer, "penalty", Penalty(divergences.get(name), level))
        loss = trainer._compute_loss(trainer.model, inputs)
        gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
        assert all(each.isfinite().all() for each in (loss, *gradients)), name
        assert trainer._metrics["train"]["kl"][-1] < float("inf")


def test_tokens_that_a_tool_wrote_and_truncated_completions_carry_no_penalty(trainer, monkeypatch):
    """The divergence of the remaining tokens, in value and gradient, is that of shorter completions."""
    monkeypatch.setattr(trainer, "penalty", Penalty(divergences.get("jensen_shannon"), "sequence"))
    monkeypatch.setattr(trainer, "loss_type", "luspo")
    inputs = random_inputs(trainer) | {"advantages": torch.zeros(4)}
    inputs["completion_mask"][3] = 0  # as by mask_truncated_completions
    inputs["tool_mask"] = torch.tensor([[1, 1, 0, 0, 1]]).expand(4, -1)
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    gap = inputs["ref_per_token_logps"].masked_fill(~mask, 0.0).sum(-1)
    trainer._metrics["train"].clear()
    trainer._compute_loss(trainer.model, inputs)
    with torch.no_grad():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logprobs, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, seen, 5)
    expected = (logprobs.masked_fill(~mask, 0.0).sum(-1) - gap)[:3].mean()
    assert trainer._metrics["train"]["logratios/policy"] == pytest.approx([expected.item()], rel=1e-4)


# A script


SCRIPT = """
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig
{import_line}

dataset = load_dataset("json", data_files={data!r}, split="train")


def reward_num_unique_letters(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


training_args = GRPOConfig(
    output_dir={output!r},
    per_device_train_batch_size=4,
    num_generations=4,
    max_completion_length=5,
    max_steps=2,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=2,
    num_iterations=2,
    learning_rate=0.01,
    report_to="none",
    use_cpu=True,
    bf16=False,
)
trainer = {name}(
    model={model!r},
    reward_funcs=reward_num_unique_letters,
    args=training_args,
    train_dataset=dataset,
    eval_dataset=dataset.select(range(2)),
    peft_config=LoraConfig(r=4, target_modules="all-linear"),{penalty}
)
trainer.train()
"""


def run_script(folder, tmp_path, name, import_line, penalty):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"question {i}: "}) + "\n" for i in range(4)))
    places = {"data": str(data), "output": str(tmp_path / "out"), "model": str(folder)}
    scope = {}
    exec(SCRIPT.format(**places, name=name, import_line=import_line, penalty=penalty), scope)
    return scope["trainer"]


def test_a_script_of_trl_runs_with_one_import_changed(folder, tmp_path):
    trainer = run_script(
        folder,
        tmp_path,
        "FGRPOTrainer",
        "from falign.integrations.trl import FGRPOTrainer",
        '\n    divergence="jensen_shannon",\n    beta=0.04,\n    level="sequence",',
    )
    plain = run_script(folder, tmp_path, "GRPOTrainer", "from trl import GRPOTrainer", "")
    (*_, first), (*_, held_out) = (
        [entry for entry in trainer.state.log_history if key in entry] for key in ("kl", "eval_kl")
    )
    known = {name for entry in plain.state.log_history for name in entry}
    own = {name for entry in trainer.state.log_history for name in entry}
    new = {"kl", "divergence/jensen_shannon", "logratios/policy"}
    assert own - known == {*new, *(f"eval_{name}" for name in new)}
    assert first["divergence/jensen_shannon"] > 0  # the adapter has moved away from the base model
    assert held_out["eval_kl"] > 0
    assert trainer.args.beta == 0.04
    assert trainer.ref_model is None  # the adapter switched off


@pytest.mark.parametrize(
    ("changes", "options", "part"),
    [
        ({}, {}, "beta=0.0 must be positive"),
        ({"beta": 0.1}, {"beta": 0.2}, "beta=0.2 and args.beta=0.1: give one"),
        ({"top_p": 0.9}, {"beta": 0.1}, "args.top_p=0.9"),
        ({"generation_kwargs": {"top_k": 5}}, {"beta": 0.1}, "args.top_k=5"),
        ({"use_bias_correction_kl": False}, {"beta": 0.1}, "divergence='forward_kl' if that is meant"),
        ({"loss_type": "other"}, {"beta": 0.1}, "args.loss_type='other'"),
        ({}, {"beta": 0.1, "level": "vocabulary"}, "level='vocabulary'"),
        ({}, {"beta": 0.1, "credit": "returns", "level": "sequence"}, "credit='returns'"),
        ({}, {"beta": 0.1, "divergence": "jensen_shanon"}, "jensen_shannon"),
    ],
)
def test_what_cannot_carry_the_penalty_is_refused_by_name(changes, options, part, folder):
    with pytest.raises(ValueError, match=re.escape(part)):
        built(FGRPOTrainer, folder, changes, **({"divergence": "jensen_shannon"} | options))

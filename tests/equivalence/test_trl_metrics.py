"""The metrics that falign logs under TRL's names have the values that TRL computes for the same completions."""

import copy

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from falign.methods import FDPO
from falign.objectives import CompletionBatch, PolicyGradient
from falign.references import FrozenModel, objective_inputs
from falign.scoring import pad
from falign.training.online.rollout_scorer import correct
from falign.training.trl_metrics import (
    clip_metrics,
    correction_metrics,
    data_metrics,
    kl_to_reference,
    length_metrics,
    num_tokens,
    reward_metrics,
    sampling_metrics,
)
from tests.equivalence.test_trl import dpo_trainer, policy, reference_model, tokenizer, trees_of, trl_result  # noqa: F401

# TRL 1.16 and PEFT 0.21 use names that Transformers 5.23 has changed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning"),
]

CAP = 1.2


def values_of(metrics: dict[str, Tensor]) -> dict[str, float]:
    """One number of each metric, as a run of one step logs it."""
    extremes = {"max": torch.Tensor.max, "min": torch.Tensor.min}
    return {
        name: extremes.get(name.replace("_", "/").rpartition("/")[2], torch.Tensor.mean)(values.double()).item()
        for name, values in metrics.items()
    }


def assert_theirs(ours: dict[str, float], theirs: dict[str, list[float]], names: set[str]):
    assert set(ours) == names
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name][-1], rel=1e-5, abs=1e-6), name


def test_pairs_have_the_accuracy_logits_and_tokens_of_dpo(tmp_path, tokenizer, policy, reference_model):  # noqa: F811
    text = tokenizer(" light is scattered by air yes , water is one two three four</s>", return_tensors="pt")[
        "input_ids"
    ]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.02)
    for _ in range(4):  # until it predicts some tokens
        policy(text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = copy.deepcopy(policy)
    trainer = dpo_trainer(tmp_path, tokenizer, policy, reference_model)
    batch = next(iter(trainer.get_train_dataloader()))
    trl_result(trainer, batch)
    rows = pad(trees_of(batch), pad_token_id=tokenizer.pad_token_id)
    scored = objective_inputs(
        ours, rows, references={"reference": FrozenModel(reference_model)}, objective=FDPO(), chunk_tokens=7
    )
    logged = values_of(data_metrics(scored)) | {"num_tokens": num_tokens(rows)}
    assert 0 < logged["mean_token_accuracy"] < 1
    names = {"mean_token_accuracy", "logits/chosen", "logits/rejected", "num_tokens"}
    assert_theirs(logged, trainer._metrics["train"], names)


ENDED = 2  # the id of </s>
COMPLETIONS = [
    [7, 9, 30, ENDED],
    [8, 11, 12, 13, 14],
    [40, ENDED],
    [9, 9, 9, 9, 9],
    [5, ENDED],
    [6, ENDED],
    [3],
    [4, 4],
]
REWARDS = {"first": [1.0, 0.0, 0.5, 0.25, 1.0, 1.0, 1.0, 1.0], "second": [None, 2.0, 1.0, 0.0, 3.0, 3.0, 3.0, 3.0]}


@pytest.fixture
def grpo(tmp_path, tokenizer, policy, reference_model):  # noqa: F811
    reference_model.save_pretrained(tmp_path / "reference")
    policy.config._name_or_path = str(tmp_path / "reference")  # of which TRL makes the reference

    def rollouts(prompts, trainer):
        generator = torch.Generator().manual_seed(3)
        logprobs = [(torch.rand(len(ids), generator=generator) - 5.3).tolist() for ids in COMPLETIONS]
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": COMPLETIONS, "logprobs": logprobs}

    def first(completions, **columns):
        return REWARDS["first"]

    def second(completions, **columns):
        return REWARDS["second"]

    args = GRPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=5,
        beta=0.1,
        epsilon=0.05,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=CAP,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    rows = [{"prompt": "name a fruit"}] * 4 + [{"prompt": "say no"}] * 4
    trainer = GRPOTrainer(
        policy, [first, second], args, Dataset.from_list(rows), processing_class=tokenizer, rollout_func=rollouts
    )
    # vLLM itself is not needed for completions that are given: these are its weights, at this step.
    trainer.use_vllm, trainer._last_loaded_step, trainer.current_gradient_accumulation_steps = True, 0, 1
    trainer.model.train()
    return trainer, trainer._generate_and_score_completions(rows)


def test_rollouts_have_the_lengths_rewards_and_weights_of_grpo(grpo, tokenizer):  # noqa: F811
    trainer, rollout = grpo
    theirs = trainer._metrics["train"]
    lengths = [len(ids) for ids in COMPLETIONS]
    ours = values_of(length_metrics(lengths, [ids[-1] == ENDED for ids in COMPLETIONS]))
    parts = ("length", "terminated_length")
    names = {f"completions/{kind}_{part}" for kind in ("mean", "min", "max") for part in parts}
    assert_theirs(ours, theirs, names | {"completions/clipped_ratio"})

    sums = [sum(value or 0.0 for value in row) for row in zip(*REWARDS.values(), strict=True)]
    ours = values_of(reward_metrics(torch.tensor(sums).view(2, 4), REWARDS))
    assert ours["frac_reward_zero_std"] == 0.5
    names = {f"rewards/{name}/{kind}" for name in REWARDS for kind in ("mean", "std")}
    assert_theirs(ours, theirs, names | {"frac_reward_zero_std"})

    mask = rollout["completion_mask"].bool()
    old, sampler = rollout["old_per_token_logps"], rollout["sampling_per_token_logps"]
    corrected = correct(old, sampler, mask, importance="token", cap=CAP)
    assert 0 < corrected.cut.mean() < 1
    ours = values_of(sampling_metrics((old - sampler)[mask]) | correction_metrics(corrected.weights))
    names = {f"sampling/sampling_logp_difference/{kind}" for kind in ("mean", "max")}
    names |= {f"sampling/importance_sampling_ratio/{kind}" for kind in ("min", "mean", "max")}
    assert_theirs(ours, theirs, names)


def test_an_update_has_the_kl_and_the_clips_of_grpo(grpo):
    trainer, rollout = grpo
    generator = torch.Generator().manual_seed(4)
    noise = 0.1 * torch.randn(rollout["old_per_token_logps"].shape, generator=generator)
    rollout = rollout | {"old_per_token_logps": rollout["old_per_token_logps"] + noise}
    trainer._compute_loss(trainer.model, rollout)
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
    seen = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
    mask = rollout["completion_mask"].bool()
    logprobs, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, seen, mask.shape[1])
    batch = CompletionBatch(
        logprobs=logprobs,
        completion_mask=mask,
        prompt_index=torch.arange(8) // 4,
        reference_logprobs=rollout["ref_per_token_logps"],
        old_logprobs=rollout["old_per_token_logps"],
        advantages=rollout["advantages"][:, None].expand(mask.shape).clone(),
        rewards=torch.zeros(8),
    )
    objective = PolicyGradient(clip_low=0.05, clip_high=0.05, importance="token")
    clips = clip_metrics(objective(batch).metrics, batch.num_tokens)
    ours = values_of({**clips, "kl": kl_to_reference(batch, mask)})
    assert 0 < ours["clip_ratio/low_mean"] < ours["clip_ratio/region_mean"]
    names = {f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")}
    assert_theirs(ours, trainer._metrics["train"], {"kl"} | names)

"""The loss, gradient and metrics of TRL's KTOTrainer, on batches that it made."""

import copy

import pytest
import torch
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from falign.methods import KTO
from falign.objectives import CompletionBatch
from falign.references import FrozenModel
from falign.scoring import PromptTree, completion_scores, pad
from tests.equivalence.test_trl import (
    BETA,
    ROWS,
    Result,
    assert_same,
    gradients_of,
    policy,
    reference_model,
    tokenizer,
    trl_result,
)

__all__ = ["policy", "reference_model", "tokenizer"]

# TRL 1.16 and PEFT 0.21 read an attribute that Transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LABELED = [
    (prompt, completion, label)
    for i, (prompt, *pair) in enumerate(ROWS)
    for completion, label in zip(pair, (True, False), strict=True)
    if label or i % 2
]
LABELED = LABELED[::2] + LABELED[1::2]  # the completions of a prompt are not neighbors
WEIGHTS = {"desirable_weight": 1.25, "undesirable_weight": 2.0}


def trees_of(batch, prefix=""):
    """Read TRL's rows by its masks alone."""
    parts = (batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "completion_mask"))
    found = []
    for ids, attention, completion, label in zip(*parts, batch["label"].tolist(), strict=True):
        prompt, answer = ids[attention.bool() & ~completion.bool()], ids[completion.bool()]
        found.append(PromptTree(tuple(prompt.tolist()), (tuple(answer.tolist()),), (float(label),)))
    return found


def completions_of(trees, tokenizer, policy, reference):
    padded = pad(trees, pad_token_id=tokenizer.pad_token_id)
    return CompletionBatch(
        logprobs=completion_scores(policy, padded, chunk_tokens=7).logprobs,
        completion_mask=padded.completion_mask,
        prompt_index=padded.prompt_index,
        reference_logprobs=reference.logprobs(policy, padded),
        preference=padded.preference,
    )


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_has_the_loss_gradient_and_metrics_of_trl(tmp_path, tokenizer, policy, reference_model, loss_type):
    args = KTOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(LABELED),
        train_sampling_strategy="sequential",
        beta=BETA,
        loss_type=loss_type,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        **WEIGHTS,
    )
    rows = [dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in LABELED]
    ours, reference = copy.deepcopy(policy), FrozenModel(copy.deepcopy(reference_model))
    trainer = KTOTrainer(
        model=policy,
        ref_model=reference_model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trl_result(trainer, batch)

    published = loss_type == "kto"
    objective = KTO("reverse_kl", BETA, **WEIGHTS, reference_point="mismatched" if published else "zero")
    found = completions_of(trees_of(batch), tokenizer, ours, reference)
    if published:
        with torch.no_grad():
            others = completions_of(trees_of(batch, "KL_"), tokenizer, ours, reference)
            total, weight = objective.step_means["reference_point"](others).sums()
        point = (total / weight).expand(len(LABELED))
        found = CompletionBatch.of({**found.tensors(), "step_means.reference_point": point})
    output = objective(found)
    output.mean().backward()
    metrics = {name: values.mean().item() for name, values in output.metrics.items()}
    assert_same(Result(output.mean().item(), gradients_of(ours), metrics), theirs)
    assert metrics["reference_point"] == pytest.approx(BETA * theirs.metrics["kl"], abs=1e-6)
    assert (metrics["reference_point"] > 0.05) == published
    for side, name in {"desirable": "chosen", "undesirable": "rejected"}.items():
        for metric in ("rewards", "logps"):
            expected = theirs.metrics[f"{metric}/{name}"]
            assert metrics[f"{metric}/{side}"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    log_ratio = found.sequence_sum(found.log_ratio)
    assert 1 < log_ratio.abs().max() < 5

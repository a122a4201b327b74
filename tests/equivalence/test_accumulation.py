"""How a step is cut into micro-batches, and held-out data into batches, changes nothing."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from falign.methods import FDPO, KTO
from falign.objectives import CompletionBatch, Measure, ObjectiveOutput, Pairwise, Term, complete
from falign.references import AdapterOff
from falign.scoring import completion_scores, pack
from tests.equivalence.runs import PAD, alignment_trainer, difference, lora_policy, lora_weights, run, trees


@dataclass(frozen=True)
class PairsAndTokens:
    """f-DPO and the likelihood of the chosen tokens: two means, of which the second has unequal weights per batch."""

    pairs: Pairwise
    needs = frozenset({"reference_logprobs", "preference"})
    measures: ClassVar[dict[str, Measure]] = {}

    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        output = self.pairs(batch)
        chosen = batch.completion_mask & (batch.require("preference") == 1)[:, None]
        tokens = Term(-batch.logprobs, chosen.to(batch.logprobs.dtype), scale=0.3)
        return ObjectiveOutput((*output.terms, tokens), output.metrics)


OBJECTIVES = {
    "forward_kl_robust": FDPO("forward_kl", 0.05, margin_loss="robust(0.1)"),
    "jensen_shannon_per_token": FDPO("jensen_shannon", 2.0, length_norm="token"),
    "pairs_and_tokens": PairsAndTokens(FDPO("reverse_kl", 0.3)),
    "kto": KTO("jensen_shannon", 0.5, undesirable_weight=1.5),
}


@torch.no_grad()
def of_whole_logits(policy, rows):
    """TRL's metrics of pairs, from the logits of one completion after the other."""
    hits, logits = [], {"chosen": [], "rejected": []}
    for row in rows:
        for ids, side in zip(row.completion_ids, ("chosen", "rejected"), strict=True):
            assert row.preference == (1.0, 0.0)
            found = policy(input_ids=torch.tensor([[*row.prompt_ids, *ids]])).logits[0, len(row.prompt_ids) - 1 : -1]
            logits[side].append(found.mean(-1))
            hits += (found.argmax(-1) == torch.tensor(ids)).tolist() if side == "chosen" else []
    means = {f"logits/{side}": torch.cat(values).mean().item() for side, values in logits.items()}
    return {"mean_token_accuracy": sum(hits) / len(hits), **means}


def whole_batch(objective, rows, dtype):
    """The loss, metrics and gradient of all rows at once, with no trainer."""
    policy = lora_policy(trained=True).to(dtype)

    def completions(rows):
        batch = pack(rows, pad_token_id=PAD)
        scores = completion_scores(policy, batch)
        found = CompletionBatch(
            logprobs=scores.logprobs,
            completion_mask=batch.completion_mask,
            prompt_index=batch.prompt_index,
            reference_logprobs=AdapterOff().logprobs(policy, batch),
            preference=batch.preference,
        )
        return batch, scores, found

    batch, scores, found = completions(rows)
    for name, mean in complete(objective).step_means.items():
        longest = max(len(row.prompt_ids) + max(map(len, row.completion_ids)) for row in rows)
        pairs = [
            replace(row, completion_ids=tuple(ids[: longest - len(row.prompt_ids)] for ids in other.completion_ids))
            for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)
        ]
        values = mean(completions(pairs)[2]).values
        found = replace(found, step_means={name: values.mean().expand(len(found.logprobs))})
    output = objective(found)
    output.mean().backward()
    metrics = {name: values.mean().item() for name, values in output.metrics.items()}
    metrics["entropy"] = scores.entropy[batch.completion_mask].mean().item()
    metrics |= of_whole_logits(policy, rows)
    start = lora_weights(policy)
    return output.mean().item(), metrics, {name: weight.grad for name, weight in start.items()}, start


# Of gradients, relative above 1 and absolute below. The finer one shows that the coarser one is rounding.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


# Pairs, pairs per micro-batch, micro-batches.
CUTS = [(8, 8, 1), (8, 4, 2), (8, 1, 8), (8, 3, 3), (7, 4, 2)]


@pytest.mark.parametrize(
    ("dtype", "number", "batch_size", "accumulate"),
    [*((torch.float32, *cut) for cut in CUTS), *((torch.float64, *cut) for cut in CUTS)],
    ids=str,
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_step_has_the_gradient_loss_and_metrics_of_the_whole_batch(
    tmp_path, dtype, objective, number, batch_size, accumulate
):
    rows, objective = trees(number), OBJECTIVES[objective]
    loss, metrics, gradients, start = whole_batch(objective, rows, dtype)
    result = run(
        tmp_path,
        lora_policy(trained=True).to(dtype),
        AdapterOff(),
        objective,
        train=rows,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
    )
    (step,), (log,) = result.gradients, result.logs
    assert difference(step, gradients) <= TOLERANCE[dtype]
    stepped = {name: weight.detach() - 0.1 * gradients[name] for name, weight in start.items()}
    assert difference(result.weights, stepped) <= TOLERANCE[dtype]
    # Transformers sums losses over micro-batches in float32.
    assert log["loss"] == pytest.approx(loss, rel=1e-6)
    for name, value in metrics.items():
        assert log[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


def test_a_model_that_knows_nothing_of_losses_takes_the_same_step(tmp_path):
    # Transformers divides by the number of micro-batches unless model or trainer say that the loss is whole already.
    def outcome(*, accepts_loss_kwargs):
        policy = lora_policy(trained=True)
        policy.get_base_model().accepts_loss_kwargs = accepts_loss_kwargs
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        return run(tmp_path / str(accepts_loss_kwargs), policy, AdapterOff(), FDPO(), train=trees(8), **settings)

    assert outcome(accepts_loss_kwargs=False).logs == outcome(accepts_loss_kwargs=True).logs


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_epoch_that_ends_on_fewer_micro_batches_has_the_steps_of_large_batches(tmp_path, objective):
    # Eight pairs in steps of six: three micro-batches of two and then one, against six at once and then two.
    def outcome(batch_size, accumulate):
        return run(
            tmp_path / f"{batch_size}x{accumulate}",
            lora_policy(trained=True).double(),
            AdapterOff(),
            OBJECTIVES[objective],
            train=trees(8),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            optim="adamw_torch",
            learning_rate=1e-3,
            lr_scheduler_type="linear",
            max_grad_norm=0.5,
        )

    whole, cut = outcome(6, 1), outcome(2, 3)
    assert [len(result.gradients) for result in (whole, cut)] == [2, 2]
    for a, b in zip(cut.gradients, whole.gradients, strict=True):
        assert difference(a, b) <= 1e-12
    assert difference(cut.weights, whole.weights) <= 1e-9
    assert difference(whole.weights, lora_weights(lora_policy(trained=True).double())) > 1e-3
    for a, b in zip(cut.logs, whole.logs, strict=True):
        assert a.keys() == b.keys()
        for name in b.keys() - {"epoch"}:  # transformers counts micro-batches, and so takes 2 of 8 pairs for a half
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("batch_size", [2, 4, 9])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_evaluation_counts_each_row_once_whatever_the_batches(tmp_path, objective, batch_size):
    rows, objective = trees(9), OBJECTIVES[objective]
    loss, metrics, _, _ = whole_batch(objective, rows, torch.float32)
    trainer = alignment_trainer(
        tmp_path,
        lora_policy(trained=True, dropout=0.5),
        AdapterOff(),
        objective,
        train=trees(2),
        held_out=rows,
        per_device_eval_batch_size=batch_size,
    )
    result = trainer.evaluate()
    assert {name for name in result if name.startswith("eval_")} == {f"eval_{name}" for name in ("loss", *metrics)}
    assert result["eval_loss"] == pytest.approx(loss, rel=1e-6)
    for name, value in metrics.items():
        assert result[f"eval_{name}"] == pytest.approx(value, rel=1e-6, abs=1e-6), name


def test_evaluation_during_training_leaves_the_training_as_it_was(tmp_path):
    def outcome(name, **settings):
        policy = lora_policy(trained=True, dropout=0.3)
        return run(tmp_path / name, policy, AdapterOff(), FDPO(beta=0.3), train=trees(8), held_out=trees(3), **settings)

    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    alone = outcome("alone", **settings)
    watched = outcome("watched", eval_strategy="steps", eval_steps=1, **settings)
    assert len(alone.logs) == 4
    assert watched.logs == alone.logs
    assert all(torch.equal(watched.weights[name], weight) for name, weight in alone.weights.items())

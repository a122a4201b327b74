"""Means over a step: one number for all micro-batches, whatever they are, and each term of a sum with its own."""

import pytest
import torch

from falign import divergences
from falign.methods import DisCO
from falign.objectives import CompletionBatch, Selected, Sum, TrustRegion, Unpaired
from falign.objectives.step_means import StepMean
from falign.training.step_means import add_step_means

KL = divergences.get("reverse_kl")


def batch_of(rows, **fields):
    generator = torch.Generator().manual_seed(0)
    ratio = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    old = -torch.rand(6, 3, generator=generator, dtype=torch.float64) - 1
    mask = torch.arange(3) < torch.tensor([3, 1, 2, 3, 2, 1])[:, None]
    whole = {
        "logprobs": old + 0.3 * ratio,
        "old_logprobs": old,
        "reference_logprobs": old - 0.1,
        "completion_mask": mask,
        "prompt_index": torch.tensor([0, 0, 0, 1, 1, 1]),
        "preference": torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]).double(),
        "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]).double(),
    }
    return CompletionBatch.of({**{name: value[rows] for name, value in whole.items()}, **fields})


def test_all_micro_batches_get_the_mean_over_all_of_them():
    region = TrustRegion(KL, 10.0, 0.001)
    parts = [{"completion_mask": torch.zeros(n, 3), "rows": rows} for n, rows in ((2, [0, 1]), (4, [2, 3, 4, 5]))]
    add_step_means(
        parts,
        region.step_means,
        score=lambda inputs, fields: batch_of(inputs["rows"]),
        counts=lambda inputs: True,
        add_up=lambda sums: sums,
    )
    means = [part["columns"]["step_means.divergence"] for part in parts]
    assert [len(mean) for mean in means] == [2, 4]
    assert torch.cat(means).unique().numel() == 1
    whole = region.step_means["divergence"](batch_of(range(6)))
    expected = (whole.values * whole.weights).sum() / whole.weights.sum()
    assert means[0][0].item() == pytest.approx(expected.item(), rel=1e-6)
    # With the mean of the whole step, the losses of micro-batches add up to that of the step.
    terms = [
        region(batch_of(part["rows"], **{"step_means.divergence": expected.expand(len(part["rows"]))})).terms[0]
        for part in parts
    ]
    total = sum((term.losses * term.weights).sum() for term in terms) / sum(term.weights.sum() for term in terms)
    torch.testing.assert_close(total, region(batch_of(range(6))).mean(), rtol=1e-12, atol=1e-14)


def test_a_micro_batch_that_stands_in_does_not_count():
    region = TrustRegion(KL)
    parts = [{"completion_mask": torch.zeros(6, 3), "rows": range(6)}, {"completion_mask": torch.zeros(1, 3)}]
    add_step_means(
        parts,
        region.step_means,
        score=lambda inputs, fields: batch_of(inputs.get("rows", [0])),
        counts=lambda inputs: "rows" in inputs,
        add_up=lambda sums: sums,
    )
    term = region.estimate(batch_of(range(6)))
    expected = (term.losses * term.weights).sum() / term.weights.sum()
    assert parts[1]["columns"]["step_means.divergence"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_each_term_of_a_sum_has_its_own_mean():
    points = Sum({"one": Unpaired(KL, 0.1), "two": (Unpaired(KL, 0.5), 2.0), "trust": TrustRegion(KL)})
    assert list(points.step_means) == ["one.reference_point", "two.reference_point", "trust.divergence"]
    assert all(isinstance(mean, StepMean) for mean in points.step_means.values())
    assert {name: mean.rows for name, mean in points.step_means.items()}["trust.divergence"] == "own"
    given = {"one.reference_point": 0.1, "two.reference_point": 0.7, "trust.divergence": 0.0}
    fields = {f"step_means.{name}": torch.full((6,), value, dtype=torch.float64) for name, value in given.items()}
    output = points(batch_of(range(6), **fields))
    assert output.metrics["one/reference_point"][0] == 0.1
    assert output.metrics["two/reference_point"][0] == 0.7
    assert output.metrics["trust/excess"].max() == 0
    assert points.preference_kinds == {"labels"}
    assert "one: " in points.label_remark(30, 10)


def test_a_selection_means_over_the_rows_that_it_selects():
    chosen = Selected(Unpaired(KL, 0.5, reference_point="samples"), "chosen")
    whole, alone = batch_of(range(6)), batch_of([0, 3, 4])
    values = chosen.step_means["reference_point"](whole).values
    expected = Unpaired(KL, 0.5, reference_point="samples").step_means["reference_point"](alone).values
    torch.testing.assert_close(values, expected)


def test_disco_is_the_sum_of_its_parts():
    batch = batch_of(range(6))
    disco = DisCO(basic=True, beta=3.0, delta=0.001)
    parts = [each(batch).mean() for each in disco.objectives.values()]
    assert parts[1] > 0
    torch.testing.assert_close(disco(batch).mean(), sum(parts))

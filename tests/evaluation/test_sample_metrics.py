import math

import pytest
import torch

from falign import divergences
from falign.evaluation.sample_metrics import divergence_metrics, sample_metrics

WORLD = {"reverse_kl": divergences.get("reverse_kl"), "pearson_chi2": divergences.get("pearson_chi2")}


def row(reward=0.0, ids=(1, 2), text="a b", entropy=0.5, logprob=-1.0, reference=-1.0, finish="stop", **fields):
    return {
        "reward": reward,
        "token_ids": list(ids),
        "num_tokens": len(ids),
        "completion": text,
        "entropy": entropy,
        "logprob": logprob,
        "reference_logprob": reference,
        "token_divergence": 0.25,
        "finish_reason": finish,
        "parts": {"good": reward, "rare": None},
        **fields,
    }


def test_every_metric_has_the_value_that_counting_gives():
    groups = [
        [row(1.0, (1, 2), "a b"), row(0.0, (1, 3, 3, 3), "a c c c", entropy=1.0, finish="length")],
        [row(0.0, (5, 6), "x y"), row(0.0, (5, 6), "x y", parts={"good": 0.0, "rare": 2.0})],
    ]
    found = {name: each.value for name, each in sample_metrics(groups, pass_reward=1.0).items()}
    assert found["reward"] == found["reward/good"] == found["reward/best_of_1"] == 0.25
    assert (found["reward/best_of_2"], found["pass@1"], found["pass@2"]) == (0.5, 0.25, 0.5)
    assert found["reward/rare"] == 2.0
    assert found["entropy"] == pytest.approx((2 * 0.5 + 4 * 1.0 + 2 * 0.5 + 2 * 0.5) / 10)
    assert found["distinct-1"] == pytest.approx((3 / 6 + 2 / 4) / 2)
    assert found["distinct-2"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert (found["unique"], found["length"], found["clipped"]) == (0.75, 2.5, 0.25)
    assert found["self_bleu"] > 0.5  # the second prompt's are equal
    assert "pass@1" not in sample_metrics(groups)


def test_intervals_resample_prompts_and_not_completions():
    # Completions of a prompt are all alike: eight of them say no more than one.
    groups = [[row(float(i % 2)) for _ in range(8)] for i in range(40)]
    interval = sample_metrics(groups)["reward"]
    width = 2 * 1.96 * math.sqrt(0.25 / 40)
    assert interval.value == 0.5
    assert interval.high - interval.low == pytest.approx(width, rel=0.15)


def test_divergences_are_those_of_an_enumerated_world():
    policy, reference = (torch.tensor(p, dtype=torch.float64) for p in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))

    def drawn(law):
        counts = (law * 4).long().tolist()
        return [
            row(logprob=math.log(policy[i]), reference=math.log(reference[i]))
            for i in range(3)
            for _ in range(counts[i])
        ]

    found = divergence_metrics([drawn(policy)], WORLD, reference_groups=[drawn(reference)])
    reverse = (policy * (policy / reference).log()).sum().item()
    chi2 = ((policy - reference) ** 2 / reference).sum().item()
    for name, exact in (("reverse_kl", reverse), ("pearson_chi2", chi2)):
        assert found[f"divergence/{name}"].value == pytest.approx(exact)
        assert found[f"divergence/{name}/reference_samples"].value == pytest.approx(exact)
    assert found["divergence/reverse_kl/log_ratio"].value == pytest.approx(reverse)
    assert found["divergence/reverse_kl/vocabulary"].value == 0.25
    assert found["divergence/forward_kl/vocabulary"].value == 0.25

"""What an online run file may not ask of its samples."""

import json

import pytest

from falign.errors import ConfigError
from falign.objectives.batch import WORTH
from falign.runfile import parse_run
from tests.training.prompts import online_data

BINARY = {"kind": "distribution_matching", "target": {"kind": "binary"}}
FITTED = {"kind": "distribution_matching", "target": {"kind": "moments", "moments": [0.5]}, "divergence": "reverse_kl"}

TWO = [{"kind": "words", "words": ["a"]}, {"kind": "regex", "pattern": "b"}]


def summed(term):
    return {"kind": "sum", "terms": {"rl": {"kind": "policy_gradient"}, "sft": term}}


def check(**changes):
    return parse_run(online_data("model", "prompts.jsonl", "run", **changes)).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"kind": "supervised"}}, "objective.kind=supervised reads no reward"),
        ({"objective": {"kind": "rehearsal", "divergence": "forward_kl"}}, "objective.kind=rehearsal reads no reward"),
        (
            {"objective": summed({"kind": "supervised"})},
            "^objective.terms.sft reads no reward, .* leave the term out, or, .* completions, set it to chosen",
        ),
        (
            {"objective": {**summed({"kind": "supervised"}), "weights": {"sft": {"from": 1.0, "to": 0.1, "steps": 9}}}},
            "^objective.terms.sft reads no reward",
        ),
        ({"objective": {"kind": "pairwise"}, "rollout": {"completions": 1}}, "compares completions of one prompt"),
        ({"rollout": {"completions": 1}}, "objective.advantage=leave_one_out, which compares"),
        (
            {
                "objective": {"kind": "policy_gradient", "advantage": "batch_mean"},
                "rollout": {"completions": 1, "prompts": 1},
            },
            "objective.advantage=batch_mean, which compares",
        ),
        ({"objective": {"kind": "unpaired"}}, "set objective.reference_point=samples"),
        (
            {"objective": {"kind": "cloning"}, "rollout": {"completions": 1}},
            "objective.completions=best, which compares",
        ),
        (
            {"objective": {"kind": "discriminative"}, "rollout": {"completions": 1}},
            "kind=discriminative, which compares",
        ),
        (
            {"objective": {"kind": "sequence_match"}, "rollout": {"ranked": "all"}},
            "applies only to preference objectives",
        ),
        ({"rollout": {"ranked": "all"}}, "rollout.ranked=all applies only to preference objectives"),
        ({"objective": BINARY, "rollout": {"fit_samples": 64}}, "nothing is fitted"),
        (
            {"objective": BINARY, "rewards": [{"kind": "words", "words": ["a"], "weight": 0.5}]},
            "rewards.0.weight=0.5: a target reads each reward by itself",
        ),
        ({"rollout": {"difficulty": {"low": 0.9, "high": 0.1}}}, "low=0.9 is above high=0.1"),
        (
            {"rollout": {"difficulty": {"low": 0.1, "high": 0.9}}, "rewards": TWO},
            "rollout.difficulty with 2 rewards: .* Set rollout.outcome to the name",
        ),
    ],
)
def test_what_could_not_work_or_would_have_no_effect_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"kind": "pairwise"}, "rollout": {"ranked": "all"}},
        {"rollout": {"difficulty": {"low": 0.1, "high": 0.9}, "outcome": "words"}, "rewards": TWO},
        {"rollout": {"difficulty": {"low": 0.1, "high": 0.9}}, "rewards": [TWO[0], {**TWO[1], "weight": 0.0}]},
        {"objective": FITTED, "rollout": {"fit_samples": 64}},
        {"objective": summed({"kind": "supervised", "completions": "chosen"})},
        {"objective": {"kind": "unpaired", "reference_point": "samples"}, "rollout": {"completions": 1}},
        {"objective": {"kind": "cloning", "completions": "passed"}, "rollout": {"completions": 1}},
        {"objective": {"kind": "policy_gradient", "advantage": "batch_mean"}, "rollout": {"completions": 1}},
        {"objective": {"kind": "policy_gradient", "advantage": "gae"}, "rollout": {"completions": 1}},
        {"rewards": [{"kind": "words", "words": ["a"], "weight": 0.5}]},
    ],
)
def test_where_they_have_an_effect_they_are_allowed(changes):
    assert check(**changes).needs & WORTH


def transformed(tmp_path, beta=0.1):
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"prompt": "p", "completion": "a", "reward": 1.0}) + "\n")
    transform = {"kind": "best_of_n", "samples": str(samples), "n": 4, "beta": beta}
    return [{"kind": "words", "words": ["a"], "transform": transform}]


def penalized(beta, **fields):
    return {"kind": "policy_gradient", "divergence": "reverse_kl", "beta": beta, **fields}


@pytest.mark.parametrize(
    ("objective", "place"),
    [
        (penalized(0.2), "objective.beta=0.2"),
        ({"kind": "policy_gradient"}, "objective.beta=0"),
        ({"kind": "sum", "terms": {"pg": penalized(0.1), "pg2": penalized(0.2)}}, "objective.terms.pg2.beta=0.2"),
    ],
)
def test_a_transform_for_another_beta_than_the_penaltys_is_refused(tmp_path, objective, place):
    with pytest.raises(ConfigError, match=rf"rewards.0.transform.beta=0.1 and {place}: the transform is solved for"):
        check(objective=objective, rewards=transformed(tmp_path))


@pytest.mark.parametrize(
    "objective",
    [
        penalized(0.1),
        penalized({"from": 0.2, "to": 0.1, "steps": 5}),
        {"kind": "sum", "terms": {"pg": penalized(0.1), "js": {"kind": "policy_gradient"}}},
        {"kind": "sum", "terms": {"pg": penalized({"from": 0.2, "to": 0.1, "steps": 5})}},
        {"kind": "sum", "terms": {"pg": penalized(0.1), "dpo": {"kind": "pairwise", "beta": 0.3}}},
    ],
)
def test_a_transform_for_the_penaltys_beta_passes(tmp_path, objective):
    check(objective=objective, rewards=transformed(tmp_path))

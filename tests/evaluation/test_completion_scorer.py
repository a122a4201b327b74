import json
import math

import pytest
import torch

from falign import FDPO, TDPO
from falign.divergences import ForwardKL, get
from falign.errors import ConfigError, ModelError
from falign.evaluation import choose_common_layout
from falign.objectives import Listwise, Pairwise
from falign.references import objective_inputs
from falign.scoring import pad
from tests.evaluation.own_objective import NearTeacher
from tests.evaluation.scoring import TREES, dense, policy_and_reference, tiny_scorer
from tests.models.tiny import tiny_model

SIDES = (("chosen", 1.0), ("rejected", 0.0))


def inputs_of(scorer, trees):
    return objective_inputs(
        scorer.policy,
        pad(trees, pad_token_id=1),
        references={"reference": scorer.reference},
        objective=scorer.objective,
        chunk_tokens=scorer.scorer.chunk_tokens,
    )


@pytest.mark.parametrize("layout", ["padded", "tree"])
def test_values_are_those_of_a_dense_computation_of_each_completion_alone(layout):
    policy, reference = policy_and_reference()
    objective = TDPO("jensen_shannon", beta=0.3, alpha=0.2)
    scored = tiny_scorer(objective, layout).score(TREES)
    for tree, rows in zip(TREES, scored, strict=True):
        assert [row["completion"] for row in rows] == list(range(len(tree.completion_ids)))
        for i, (row, ids) in enumerate(zip(rows, tree.completion_ids, strict=True)):
            log_p, log_q = dense(policy, tree.prompt_ids, ids), dense(reference, tree.prompt_ids, ids)
            of_token = torch.arange(len(ids)), torch.tensor(ids)
            p, q = log_p.exp(), log_q.exp()
            mixture = (p + q).log() - math.log(2)
            expected = {
                "logprobs": log_p[of_token],
                "reference_logprobs": log_q[of_token],
                "log_ratios": (log_p - log_q)[of_token],
                "entropy": -(p * log_p).sum(-1),
                "token_divergence": (p * (log_p - mixture) + q * (log_q - mixture)).sum(-1),
            }
            for name, values in expected.items():
                assert row[name] == pytest.approx(values.tolist(), abs=2e-5), name
            log_ratio, delta = expected["log_ratios"].sum().item(), expected["token_divergence"].sum().item()
            assert row["log_ratio"] == pytest.approx(log_ratio, abs=2e-5)
            assert row["implicit_reward"] == pytest.approx(0.3 * (log_ratio + 0.2 * delta), abs=2e-5)
            assert (row["place"], row["token_ids"], row["num_tokens"]) == (tree.place, list(ids), len(ids))
            assert row["preference"] == (None if tree.preference is None else tree.preference[i])


@pytest.mark.parametrize(
    "objective",
    [
        FDPO("reverse_kl", beta=0.2),
        FDPO("alpha(0.4)", beta=0.3, length_norm="token"),
        Listwise(ForwardKL(), beta=0.3),
        TDPO(beta=0.3, variant=1, weighting="activations"),
    ],
    ids=["reverse_kl", "normalised", "listwise", "weighted"],
)
def test_rewards_are_those_that_the_objective_logs(objective):
    scorer = tiny_scorer(objective)
    pairs = [TREES[0], TREES[3]]
    rows = [row for tree in scorer.score(pairs) for row in tree]
    with torch.no_grad():
        metrics = objective(inputs_of(scorer, pairs).completions).metrics
    rewards = {side: [row["implicit_reward"] for row in rows if row["preference"] == p] for side, p in SIDES}
    for side, values in rewards.items():
        assert torch.equal(metrics[f"rewards/{side}"], torch.tensor(values))
    assert ("token_divergence" in rows[0]) == ("divergence" in objective.measures)


def test_the_reverse_kl_reward_is_beta_times_the_log_ratio():
    for rows in tiny_scorer(Pairwise(get("reverse_kl"), beta=0.25)).score(TREES):
        for row in rows:
            assert row["implicit_reward"] == pytest.approx(0.25 * row["log_ratio"], rel=1e-6)
            assert row["log_ratio"] == pytest.approx(sum(row["log_ratios"]), abs=1e-5)


def test_numbers_survive_the_file_as_the_32_bit_numbers_that_they_are():
    scorer = tiny_scorer()
    rows = json.loads(json.dumps(scorer.score(TREES[:1])[0]))
    with torch.no_grad():
        inputs = inputs_of(scorer, TREES[:1])
    for row, logprobs in zip(rows, inputs.completions.logprobs, strict=True):
        assert torch.equal(torch.tensor(row["logprobs"]), logprobs[: row["num_tokens"]])


def test_the_policy_is_left_as_it_was():
    scorer = tiny_scorer()
    scorer.policy.train()
    scorer.score(TREES[:1])
    assert scorer.policy.training
    assert all(parameter.grad is None for parameter in scorer.policy.parameters())


def test_a_value_that_is_not_finite_is_named_with_its_row():
    scorer = tiny_scorer()
    with torch.no_grad():
        scorer.policy.lm_head.weight[9] = math.nan
    with pytest.raises(ModelError, match=r"rows.jsonl:1: logprobs is nan \(completion token 1\)"):
        scorer.score(TREES)


def test_a_layout_is_common_only_if_every_model_reads_it(monkeypatch):
    models = [tiny_model("llama"), tiny_model("llama", seed=1)]
    assert choose_common_layout(models, TREES, pad_token_id=1).layout == "tree"
    monkeypatch.setattr(
        "falign.scoring.layout_choice.why_not_trees", lambda model: "it cannot" if model is models[1] else None
    )
    choice = choose_common_layout(models, TREES, pad_token_id=1)
    assert (choice.layout, choice.reason, choice.as_requested) == ("padded", "it cannot", False)
    with pytest.raises(ConfigError, match="layout='tree' is not possible"):
        choose_common_layout(models, TREES, pad_token_id=1, wanted="tree")


def test_a_reference_that_the_objective_reads_and_the_scorer_lacks_is_named():
    with pytest.raises(ConfigError, match="read the reference 'teacher', and the scorer has reference: give it under"):
        tiny_scorer(NearTeacher(beta=0.5))

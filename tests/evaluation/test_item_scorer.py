import math

import pytest
import torch

from falign import FDPO, TDPO
from falign.errors import RewardError
from falign.evaluation import ComparedScores, ItemScorer, ItemTree, ReferenceFreeScores
from falign.evaluation.benchmarks import BenchmarkItem
from falign.evaluation.item_scorer import _in_order_of
from falign.objectives import Listwise
from falign.scoring import Scorer
from tests.evaluation.scoring import TREES, dense, policy_and_reference, tiny_scorer

NAMES = ("implicit_reward", "length_normalised", "log_ratio", "logprob", "mean_logprob", "length", "random")


def items():
    return [
        ItemTree(
            BenchmarkItem(
                tree.place,
                str(i),
                "",
                "question",
                tuple(f"answer {k}" for k in range(len(tree.completion_ids))),
                tuple(float(-k) for k in range(len(tree.completion_ids))),
            ),
            tree,
        )
        for i, tree in enumerate(TREES)
    ]


def scored(objective, **options):
    scorer = ItemScorer(names=NAMES, of_trees=ComparedScores(tiny_scorer(objective, **options)))
    return scorer.score(items())


@pytest.mark.parametrize("layout", ["padded", "tree"])
@pytest.mark.parametrize("length_norm", ["none", "token"])
def test_scores_are_those_of_a_dense_computation_in_float64(layout, length_norm):
    policy, reference = policy_and_reference()
    objective = FDPO("reverse_kl", beta=0.3, length_norm=length_norm)
    for tree, scores in zip(TREES, scored(objective, layout=layout), strict=True):
        assert tuple(scores) == NAMES
        for i, ids in enumerate(tree.completion_ids):
            of_token, n = (torch.arange(len(ids)), torch.tensor(ids)), len(ids)
            log_pi, log_ref = (dense(m, tree.prompt_ids, ids)[of_token].sum().item() for m in (policy, reference))
            log_ratio = log_pi - log_ref
            expected = {
                "implicit_reward": 0.3 * log_ratio / (n if length_norm == "token" else 1),
                "length_normalised": 0.3 * log_ratio / n,
                "log_ratio": log_ratio,
                "logprob": log_pi,
                "mean_logprob": log_pi / n,
                "length": n,
            }
            for name, value in expected.items():
                assert scores[name][i] == pytest.approx(value, abs=2e-5), name


@pytest.mark.parametrize("objective", [FDPO("jensen_shannon", beta=0.3), Listwise(FDPO("alpha(0.4)").divergence, 0.3)])
def test_the_length_normalised_reward_is_the_slope_at_the_mean_log_ratio(objective):
    for tree, scores in zip(TREES, scored(objective), strict=True):
        for i, ids in enumerate(tree.completion_ids):
            mean = torch.tensor(scores["log_ratio"][i] / len(ids), dtype=torch.float64)
            expected = 0.3 * objective.divergence.f_prime(mean).item()
            assert scores["length_normalised"][i] == pytest.approx(expected, rel=1e-9)


def test_the_reward_of_tdpo_is_its_own_and_normalised_by_the_length():
    rows = tiny_scorer(TDPO("jensen_shannon", beta=0.3, alpha=0.2)).score(TREES)
    for tree, scores in zip(rows, scored(TDPO("jensen_shannon", beta=0.3, alpha=0.2)), strict=True):
        assert scores["implicit_reward"] == [row["implicit_reward"] for row in tree]
        assert scores["length_normalised"] == [row["implicit_reward"] / row["num_tokens"] for row in tree]


def test_rewards_that_saturate_keep_the_order_of_their_log_ratios():
    bound = 0.5 * math.log(2)
    rewards = _in_order_of([bound, 0.1, bound, bound, bound], [90.0, 0.3, 70.0, 80.0, 80.0])
    assert rewards[1] < rewards[2] < rewards[3] == rewards[4] < rewards[0]
    assert rewards == pytest.approx([bound, 0.1, bound, bound, bound], rel=1e-15)


def test_a_policy_alone_has_the_log_probabilities_that_it_has_beside_a_reference():
    policy, _ = policy_and_reference()
    names = ("logprob", "mean_logprob", "random")
    alone = ItemScorer(names=names, of_trees=ReferenceFreeScores(policy=policy, scorer=Scorer(pad_token_id=1))).score(
        items()
    )
    for scores, others in zip(alone, scored(FDPO("reverse_kl")), strict=True):
        assert tuple(scores) == names
        assert scores["logprob"] == pytest.approx(others["logprob"], rel=1e-6)
        assert scores["random"] == others["random"]


def test_random_scores_depend_on_the_seed_and_the_item_alone():
    one, two = (ItemScorer(names=("random",), of_trees=None, seed=seed) for seed in (1, 2))
    first = [scores["random"] for scores in one.score(items())]
    assert first[::-1] == [scores["random"] for scores in one.score(items()[::-1])]
    assert first != [scores["random"] for scores in two.score(items())]
    values = [value for scores in first for value in scores]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 1 for value in values)


def test_a_classifier_gets_prompts_and_completions_with_their_places():
    calls = []

    def classifier(prompts, completions, **columns):
        calls.append((prompts, completions, columns["place"]))
        return [float(i) for i in range(len(prompts))]

    scores = ItemScorer(names=("classifier",), of_trees=None, classifier=classifier).score(items()[:2])
    assert scores == [{"classifier": [0.0, 1.0]}, {"classifier": [2.0, 3.0, 4.0]}]
    places = ["rows.jsonl:1"] * 2 + ["rows.jsonl:2"] * 3
    assert calls == [(["question"] * 5, ["answer 0", "answer 1", "answer 0", "answer 1", "answer 2"], places)]


def test_a_classifier_without_a_value_is_named_with_its_row():
    scorer = ItemScorer(
        names=("classifier",), of_trees=None, classifier=lambda prompts, texts, **_: [None] * len(texts)
    )
    with pytest.raises(RewardError, match=r"rows.jsonl:1: the classifier gives no value"):
        scorer.score(items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_classifier_whose_value_is_no_number_is_named_with_its_row(value):
    scorer = ItemScorer(
        names=("classifier",), of_trees=None, classifier=lambda prompts, texts, **_: [0.0, 1.0, value, 2.0, 3.0]
    )
    with pytest.raises(RewardError, match=rf"rows.jsonl:2: the classifier gives a completion the value {value}"):
        scorer.score(items()[:2])

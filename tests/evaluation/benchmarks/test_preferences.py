import itertools

import numpy as np
import pytest
import torch

from falign.data import BadRowPolicy, BadRows
from falign.divergences import ReverseKL
from falign.errors import DataError
from falign.evaluation.benchmarks import Preferences
from falign.objectives import CompletionBatch, Pairwise
from tests.evaluation.benchmarks.samples import write

TURN = [{"role": "user", "content": "Hi."}]


def read(path, benchmark=None, policy: BadRowPolicy = "error"):
    return list((benchmark or Preferences()).read(path, bad_rows=BadRows(policy)))


def test_the_score_is_the_share_of_right_pairs_in_all_lists(tmp_path):
    rng = np.random.default_rng(0)
    ranks = [rng.integers(1, 4, size=size).tolist() for size in rng.integers(3, 6, size=30)]
    ranks = [row if len(set(row)) > 1 else [*row[:-1], 4] for row in ranks]
    rows = [
        {"prompt": f"p{i}", "completions": [f"c{j}" for j in range(len(row))], "ranks": row}
        for i, row in enumerate(ranks)
    ]
    items = read(write(tmp_path / "lists.jsonl", rows))
    scores = [rng.integers(0, 5, size=len(row)).astype(float) for row in ranks]
    outcomes = [Preferences().outcome(item, row.tolist()) for item, row in zip(items, scores, strict=True)]
    summary = Preferences().summarize([""] * len(items), outcomes)

    right, top = [], []
    for row, values in zip(ranks, scores, strict=True):
        for i, j in itertools.permutations(range(len(row)), 2):
            if row[i] < row[j]:
                right.append(1.0 if values[i] > values[j] else 0.5 if values[i] == values[j] else 0.0)
        top.append(np.mean([row[i] == min(row) for i in np.flatnonzero(values == values.max())]))
    assert summary["score"] == pytest.approx(np.mean(right), abs=1e-12)
    assert summary["best"] == pytest.approx(np.mean(top), abs=1e-12)
    assert next(iter(summary)) == "score"


def test_the_score_of_pairs_is_the_accuracy_that_training_logs(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(8)]
    items = read(write(tmp_path / "pairs.jsonl", rows))
    policy = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 2 + [[2.0, 2.0 + 1e-6]] * 3)
    outcomes = [Preferences().outcome(item, row) for item, row in zip(items, policy.tolist(), strict=True)]
    batch = CompletionBatch(
        logprobs=policy.reshape(16, 1),
        completion_mask=torch.ones(16, 1, dtype=torch.bool),
        prompt_index=torch.arange(8).repeat_interleave(2),
        reference_logprobs=torch.zeros(16, 1),
        preference=torch.tensor([1.0, 0.0] * 8),
    )
    logged = Pairwise(ReverseKL(), beta=1.0)(batch).metrics["rewards/accuracies"]
    assert Preferences().summarize([""] * 8, outcomes)["score"] == pytest.approx(4.5 / 8)
    assert logged.mean().item() == pytest.approx(4.5 / 8)


def test_plain_pairs_stay_plain_and_conversations_are_turns(tmp_path):
    answers = ({"role": "assistant", "content": text} for text in ("A.", "B."))
    rows = [dict(zip(("chosen", "rejected"), ([*TURN, answer] for answer in answers), strict=True))]
    (item,) = read(write(tmp_path / "turns.jsonl", rows))
    assert (item.prompt, item.completions, item.plain) == (TURN, ("A.", "B."), False)

    path = write(tmp_path / "plain.jsonl", [{"prompt": "Hi.", "chosen": "A.", "rejected": "B.", "id": "x7"}])
    (item,) = read(path, Preferences(chat=False))
    assert (item.prompt, item.plain, item.id) == ("Hi.", True, "x7")
    (item,) = read(path)  # whoever has a chat template asks
    assert item.plain is None
    (item,) = read(path, Preferences(chat=True))
    assert (item.prompt, item.completions, item.plain) == (TURN, ("A.", "B."), False)


def test_columns_may_have_other_names(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "Hi.", "better": "A.", "worse": "B."}])
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    (item,) = read(path, Preferences(columns=columns))
    assert item.completions == ("A.", "B.")


def test_rows_with_nothing_to_compare_are_bad_rows(tmp_path):
    single = write(tmp_path / "single.jsonl", [{"prompt": "Hi.", "completion": "A.", "label": True}])
    with pytest.raises(DataError, match="the row has 1 completion and no other to compare it with"):
        read(single)
    with pytest.raises(DataError, match=r"none of its rows is an item of the benchmark\. The first bad row"):
        read(single, policy="skip")
    with pytest.raises(DataError, match="the source is missing"):
        read(None)


def test_the_sample_in_the_package_is_a_benchmark():
    assert len(read("demo:polite-preference")) == 400

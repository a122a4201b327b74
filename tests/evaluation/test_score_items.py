import json

import pytest

from falign import FDPO
from falign.errors import ConfigError, DataError
from falign.evaluation import ComparedScores, ItemScorer, ScoreOutput, benchmarks, score_items
from tests.evaluation.scoring import tiny_scorer
from tests.evaluation.test_item_scorer import items

NAMES = ("implicit_reward", "logprob", "random")
BUDGET = 18  # three batches: two items, two items, one


def pair_items():
    """Those of the items that have something to compare."""
    return [item for item in items() if len(item.tree.completion_ids) > 1]


def scored(path, trees, *, record=None, on_batch=None):
    scorer = ItemScorer(names=NAMES, of_trees=ComparedScores(tiny_scorer(FDPO("jensen_shannon", beta=0.3))))
    benchmark = benchmarks.get("preferences")
    with ScoreOutput(path, record=record or {}) as output:
        rows = score_items(trees, scorer, benchmark, output, tokens_per_batch=BUDGET, on_batch=on_batch)
        output.finish()
    return rows


def test_a_row_has_the_scores_of_an_item_and_what_the_benchmark_makes_of_them(tmp_path):
    rows = scored(tmp_path / "items.jsonl", pair_items())
    assert [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()] == rows
    for row, (item, tree) in zip(rows, pair_items(), strict=True):
        assert (row["place"], row["id"], row["preference"]) == (item.place, item.id, list(item.preference))
        assert row["num_tokens"] == [len(ids) for ids in tree.completion_ids]
        assert tuple(row["scores"]) == tuple(row["outcome"]) == NAMES
        for name, scores in row["scores"].items():
            assert row["outcome"][name] == benchmarks.get("preferences").outcome(item, scores)


@pytest.mark.parametrize("batches", [0, 1])
@pytest.mark.parametrize("keep", [1.0, 0.7])
def test_a_stopped_evaluation_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch, batches, keep):
    whole = scored(tmp_path / "whole.jsonl", pair_items())
    path, partial, append, calls = (
        tmp_path / "items.jsonl",
        tmp_path / ".items.jsonl.partial.jsonl",
        ScoreOutput.append,
        [],
    )

    def dies(self, rows):
        calls.append(rows)
        if len(calls) > batches:
            raise KeyboardInterrupt
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ScoreOutput, "append", dies)
        with pytest.raises(KeyboardInterrupt):
            scored(path, pair_items())
    if partial.exists():
        content = partial.read_bytes()
        partial.write_bytes(content[: int(keep * len(content))])
    progress = []
    assert scored(path, pair_items(), on_batch=lambda done, resumed: progress.append((done, resumed))) == whole
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert progress[-1] == (3, {(0, 1.0): 0, (0, 0.7): 0, (1, 1.0): 2, (1, 0.7): 1}[batches, keep])


def test_items_that_have_changed_since_are_refused(tmp_path, monkeypatch):
    path, append, calls = tmp_path / "items.jsonl", ScoreOutput.append, []

    def dies(self, rows):
        append(self, rows)
        calls.append(rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ScoreOutput, "append", dies)
        with pytest.raises(KeyboardInterrupt):
            scored(path, pair_items())
    first, *others = pair_items()
    swapped = first._replace(item=others[0].item)
    with pytest.raises(ConfigError, match=r"its next row is rows.jsonl:1, and the source has rows.jsonl:2 there"):
        scored(path, [swapped, *others])


def test_no_item_is_an_error(tmp_path):
    with pytest.raises(DataError, match="No item is left"):
        scored(tmp_path / "items.jsonl", [])
    assert not list(tmp_path.iterdir())

"""What is known of completions finds its place in a micro-batch, whatever the layout."""

import json

import pytest
import torch

from falign import divergences
from falign.errors import DataError
from falign.objectives import Hybrid, PolicyGradient, Rehearsal
from falign.rollouts.scored_trees import ScoredTree, collate, completion_rows, require_columns, whole_batch
from falign.scoring import PromptTree, Scorer

TREES = [
    ScoredTree(
        PromptTree((5, 6), ((7, 2), (8, 9, 2)), place="a:1"),
        {
            "rewards": [1.0, 0.25],
            "old_logprobs": [[-1.0, -2.0], [-3.0, -4.0, -5.0]],
            "features": [[1.0, 0.5], [2.0, 0.0]],
        },
    ),
    ScoredTree(
        PromptTree((5,), ((3,),), place="a:2"),
        {"reference_logprobs": [[-7.0]], "from_reference": [True], "rewards": [-1.0]},
    ),
]


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_columns_stand_beside_their_completions_and_are_nan_where_a_tree_has_none(layout):
    inputs = collate(TREES, Scorer(layout))
    columns = inputs["columns"]
    assert inputs["place"] == ("a:1", "a:1", "a:2")
    assert columns["rewards"].tolist() == [1.0, 0.25, -1.0]
    assert columns["old_logprobs"][:2].tolist() == [[-1.0, -2.0, 0.0], [-3.0, -4.0, -5.0]]
    assert columns["old_logprobs"][2].isnan().all()
    assert columns["reference_logprobs"][:2].isnan().all()
    assert columns["reference_logprobs"][2].tolist() == [-7.0, 0.0, 0.0]
    assert columns["features"][:2].tolist() == [[1.0, 0.5], [2.0, 0.0]]
    assert columns["features"][2].isnan().all()
    assert columns["from_reference"].tolist() == [False, False, True]
    assert columns["from_reference"].dtype == torch.bool


def test_a_field_that_is_read_of_all_rows_and_is_missing_in_one_is_refused_with_its_place():
    hybrid = Hybrid(PolicyGradient(), Rehearsal(divergences.get("jensen_shannon")), 0.5)
    samples = hybrid.needs_of_samples - {"from_reference"}
    require_columns(TREES, samples=samples, stored=hybrid.needs_of_stored)
    with pytest.raises(DataError, match="a:2: its completions have no old_logprobs, which the objective reads"):
        require_columns(TREES, samples=samples, stored=hybrid.needs)
    with pytest.raises(DataError, match="a:1: its completions have no reference_logprobs"):
        require_columns(TREES, samples=hybrid.rehearsal.needs, stored=hybrid.needs_of_stored)


def test_a_whole_rollout_is_one_batch_and_gives_its_rows_back():
    batch = whole_batch([TREES[0], TREES[1].with_columns(old_logprobs=[[0.0]])])
    assert batch.completion_mask.tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    assert batch.prompt_index.tolist() == [0, 0, 1]
    assert torch.equal(batch.logprobs, batch.old_logprobs)
    assert completion_rows(batch.old_logprobs, batch.completion_mask) == [[-1.0, -2.0], [-3.0, -4.0, -5.0], [0.0]]
    assert completion_rows(batch.rewards, batch.completion_mask) == [1.0, 0.25, -1.0]


def test_a_state_written_as_json_gives_the_same_trees_back():
    states = json.loads(json.dumps([tree.state_dict() for tree in TREES]))
    assert [ScoredTree.from_state(state) for state in states] == TREES

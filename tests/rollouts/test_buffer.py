"""What is known of completions finds its place in a micro-batch, whatever the layout, and survives a checkpoint."""

from dataclasses import replace

import pytest
import torch

from falign import divergences
from falign.errors import DataError
from falign.objectives import Hybrid, PolicyGradient, Rehearsal
from falign.rollouts.buffer import Column, RolloutBuffer, padded
from falign.scoring import PromptTree, Scorer

SAMPLED = RolloutBuffer(
    (
        PromptTree((5, 6), ((7, 2), (8, 9, 2)), place="a:1"),
        PromptTree((5, 7), ((7,), (4,)), place="a:2"),
    )
).with_columns(
    {
        "rewards": torch.tensor([1.0, 0.25, 0.1, 0.0], dtype=torch.float64),
        "old_logprobs": padded([(-1.0, -2.0), (-3.0, -4.0, -5.1), (-0.5,), (-0.25,)]),
        "features": torch.tensor([[1.0, 0.5], [2.0, 0.0], [0.0, 0.0], [3.0, 1.0]]),
        "from_reference": torch.zeros(4, dtype=torch.bool),
    }
)
STORED = RolloutBuffer((PromptTree((5,), ((3, 1),), place="b:1"),)).with_columns(
    {"reference_logprobs": padded([(-7.0, -1.0)]), "from_reference": torch.ones(1, dtype=torch.bool)}
)
NAN = pytest.approx(float("nan"), nan_ok=True)


def same(a, b):
    assert a.trees == b.trees
    assert a.columns.keys() == b.columns.keys()
    for name, (values, known) in a.columns.items():
        assert values.dtype == b.columns[name].values.dtype
        assert torch.equal(known, b.columns[name].known)
        torch.testing.assert_close(values, b.columns[name].values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_columns_stand_beside_their_completions_and_are_no_number_where_a_row_has_none(layout):
    both = RolloutBuffer.concat([SAMPLED.select([0]), STORED])
    inputs = both.inputs(Scorer(layout))
    columns = inputs["columns"]
    assert inputs["place"] == ("a:1", "a:1", "b:1")
    assert columns["rewards"].tolist() == [1.0, 0.25, NAN]
    assert columns["old_logprobs"].tolist() == [[-1.0, -2.0, 0.0], [-3.0, -4.0, pytest.approx(-5.1)], [NAN] * 3]
    assert columns["reference_logprobs"].tolist() == [[NAN] * 3, [NAN] * 3, [-7.0, -1.0, 0.0]]
    assert columns["features"].tolist() == [[1.0, 0.5], [2.0, 0.0], [NAN, NAN]]
    assert columns["from_reference"].tolist() == [False, False, True]
    assert {values.dtype for values in columns.values()} == {torch.float32, torch.bool}
    assert both.columns["rewards"].known.tolist() == [True, True, False]


def test_what_an_objective_reads_of_rows_that_lack_it_is_refused():
    both = RolloutBuffer.concat([SAMPLED, STORED])
    hybrid = Hybrid(PolicyGradient(), Rehearsal(divergences.get("jensen_shannon")), 0.5)
    both.require(samples=hybrid.needs_of_samples, stored=hybrid.needs_of_stored)
    with pytest.raises(DataError, match=r"b:1: its completions have no rewards"):
        both.require(samples={"rewards"}, stored={"rewards"})
    with pytest.raises(DataError, match=r"a:1: its completions have no reference_logprobs"):
        both.require(samples={"reference_logprobs"}, stored=())
    with pytest.raises(DataError, match=r"b:1: its completions have no old_logprobs"):
        both.values("old_logprobs")


def test_a_part_is_as_narrow_as_its_longest_completion_and_parts_together_are_the_whole():
    second = SAMPLED.part(1, 2)
    assert second.columns["old_logprobs"].values.tolist() == [[-0.5], [-0.25]]
    same(RolloutBuffer.concat([SAMPLED.part(0, 2), second]), SAMPLED)
    assert len(SAMPLED.select([])) == 0


def test_a_whole_rollout_is_one_batch():
    batch = SAMPLED.batch()
    assert batch.completion_mask.sum(dim=1).tolist() == [2, 3, 1, 1]
    assert batch.prompt_index.tolist() == [0, 0, 1, 1]
    assert torch.equal(batch.logprobs, batch.old_logprobs)


def test_a_file_gives_back_the_same_rollout_bit_for_bit(tmp_path):
    compared = [replace(tree, preference=(0.1, 1 / 3)) for tree in SAMPLED.trees]
    part = Column(torch.tensor([0.1, float("nan"), 0.2, 0.3]).double(), torch.tensor([True, False, True, True]))
    whole = replace(SAMPLED, trees=tuple(compared), columns={**SAMPLED.columns, "part a": part})
    whole.save(tmp_path / "rollout.safetensors")
    same(RolloutBuffer.load(tmp_path / "rollout.safetensors"), whole)
    SAMPLED.without(["references.teacher"]).save(tmp_path / "other.safetensors")
    assert not RolloutBuffer.load(tmp_path / "other.safetensors").columns["references.teacher"].known.any()


def test_a_column_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"rewards has shape \(3,\)"):
        SAMPLED.with_columns({"rewards": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"old_logprobs has shape \(4, 2\), and the completions are \(4, 3\)"):
        SAMPLED.with_columns({"old_logprobs": torch.zeros(4, 2)})

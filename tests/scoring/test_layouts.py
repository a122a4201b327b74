import pytest
import torch

from falign.scoring import PromptTree, completion_scores, pack, pad
from tests.scoring.models import TREES, tiny_model


def test_rows_masks_and_predictors_of_a_small_batch():
    batch = pad(TREES[:2], pad_token_id=2, pad_to_multiple_of=8)
    assert batch.input_ids.shape == (5, 8)
    assert batch.input_ids[1].tolist() == [5, 6, 7, 10, 2, 2, 2, 2]
    assert batch.attention_mask[1].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert batch.completion_ids[0].tolist() == [8, 9, 2, 2, 2]
    assert batch.completion_mask.sum(-1).tolist() == [3, 2, 2, 5, 1]
    assert batch.predictor[0].tolist() == [2, 3, 4, 0, 0]
    assert batch.predictor[2].tolist() == [16, 17, 0, 0, 0]
    assert batch.prompt_index.tolist() == [0, 0, 1, 1, 1]
    assert batch.preference is not None
    assert batch.preference.tolist() == [1, 0, 2, 1, 0]
    assert batch.place == ("a:1", "a:1", "a:2", "a:2", "a:2")


def test_a_pad_token_equal_to_the_stop_token_changes_no_mask_and_no_score():
    model = tiny_model().eval()
    batch, other = pad(TREES, pad_token_id=2), pad(TREES, pad_token_id=40)
    assert torch.equal(batch.completion_mask, other.completion_mask)
    assert torch.equal(batch.attention_mask, other.attention_mask)
    # The completion of stop tokens alone and the stop token inside a prompt are counted as any other.
    assert batch.completion_mask[5].tolist() == [True, True, False, False, False]
    with torch.no_grad():
        torch.testing.assert_close(completion_scores(model, batch).logprobs, completion_scores(model, other).logprobs)


def test_token_ids_gives_back_what_was_padded():
    given = [(list(tree.prompt_ids), list(ids)) for tree in TREES for ids in tree.completion_ids]
    assert pad(TREES, pad_token_id=2, pad_to_multiple_of=4).token_ids() == given


def test_to_moves_every_tensor_and_keeps_the_rest():
    moved = pad(TREES, pad_token_id=2).to("meta")
    assert {moved.input_ids.device.type, moved.predictor.device.type, moved.prompt_index.device.type} == {"meta"}
    assert moved.place[0] == "a:1"
    assert pad([PromptTree((1,), ((2,),))], pad_token_id=0).to("meta").preference is None


def test_preferences_of_some_trees_only_are_refused():
    with pytest.raises(ValueError, match=r"1 of 2 trees.*b:7"):
        pad([TREES[0], PromptTree((1,), ((2,),), place="b:7")], pad_token_id=2)


def test_a_batch_without_trees_is_refused():
    with pytest.raises(ValueError, match="at least one tree"):
        pad([], pad_token_id=2)


GAPS = [
    PromptTree(
        (5, 6, 7),
        ((8, 9, 2, 11, 12, 13, 2), (8, 14)),
        (1.0, 0.0),
        counted=((True, True, True, False, False, True, True), (True, True)),
    ),
    PromptTree((9,), ((4, 3, 7, 2),), (1.0,), counted=((False, False, True, True),)),
]


@pytest.mark.parametrize("layout", [pack, pad])
def test_tokens_that_do_not_count_are_read_and_not_scored(layout):
    model = tiny_model().eval().double()
    batch = layout(GAPS, pad_token_id=2)
    assert batch.completion_ids.tolist() == [[8, 9, 2, 13, 2], [8, 14, 2, 2, 2], [7, 2, 2, 2, 2]]
    assert batch.completion_mask.sum(-1).tolist() == [5, 2, 2]
    assert [ids for _, ids in batch.token_ids()] == [[8, 9, 2, 11, 12, 13, 2], [8, 14], [4, 3, 7, 2]]
    with torch.no_grad():
        scores = completion_scores(model, batch).logprobs
        for n, (prompt, ids) in enumerate(batch.token_ids()):
            row = torch.tensor([prompt + ids])
            dense = model(input_ids=row).logits[0, :-1].log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]
            counted = batch.counted[n] or (True,) * len(ids)
            own = dense[len(prompt) - 1 :][torch.tensor(counted)]
            torch.testing.assert_close(scores[n, : len(own)], own, rtol=0, atol=1e-6)


def test_flags_that_do_not_fit_a_completion_are_refused():
    with pytest.raises(ValueError, match=r"counted has \[1\] values for completions of \[2\] tokens"):
        PromptTree((1,), ((2, 3),), counted=((True,),))
    with pytest.raises(ValueError, match="no token of a completion counts"):
        PromptTree((1,), ((2, 3),), counted=((False, False),))

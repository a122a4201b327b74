import pytest
import torch

from falign.scoring import PromptTree, Scorer, completion_scores, evaluation_mode
from tests.equivalence.runs import lora_policy

TREES = [
    PromptTree((5, 6, 7), ((8, 9, 2), (10, 2)), place="a"),
    PromptTree((11,), ((12, 13, 14, 15, 16, 2),), place="b"),
    PromptTree((17, 18), ((19, 2), (20, 21, 2), (22, 2)), place="c"),
]


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_scores_are_those_of_a_model_at_rest_and_leave_it_as_it_was(layout):
    model, scorer = lora_policy(dropout=0.5, trained=True).train(), Scorer(layout, pad_token_id=2, chunk_tokens=3)
    batch = scorer.lay_out(TREES, model=model)
    found = scorer.scores(model, batch)
    assert model.training
    assert not found.logprobs.requires_grad
    torch.testing.assert_close(found.logprobs, completion_scores(model.eval(), batch).logprobs.detach())


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_batches_hold_what_a_model_reads_the_longest_first_and_results_come_in_the_order_of_the_trees(layout):
    scorer, seen = Scorer(layout), []

    def places(trees):
        seen.append([tree.place for tree in trees])
        return [tree.place for tree in trees]

    # As trees 8, 7 and 9 tokens; with a prompt for each completion 11, 7 and 13.
    assert [scorer.num_tokens(tree) for tree in TREES] == ([8, 7, 9] if layout == "tree" else [11, 7, 13])
    assert scorer.in_batches(TREES, places, max_tokens=15) == ["a", "b", "c"]
    assert seen == ([["b", "a"], ["c"]] if layout == "tree" else [["b"], ["a"], ["c"]])


def test_no_position_at_once_is_refused():
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        Scorer(chunk_tokens=0)


def test_every_module_gets_its_own_mode_back_also_after_an_error():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model.train()
    model[1].eval()
    try:
        with evaluation_mode(model):
            assert not any(module.training for module in model.modules())
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert [module.training for module in model.modules()] == [True, True, False, False]

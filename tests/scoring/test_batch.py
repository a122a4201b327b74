import pytest

from falign.scoring import PromptTree


@pytest.mark.parametrize(
    ("prompt", "completions", "preference", "message"),
    [
        ((), ((1,),), None, "f:3: a prompt needs"),
        ((1,), (), None, "f:3: every completion needs"),
        ((1,), ((2,), ()), None, "f:3: every completion needs"),
        ((1,), ((2,), (3,)), (1.0,), "f:3: 1 preference values for 2"),
    ],
)
def test_trees_that_could_not_be_scored_are_refused(prompt, completions, preference, message):
    with pytest.raises(ValueError, match=message):
        PromptTree(prompt, completions, preference=preference, place="f:3")

import pytest

from falign.rewards.verifiers import RowError
from falign.rewards.verifiers.patterns import matches, matches_answer, sections


def test_a_pattern_occurs_or_matches_the_whole():
    assert matches("the year 1984", pattern=r"\d{4}", whole=False) == 1.0
    assert matches("the year 1984", pattern=r"\d{4}", whole=True) == 0.0
    assert matches("1984", pattern=r"\d{4}", whole=True) == 1.0
    assert matches("a\nb", pattern="a.b", whole=False) == 0.0
    assert matches("a\nb", pattern="(?s)a.b", whole=False) == 1.0


def test_the_first_group_of_the_last_match_must_be_the_answer():
    assert matches_answer("x = 3; x = 4", 4, pattern=r"x = (\d)", whole=False) == 1.0
    assert matches_answer("x = 3; x = 4", 3, pattern=r"x = (\d)", whole=False) == 0.0
    assert matches_answer("<a> yes </a>", "yes", pattern="<a>(.*)</a>", whole=True) == 1.0
    assert matches_answer("none", 3, pattern=r"x = (\d)", whole=False) == 0.0


@pytest.mark.parametrize("answer", [None, float("nan"), "", " ", True, ["yes"]])
def test_a_row_without_an_answer_is_not_a_row_that_any_completion_answers(answer):
    with pytest.raises(RowError, match="the answer is"):
        matches_answer("x = 3", answer, pattern=r"x = (\d)", whole=False)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>so</think>\n<answer>4</answer>\n", 1.0),
        ("<think>so</think>four<answer>4</answer>", 0.0),
        ("<answer>4</answer><think>so</think>", 0.0),
        ("<think>so</think><answer>4</answer>!", 0.0),
        ("<think>so<answer>4</answer></think><answer>4</answer>", 0.0),
        ("<think> </think><answer>4</answer>", 0.0),
        ("<think>so</think><answer>4", 0.0),
        ("", 0.0),
    ],
)
def test_sections_come_once_each_in_order_with_nothing_around_them(completion, expected):
    assert sections(completion, ["think", "answer"]) == expected

from collections import Counter
from functools import partial

import pytest

from falign.rewards import choice as settings
from falign.rewards.verifiers import RowError, choice
from falign.rewards.verifiers.choice import chosen_letter, score_with_options
from tests.rewards.verifiers.gsm8k import rows

score = partial(choice.score, **settings().parameters)

OPTIONS = ["A)125", "B)150", "C) 2 ft", "D)225", "E)None of these"]


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("C", "C"),
        ("(c)", None),
        ("(C)", "C"),
        ("C) 2 ft", "C"),
        ("Let me see.\n**D**", "D"),
        ("The answer is B, not A.", "B"),
        ("First the answer is A. Wait. The correct answer is: (E).", "E"),
        ("ANSWER - D", "D"),
        ("Answer choice B is wrong, so the answer is option C", "C"),
        ("Thus, C is the correct answer", "C"),
        (r"so $\boxed{\text{D}}$, which is option A of the second list", "D"),
        ("#### E", "E"),
        ("The answer is a number that B chose", None),
        ("The answer is A or B", None),
        ("Answer: A/B/C/D/E", None),
        ("A and B is correct", None),
        ("It is 150.", None),
        ("It comes to\n150", "B"),
        ("None of these.", "E"),
        ("A train leaves", None),
        ("", None),
    ],
)
def test_the_letter_that_a_completion_settles_on(completion, letter):
    assert chosen_letter(completion, letters="ABCDE", options=OPTIONS) == letter


def test_the_answer_may_have_brackets_and_must_be_one_of_the_letters():
    assert score("Answer: B", "(b)", letters="ABCD") == 1.0
    assert score("Answer: E", "B", letters="ABCD") == 0.0
    with pytest.raises(RowError, match="'E' is not one of the letters ABCD"):
        score("Answer: E", "E", letters="ABCD")
    assert score("Answer: B", "B", letters="abcd") == 1.0


@pytest.mark.parametrize("answer", [None, float("nan"), 1, 1.0, "1", "", "AB", True, ["A"], "none"])
def test_an_answer_that_is_no_letter_is_the_rows_fault(answer):
    with pytest.raises(RowError, match="the answer"):
        score("Answer: B", answer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (None, "the options are None; they must be a list of texts"),
        ("A)1 B)2", "must be a list of texts"),
        ([1, 2], "must be a list of texts"),
        ({"text": ["1", "2"]}, "must be a list of texts"),
        (["1", "2"], "the answer is C, and there are 2 options for the letters ABC"),
        (["1", "2", "3", "4"], "there are 4 options for the letters ABC"),
    ],
)
def test_options_that_do_not_fit_the_letters_are_the_rows_fault(options, message):
    with pytest.raises(RowError, match=message):
        score_with_options("Answer: C", "C", options, letters="ABC")


def test_rationales_of_aqua_that_name_a_letter_name_the_right_one(shared_data):
    found = Counter()
    for row in rows(shared_data("aqua-rat/dev.jsonl.gz")):
        letter = chosen_letter(row["rationale"], letters="ABCDE", options=row["options"])
        found["none" if letter is None else letter == row["correct"]] += 1
        for other in "ABCDE":
            assert score(f"Since x = 3, the answer is ({other}).", row["correct"]) == (other == row["correct"])
    # The others end in a number or an equation.
    assert found == {True: 238, "none": 16}

from functools import partial

import pytest

from falign.rewards import mathematics as settings
from falign.rewards.verifiers import RowError, mathematics
from tests.rewards.verifiers.gsm8k import attempts, rows

score = partial(mathematics.score, **settings().parameters)


@pytest.mark.parametrize(
    ("answer", "completion", "expected"),
    [
        (r"\frac{1}{2}", "so it is 0.5", 1),
        ("1/2", r"hence $\frac12$.", 1),
        ("x^2+2x+1", r"\boxed{(x+1)^2}", 1),
        ("x^2+2x+1", r"\boxed{(x-1)^2}", 0),
        (r"$\{1,2\}$", r"\boxed{\{2, 1\}}", 1),
        ("(0, 5]", r"\boxed{(0,5]}", 1),
        ("(0, 5]", r"\boxed{[0,5]}", 0),
        ("[0, 5]", "[0,5]", 1),
        ("2*x", "It is\nx*2", 1),
        (r"\pi", r"$\pi$", 1),
        ("1,000", "1000", 1),
        ("0.333", "1/3", 0),
        (42, r"\boxed{41}, no: \boxed{42}", 1),
        (41, r"\boxed{41}, no: \boxed{42}", 0),
        (1e-05, r"\boxed{0.00001}", 1),
        ("Worked out.\n#### 72", "3 \\times 24 = 72\n#### 72", 1),
        ("#### 6", "it is $4.00 + $2.00\n#### 6", 1),
        ("72", "", 0),
        ("72", r"\boxed{", 0),
        ([0, 5], r"\boxed{[0, 5]}", 1),
        ([0, 5], r"\boxed{[0, 6]}", 0),
    ],
)
def test_answers_are_compared_as_expressions(answer, completion, expected):
    assert score(completion, answer) == expected


def test_decimals_say_how_near_numbers_must_be():
    assert score(r"\boxed{0.3333}", r"\frac{1}{3}", decimals=3) == 1.0
    assert score(r"\boxed{0.3333}", r"\frac{1}{3}", decimals=6) == 0.0


NO_EXPRESSIONS = [
    *("", "one\nand two", None, float("nan"), float("inf"), True, {}, [], [None], [1, "tower"], "[]", "N/A"),
    *("none", "None", "null", "NaN", "tower", "north", "yes", "no solution", "June 20", "$tower$"),
    *("sin(x)", "log 2", "2 pi", "1 000", "1 1/2"),
]


@pytest.mark.parametrize("answer", NO_EXPRESSIONS)
def test_an_answer_that_is_no_expression_is_the_rows_fault(answer):
    with pytest.raises(RowError, match="the answer"):
        score("1", answer)


@pytest.mark.parametrize(
    "answer",
    [
        *("xyz", "2abc", "AB", r"\text{tower}", r"\mathrm{even}", r"\sin x", r"2\pi", "sqrt(2)", "inf", "y = mx + b"),
        *(r"A \cup B", r"\{x | x>3\}", "5 apples", "12:30", "f(x)=2x", r"\begin{pmatrix} a \\ b \end{pmatrix}", "e"),
        *(r"90^\circ", "3 cm", "(A)", "1e-3", "-2.5E+4"),
    ],
)
def test_letters_and_texts_that_are_answers_stay_answers(answer):
    assert (
        score(rf"\boxed{{{answer}}}" if "e-" not in answer and "E" not in answer else f"{float(answer)}", answer) == 1
    )
    assert score(r"\boxed{q + 7}", answer) == 0


def test_a_word_is_not_its_anagram():
    assert score(r"\boxed{\text{wrote}}", r"\text{tower}") == 0.0


def test_to_echo_the_question_is_not_to_answer_it():
    for question, answer in (("0 - 4 =", -4), ("What is 3 + 1 = ?", "4")):
        assert score(question, answer) == 0.0
        assert score(f"{question} {answer}", answer) == 1.0


def test_every_answer_of_gsm8k_is_its_own_and_real_attempts_get_their_labels(shared_data):
    for row in rows(shared_data("gsm8k/test.jsonl.gz")):
        assert score(row["answer"], row["answer"]) == 1.0, row
    graded = attempts(shared_data)[::3]  # all 4,220 agree; a third takes a few seconds
    assert [score(solution, answer) == 1.0 for solution, answer, _ in graded] == [label for *_, label in graded]


def test_numbers_of_theoremqa_in_a_sentence_are_recognised(shared_data):
    found = [row for row in rows(shared_data("theoremqa/theoremqa_text.jsonl.gz")) if row["Answer_type"] == "integer"]
    assert len(found) == 150
    assert all(score(f"The answer is {row['Answer']}.", row["Answer"]) == 1.0 for row in found)
    assert all(score(f"The answer is {row['Answer'] + 1}.", row["Answer"]) == 0.0 for row in found)

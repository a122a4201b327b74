from functools import partial

import pytest

from falign.rewards import number
from falign.rewards.verifiers import RowError, numbers
from falign.rewards.verifiers.numbers import last_number
from tests.rewards.verifiers.gsm8k import attempts, rows

score = partial(numbers.score, **number().parameters)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 3, or rather 42.", 42.0),
        ("10-5", 5.0),
        ("from 10 to -5", -5.0),
        ("−7 °C", -7.0),
        ("costs $1,234,567.50 in all", 1234567.5),
        ("about 1.5e-3 of it", 0.0015),
        (".5", 0.5),
        ("see section 2.3.1", 2.3),
        ("room B12", None),
        ("#### 7\n(checked with 8)", 7.0),
        (r"\boxed{9} since 3 + 6 = 9, as 5 > 1", 9.0),
        ("#### none, 5 at most", 5.0),
        ("nothing", None),
        ("0 - 4 =", 4.0),
        ("0 -4", 4.0),
        ("What is 12 − 5?", 5.0),
        ("0 - 4 = -4", -4.0),
        ("5 - -4", -4.0),
        ("(3 + 1) - 4", 4.0),
        ("1) -4", -4.0),
        ("50% - 4", 4.0),
        ("$5 - $4", 4.0),
        ("x - 4", 4.0),
        ("x = -4", -4.0),
        ("the answer is - 4", -4.0),
        ("3, -4", -4.0),
        ("It has 3.\n-4", -4.0),
        ("\\frac{1}{2} - 4", 4.0),
        ("", None),
    ],
)
def test_the_number_that_a_text_answers_with(text, number):
    assert last_number(text) == number


def test_the_tolerance_is_a_share_of_the_answer():
    assert score("1009", 1000, tolerance=0.01) == 1.0
    assert score("1011", 1000, tolerance=0.01) == 0.0
    assert score("0.00101", "0.001", tolerance=0.02) == 1.0
    assert score("0.002", "0.001", tolerance=0.02) == 0.0
    assert score("0.005", 0, tolerance=0.01) == 1.0


def test_an_answer_without_a_number_is_the_rows_fault():
    with pytest.raises(RowError, match="'none' holds no finite number"):
        score("5", "none")
    for answer in (None, True, float("nan"), float("inf"), "", "tower", [5], {"value": 5}):
        with pytest.raises(RowError, match="the answer"):
            score("5", answer)


@pytest.mark.parametrize(
    "answer", ["1/2", "10^5", "0 - 4", "5 - -4", "2 * -3", "3:45", "3 * (4", r"\frac{1}{2}", "2^{10}"]
)
def test_an_answer_that_is_a_calculation_is_not_its_last_number(answer):
    with pytest.raises(RowError, match="is a calculation or a fraction; write its value, or judge with math"):
        score("5", answer)


@pytest.mark.parametrize(("question", "answer"), [("0 - 4 =", -4), ("3 − 7 = ?", "-4"), ("What is 10 - 12?", -12)])
def test_to_echo_the_question_is_not_to_answer_it(question, answer):
    assert score(question, answer) == 0.0
    assert score(f"{question} {answer}", answer) == 1.0


def test_every_answer_of_gsm8k_is_its_own_and_real_attempts_get_their_labels(shared_data):
    answers = [row["answer"] for row in rows(shared_data("gsm8k/test.jsonl.gz"))]
    assert len(answers) == 1055
    assert all(score(answer, answer) == 1.0 for answer in answers)
    graded = attempts(shared_data)
    assert len(graded) == 4220
    assert [score(solution, answer) == 1.0 for solution, answer, _ in graded] == [label for *_, label in graded]

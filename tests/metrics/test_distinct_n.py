import pytest

from falign.metrics.distinct_n import distinct
from falign.metrics.ngrams import by_prompt, ngrams


def test_distinct_counts_over_all_completions():
    rows = [(1, 2, 3, 1, 2), (1, 2, 4)]
    assert distinct(rows, 1) == 4 / 8
    assert distinct(rows, 2) == 4 / 6  # 12, 23, 31, 24 among 12 23 31 12 and 12 24
    assert distinct(rows, 3) == 1.0


def test_nothing_is_no_diversity():
    assert distinct([(1,), ()], 2) == 0.0
    assert distinct([], 1) == 0.0


def test_texts_are_words():
    assert distinct(["so  it\ngoes", "so it went"], 2) == distinct([[0, 1, 2], [0, 1, 3]], 2) == 3 / 4


def test_an_iterator_will_do():
    assert distinct(iter([(1, 2), (1, 2)]), 1) == 0.5


def test_completions_by_prompt_keep_their_order():
    assert by_prompt(["a", "b", "c"], ["x", "y", "x"]) == [["a", "c"], ["b"]]
    assert by_prompt(["a", "b"], None) == [["a", "b"]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ngrams([1], 0), "n=0: an n-gram has 1 or more tokens"),
        (lambda: by_prompt([], None), "There are no completions"),
        (lambda: by_prompt(["a"], ["x", "y"]), "prompts has 2 entries for 1 completions"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

import math

import pytest

from falign.errors import DataError
from falign.rewards import Lexicon, fit_lexicon, read_labeled, read_lexicon


def test_outputs():
    weights = {"good": 1.0, "bad": -2.0}
    text = "Good, GOOD but bad"
    assert Lexicon(weights, bias=0.5).value(text) == 0.5
    assert Lexicon(weights, bias=0.5, output="mean").value(text) == 0.125
    assert Lexicon(weights, output="present").value("not goods") == 0.0
    assert Lexicon(weights, output="present").value("bad!") == 1.0
    assert Lexicon(weights, output="probability").value("bad") == pytest.approx(1 / (1 + math.exp(2)))
    assert Lexicon(weights, output="probability").value("bad " * 2000) == 0.0
    assert Lexicon(weights, output="mean").value("") == 0.0
    assert Lexicon(weights)(["p"] * 2, ["good", "bad"]) == [1.0, -2.0]


def test_weights_from_counts():
    # positive: fun fun, negative: dull fun; three words with smoothing 1 and two of the vocabulary.
    fitted = fit_lexicon(["Fun fun", "dull fun"], [True, False])
    assert fitted.weights["fun"] == pytest.approx(math.log((3 / 4) / (2 / 4)))
    assert fitted.weights["dull"] == pytest.approx(math.log((1 / 4) / (2 / 4)))
    assert fitted.bias == 0.0
    assert fit_lexicon(["a", "b", "c"], [True, True, False]).bias == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="all labels are the same"):
        fit_lexicon(["a"], [True])
    with pytest.raises(ValueError, match=r"smoothing=0.0 must be above 0"):
        fit_lexicon(["a", "b"], [True, False], smoothing=0.0)


def test_a_file_of_words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("Good\n\nsuperb\t2.5\nwell-made\t-1\n")
    assert read_lexicon(path) == {"good": 1.0, "superb": 2.5, "well-made": -1.0}
    for text, message in [
        ("a\nb c\n", r"words.txt:2: 'b c' is not a single word"),
        ("a\na\n", r"words.txt:2: 'a' is not a single word, or comes twice"),
        ("a\tmuch\n", r"words.txt:1: the weight 'much' is not a finite number"),
        ("a\tinf\n", "is not a finite number"),
        ("\n", "has no words"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_lexicon(path)


def test_a_file_of_labelled_texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a", "label": "pos"}\n{"text": "b", "label": "neg"}\n')
    assert read_labeled(path, positive="pos") == (["a", "b"], [True, False])
    with pytest.raises(DataError, match="all or none of its rows have the label 'positive'"):
        read_labeled(path, positive="positive")
    path.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"texts.jsonl:1: KeyError: 'label'"):
        read_labeled(path, positive="pos")


def test_snippets_teach_the_sentiment_of_other_snippets(shared_data):
    texts, labels = read_labeled(shared_data("movie-sentiment/sentence_polarity.jsonl.gz"), positive="pos")
    assert len(texts) == 8528
    fitted = fit_lexicon(texts[::2], labels[::2])
    right = [(fitted.value(text) > 0) == label for text, label in zip(texts[1::2], labels[1::2], strict=True)]
    assert sum(right) / len(right) > 0.75
    assert fitted.weights["heart"] > 0.0 > fitted.weights["boring"]

import random
from statistics import fmean

import pytest
from sacrebleu.metrics.bleu import BLEU

from falign.metrics.self_bleu import self_bleu

WORDS = ["the", "cat", "sat,", "on", "a", "mat.", "It's", "3.5", "dogs", "(bark)"]


def sentences(n, seed, longest=14):
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(0, longest))) for _ in range(n)]


def against_the_others(texts, **options):
    bleu = BLEU(effective_order=True, **options)
    scores = [bleu.sentence_score(t, [o for j, o in enumerate(texts) if j != i]) for i, t in enumerate(texts)]
    return fmean(score.score for score in scores) / 100


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_order", [1, 4, 5])
def test_self_bleu_is_sacrebleu_against_all_others(seed, max_order):
    texts = sentences(12, seed)
    texts += texts[:2]  # equal ones share the largest counts
    assert self_bleu(texts, max_order=max_order) == pytest.approx(
        against_the_others(texts, max_ngram_order=max_order), rel=1e-12
    )


def test_another_tokenizer():
    texts = sentences(6, seed=9)
    assert self_bleu(texts, tokenize="char") == pytest.approx(against_the_others(texts, tokenize="char"))
    assert self_bleu(texts, tokenize="char") != self_bleu(texts)


def test_tokens_are_taken_as_they_are():
    texts = sentences(8, seed=5)
    ids = {word: i for i, word in enumerate(WORDS)}
    rows = [[ids[word] for word in text.split()] for text in texts]
    assert self_bleu(rows) == pytest.approx(against_the_others(texts, tokenize="none"))


def test_equal_completions_have_one_and_strangers_nothing():
    assert self_bleu(["one two three four five"] * 3) == pytest.approx(1.0)
    assert self_bleu(["a b c d", "e f g h"]) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: self_bleu(["a"]), "1 completion has no others"),
        (lambda: self_bleu(["a", "b"], max_order=0), "max_order=0 must be 1 or more"),
        (lambda: self_bleu(["a", "b"], tokenize="bpe"), "tokenize='bpe': sacrebleu has none, zh"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

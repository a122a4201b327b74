"""Weights of a data column reach the tokens whose text they were given for."""

import json
import math

import pytest
import torch

from falign.data import DataSource, Window, load_preferences
from falign.data.token_weights import character_weights
from falign.divergences import get
from falign.errors import DataError
from falign.methods import OPADPO
from falign.models import load_tokenizer
from falign.objectives import CompletionBatch, Pairwise, TokenPairwise
from falign.scoring import Scorer, data_weights
from tests.models.tiny import tiny_tokenizer

PAIR = {"prompt": "Where is it?", "chosen": "It is in Wien, Österreich.", "rejected": "It is on the moon."}
SEGMENTS = [{"text": "It is in ", "weight": 1}, {"text": "Wien", "weight": 3.0}, {"text": ", Österreich.", "weight": 0}]
ROW = {**PAIR, "chosen_weights": SEGMENTS, "rejected_weights": [{"start": 6, "end": 12, "weight": 2.5}]}


def trees_of(rows, tokenizer, folder, *, chat=True, window=None):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    window = window or Window(512)
    source = DataSource(str(path), chat=chat)
    return load_preferences([source], tokenizer, stop_token_ids={tokenizer.eos_token_id}, window=window).train


@pytest.fixture(params=["tiny", "demo:smollm2-135m-instruct"])
def tokenizer(request):
    return tiny_tokenizer() if request.param == "tiny" else load_tokenizer(request.param)


@pytest.mark.parametrize("chat", [False, True])
def test_each_token_has_the_mean_weight_of_its_characters(tokenizer, chat, tmp_path):
    (tree,) = trees_of([ROW], tokenizer, tmp_path, chat=chat)
    chosen, rejected = tree.token_weights
    # Read off the tokens' own texts, from left to right; a token with a part of a character is left out.
    text = "".join(c for segment in SEGMENTS for c in segment["text"] if not c.isspace())
    weights = [segment["weight"] for segment in SEGMENTS for c in segment["text"] if not c.isspace()]
    at, checked = 0, 0
    ids = tree.completion_ids[0]  # which may begin with a part of the template
    first = next(i for i in range(len(ids)) if tokenizer.decode(ids[i:]).lstrip().startswith("It is"))
    assert set(chosen[:first]) <= {1.0}
    for token, weight in zip(ids[first:], chosen[first:], strict=True):
        own = "".join(tokenizer.decode([token]).split())
        place = text.find(own, at, at + len(own) + 2)
        if own and place >= 0:
            assert weight == pytest.approx(sum(weights[place : place + len(own)]) / len(own)), own
            at, checked = place + len(own), checked + 1
    assert at == len(text)
    assert checked >= 8
    assert chosen[-1] == 1.0  # the stop token
    assert {0.0, 1.0, 3.0} <= set(chosen)
    assert {1.0, 2.5} <= set(rejected)


def test_weights_are_cut_with_their_completion_and_laid_out_like_it(tmp_path):
    tokenizer = tiny_tokenizer()
    (whole,) = trees_of([ROW], tokenizer, tmp_path)
    (cut,) = trees_of([ROW], tokenizer, tmp_path, window=Window(512, 20, "cut", "cut"))
    assert [len(own) for own in cut.token_weights] == [20, 20]
    assert cut.token_weights[0] == whole.token_weights[0][:20]
    weights = data_weights([whole, cut])
    for layout in ("tree", "padded"):
        batch = Scorer(layout, pad_token_id=1).lay_out([whole, cut])
        assert weights.shape == batch.completion_mask.shape
        assert weights.masked_fill(batch.completion_mask, 0.0).eq(0).all()
    assert weights[3, :20].tolist() == pytest.approx(list(cut.token_weights[1]))


def test_an_empty_list_is_ones_and_rows_without_weights_are_refused_where_they_are_read(tmp_path):
    rows = [{**PAIR, "chosen_weights": [], "rejected_weights": []}, {**PAIR, "prompt": "And now?"}]
    first, second = trees_of(rows, tiny_tokenizer(), tmp_path)
    assert {weight for own in first.token_weights for weight in own} == {1.0}
    assert second.token_weights is None
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2 has no weights of tokens.*chosen_weights"):
        data_weights([first, second])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen_weights": SEGMENTS[:2]}, r"'chosen_weights': the segments end before the answer does"),
        ({"chosen_weights": SEGMENTS[1:]}, r"segment 0 \('Wien'\) does not continue the answer"),
        ({"chosen_weights": [{"start": 0, "end": 99, "weight": 1}]}, r"span 0 is 0 to 99; .* 26 characters"),
        ({"chosen_weights": [{"start": 0, "end": 4, "weight": 1}, {"start": 3, "end": 5, "weight": 1}]}, "overlaps"),
        ({"chosen_weights": [{"start": 0, "end": 4, "weight": -1}]}, "weight -1; it must be a finite number, not neg"),
        ({"chosen_weights": [{"text": PAIR["chosen"], "weight": "high"}]}, "the weight 'high'"),
        ({"chosen_weights": [1.0, 2.0]}, "it must be a list of"),
        ({"chosen_weights": [{"word": "It", "weight": 1}]}, "it must be a list of"),
        ({"rejected_weights": None}, "'rejected_weights' is missing beside 'chosen_weights'; give"),
        ({"completion_weights": []}, "'completion_weights' in a row of another form"),
    ],
)
def test_weights_that_do_not_fit_their_answer_are_refused_with_the_rows_place(changes, message, tmp_path):
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: .*" + message):
        trees_of([{**ROW, **changes}], tiny_tokenizer(), tmp_path)


def test_a_weight_of_infinity_is_refused():
    with pytest.raises(DataError, match="weight inf"):
        character_weights([{"text": "a", "weight": math.inf}], "a", place="here")


def batch_of(weights):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: -torch.rand(4, 5, generator=generator, dtype=torch.float64)  # noqa: E731
    return CompletionBatch(
        logprobs=draw().requires_grad_(),
        reference_logprobs=draw(),
        completion_mask=torch.arange(5) < torch.tensor([[5], [3], [4], [5]]),
        prompt_index=torch.tensor([0, 0, 1, 1]),
        preference=torch.tensor([1.0, 0.0, 0.0, 1.0]),
        token_weights=weights,
    )


WEIGHTS = torch.rand(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mul(3).round()


def test_opa_dpo_is_dpo_of_weighted_log_ratios_with_an_anchor_on_the_chosen_reward():
    batch = batch_of(WEIGHTS)
    value = OPADPO(beta=0.3, anchor=0.7)(batch).mean()
    m = (WEIGHTS * (batch.logprobs - batch.reference_logprobs) * batch.completion_mask).sum(dim=-1)
    sigmoid = lambda x: 1 / (1 + torch.exp(-x))  # noqa: E731
    chosen, rejected = m[[0, 3]], m[[1, 2]]
    expected = -sigmoid(0.3 * (chosen - rejected)).log().mean() - 0.7 * sigmoid(0.3 * chosen).log().mean()
    assert value.item() == pytest.approx(expected.item(), abs=1e-14)
    found, true = (torch.autograd.grad(each, batch.logprobs)[0] for each in (value, expected))
    torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-15)
    assert found[WEIGHTS == 0].eq(0).all()  # a weight of 0 removes the token


def test_weights_of_one_are_the_plain_loss_to_the_bit_and_tdpo_without_divergence_is_the_same_loss():
    ones = batch_of(torch.ones(4, 5, dtype=torch.float64))
    f = get("jensen_shannon")
    weighted = Pairwise(f, weighting="data")(ones).terms[0].losses
    assert torch.equal(weighted, Pairwise(f)(ones).terms[0].losses)
    batch = batch_of(WEIGHTS)
    batch = CompletionBatch.of({**batch.tensors(), "measures.divergence": torch.zeros(4, 5, dtype=torch.float64)})
    other = TokenPairwise(get("forward_kl"), 0.1, alpha=0.0, weighting="data")(batch).terms[0].losses
    torch.testing.assert_close(Pairwise(get("reverse_kl"), weighting="data")(batch).terms[0].losses, other)

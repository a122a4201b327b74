from dataclasses import replace

import pytest
import torch

from falign.errors import ConfigError, DataError, ModelError
from falign.objectives import get_measure
from falign.references import AdapterOff, Cached, CacheKey, FrozenModel, Reference
from falign.scoring import PromptTree, Scorer, completion_scores, pad
from tests.references.spy import ForwardSpy
from tests.scoring.models import TREES, tiny_model, with_lora

BATCH = pad(TREES, pad_token_id=2)
SCORER = Scorer(pad_token_id=2)
KEY = CacheKey(weights="w1", config="c", vocabulary=260, tokenizer="t1", dtype="float32", attention="sdpa")


@pytest.fixture
def policy():
    return with_lora(tiny_model(), trained=True)


def test_the_cache_gives_bit_for_bit_what_its_reference_gave(tmp_path, policy):
    live = AdapterOff().logprobs(policy, BATCH)
    cached = Cached(AdapterOff(), directory=tmp_path, key=KEY)
    assert torch.equal(cached.logprobs(policy, BATCH), live)
    assert torch.equal(cached.logprobs(policy, BATCH), live)


def test_hits_need_no_forward_in_any_order_and_grouping_after_reopening(tmp_path, policy):
    live = AdapterOff().logprobs(policy, BATCH)
    spy = ForwardSpy(policy)
    Cached(AdapterOff(), directory=tmp_path, key=KEY).logprobs(policy, BATCH)
    assert len(spy) == 1
    reopened = Cached(AdapterOff(), directory=tmp_path, key=KEY)
    swapped = [PromptTree(tree.prompt_ids, tree.completion_ids[::-1]) for tree in TREES[::-1]]
    assert torch.equal(reopened.logprobs(policy, pad(swapped, pad_token_id=0)).flip(0), live)
    alone = reopened.logprobs(policy, pad(TREES[2:], pad_token_id=2, pad_to_multiple_of=16))
    assert torch.equal(alone, live[5:, :2])
    assert len(spy) == 1


def test_another_adapter_seed_or_a_trained_adapter_still_hits(tmp_path, policy):
    Cached(AdapterOff(), directory=tmp_path, key=KEY).logprobs(policy, BATCH)
    other = with_lora(tiny_model(), seed=99, r=4, trained=True)
    spy = ForwardSpy(other)
    logprobs = Cached(AdapterOff(), directory=tmp_path, key=KEY).logprobs(other, BATCH)
    assert len(spy) == 0
    torch.testing.assert_close(logprobs, AdapterOff().logprobs(other, BATCH))


@pytest.mark.parametrize(
    "tree",
    [
        PromptTree((5, 6, 7), ((8, 9, 3),)),
        PromptTree((5, 6, 8), ((8, 9, 2),)),
        PromptTree((6, 7), ((8, 9, 2),)),
        PromptTree((5, 6, 7), ((8, 9),)),
        PromptTree((5, 6), ((7, 8, 9, 2),)),
    ],
)
def test_a_change_of_token_ids_truncation_or_boundary_misses(tmp_path, policy, tree):
    cached = Cached(AdapterOff(), directory=tmp_path, key=KEY)
    cached.logprobs(policy, BATCH)
    spy = ForwardSpy(policy)
    batch = pad([tree], pad_token_id=2)
    torch.testing.assert_close(cached.logprobs(policy, batch), AdapterOff().logprobs(policy, batch))
    assert len(spy) == 2
    cached.logprobs(policy, batch)
    assert len(spy) == 2


@pytest.mark.parametrize("field", ["weights", "tokenizer", "dtype", "attention"])
def test_a_change_of_weights_tokenizer_dtype_or_attention_is_refused(tmp_path, policy, field):
    Cached(AdapterOff(), directory=tmp_path, key=KEY).logprobs(policy, BATCH)
    with pytest.raises(ConfigError, match=f"stale: computed with {field} "):
        Cached(AdapterOff(), directory=tmp_path, key=replace(KEY, **{field: "else"}))


def test_a_key_of_other_weights_than_the_reference_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'w1', but its reference has 'w2'"):
        Cached(AdapterOff(weights="w2"), directory=tmp_path, key=KEY)


def test_values_of_a_sixteen_bit_reference_are_kept_in_float32(tmp_path):
    reference = FrozenModel(tiny_model().bfloat16())
    policy = tiny_model()
    live = reference.logprobs(policy, BATCH)
    cached = Cached(reference, directory=tmp_path, key=KEY)
    assert torch.equal(cached.logprobs(policy, BATCH), live)
    assert live.dtype == torch.float32
    assert not torch.equal(live, live.bfloat16().float())


class CallNumber(Reference):
    """Gives every token the negative number of the call."""

    calls = 0

    def identity(self):
        return {"kind": "call_number"}

    def logprobs(self, policy_model, batch):
        self.calls += 1
        return torch.where(batch.completion_mask, -float(self.calls), 0.0)

    def states(self, policy_model, batch, *, weighting="none"):
        raise NotImplementedError


def test_a_value_that_was_kept_is_never_replaced(tmp_path, policy):
    cached = Cached(CallNumber(), directory=tmp_path, key=KEY)
    cached.logprobs(policy, pad(TREES[:1], pad_token_id=2))
    sums = [-3, -2, -4, -10, -2, -4, -2]
    assert cached.logprobs(policy, BATCH).sum(-1).tolist() == sums
    assert Cached(None, directory=tmp_path, key=KEY).logprobs(policy, BATCH).sum(-1).tolist() == sums


def test_precompute_runs_the_longest_first_once_and_then_needs_no_reference(tmp_path, policy):
    spy, progress = ForwardSpy(policy), []
    cached = Cached(AdapterOff(), directory=tmp_path, key=KEY)
    computed = cached.precompute(
        policy,
        iter([*TREES, TREES[0]]),
        scorer=SCORER,
        batch_size=1,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert computed == 3
    assert spy.shapes == [(2, 9), (2, 6), (3, 6)]
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert len(list(tmp_path.glob("shard-*"))) == 1

    without = Cached(None, directory=tmp_path, key=KEY)
    logprobs = without.logprobs(policy, BATCH)
    assert without.precompute(policy, TREES, scorer=SCORER) == 0
    assert len(spy) == 3
    torch.testing.assert_close(logprobs, AdapterOff().logprobs(policy, BATCH), rtol=0, atol=1e-6)


def test_precompute_keeps_what_it_has_when_it_is_interrupted(tmp_path, policy, monkeypatch):
    monkeypatch.setattr("falign.references.cached._ENTRIES_PER_SHARD", 1)

    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    cached = Cached(AdapterOff(), directory=tmp_path, key=KEY)
    with pytest.raises(KeyboardInterrupt):
        cached.precompute(policy, TREES, scorer=SCORER, batch_size=1, on_progress=interrupt)
    spy = ForwardSpy(policy)
    assert Cached(AdapterOff(), directory=tmp_path, key=KEY).precompute(policy, TREES, scorer=SCORER) == 1
    assert spy.shapes == [(3, 6)]


def test_what_is_missing_without_reference_is_an_error_with_the_place(tmp_path, policy):
    Cached(AdapterOff(), directory=tmp_path, key=KEY).logprobs(policy, pad(TREES[:1], pad_token_id=2))
    with pytest.raises(DataError, match=r"5 of 7 completions.*'a:2'.*precompute"):
        Cached(None, directory=tmp_path, key=KEY).logprobs(policy, BATCH)


def test_values_that_are_not_finite_are_refused_and_not_kept(tmp_path):
    broken = tiny_model()
    torch.nn.init.constant_(broken.model.norm.weight, torch.nan)
    cached = Cached(FrozenModel(broken), directory=tmp_path, key=KEY)
    with pytest.raises(ModelError, match="gives a:1 a log-probability that is not finite"):
        cached.logprobs(tiny_model(), BATCH)
    assert len(cached.store) == 0
    assert not list(tmp_path.glob("shard-*"))


def test_identity_holds_the_key_and_the_wrapped_identity(tmp_path):
    wrapped = {"kind": "adapter_off", "weights": "w1"}
    cached = Cached(AdapterOff(weights="w1"), directory=tmp_path, key=KEY)
    assert cached.identity() == {"kind": "cached", "reference": wrapped, **KEY.record}
    assert Cached(None, directory=tmp_path, key=KEY).identity()["reference"] is None


def test_whole_distributions_come_from_the_live_reference_or_not_at_all(tmp_path, policy):
    live = AdapterOff()
    cached = Cached(live, directory=tmp_path, key=KEY)
    hidden = cached.states(policy, BATCH, weighting="activations")
    expected = live.states(policy, BATCH, weighting="activations")
    assert torch.equal(hidden.distribution.hidden, expected.distribution.hidden)
    assert torch.equal(hidden.token_weights, expected.token_weights)
    with pytest.raises(ConfigError, match=r"log-probabilities of single tokens.*computed live.*reference.cache"):
        Cached(None, directory=tmp_path, key=KEY).states(policy, BATCH)


TOP = replace(KEY, top_k=5)


def test_the_most_likely_tokens_are_stored_beside_the_log_probabilities_and_read_by_measures_of_these(tmp_path):
    reference, policy = FrozenModel(tiny_model("llama", seed=1), weights=KEY.weights), tiny_model("llama").eval()
    batch = pad([PromptTree((5, 6), ((7, 8, 1), (9, 1))), PromptTree((4,), ((3, 1),))], pad_token_id=1)
    Cached(reference, directory=tmp_path, key=TOP).logprobs(policy, batch)
    spy = ForwardSpy(reference.model)
    stored = Cached(None, directory=tmp_path, key=TOP)
    torch.testing.assert_close(stored.logprobs(policy, batch), reference.logprobs(policy, batch))
    spies = len(spy)
    measures = {
        "top": get_measure("top_k(forward_kl, k=4, tail=renormalized)"),
        "rest": get_measure("top_k(reverse_kl, k=5, tail=bucket)"),
    }

    def measured(teacher):
        scores = completion_scores(
            policy, batch, measures=measures, references={"reference": teacher.states(policy, batch).distribution}
        )
        gradients = torch.autograd.grad(sum(each.sum() for each in scores.measures.values()), policy.lm_head.weight)
        return scores.measures, scores.references, gradients

    found = measured(stored)
    assert len(spy) == spies, "the stored values need no model"
    torch.testing.assert_close(found, measured(reference), rtol=1e-5, atol=1e-5)
    wider = {"wider": get_measure("top_k(forward_kl, k=6)")}
    whole = {"whole": get_measure("divergence_to(forward_kl)")}
    for more, message in (
        (wider, "6 most likely tokens .* of which 5 are known: lower k"),
        (whole, "of which only the 5"),
    ):
        with pytest.raises(ConfigError, match=message):
            completion_scores(
                policy, batch, measures=more, references={"reference": stored.states(policy, batch).distribution}
            )


def test_a_store_of_tokens_is_another_than_that_of_log_probabilities(tmp_path):
    assert TOP.digest != KEY.digest
    assert "top_k" not in KEY.record
    Cached(None, directory=tmp_path, key=KEY)
    with pytest.raises(ConfigError, match="top_k None instead of 5"):
        Cached(None, directory=tmp_path, key=TOP)
    with pytest.raises(ValueError, match="k=300 must be between 1 and the 97 tokens"):
        Cached(FrozenModel(tiny_model("llama")), directory=tmp_path / "much", key=replace(KEY, top_k=300)).logprobs(
            tiny_model("llama"), pad([PromptTree((5,), ((7, 1),))], pad_token_id=1)
        )

"""References that score the completions behind another prompt."""

from dataclasses import replace

import pytest
import torch

from falign.errors import DataError
from falign.references import (
    AdapterOff,
    Cached,
    FrozenModel,
    Geometric,
    MovingReference,
    PeriodicReset,
    Prompted,
    Reference,
    objective_inputs,
)
from falign.scoring import PromptTree, pack, pad
from tests.conformance.test_references import KEY
from tests.references.test_combinations import Reading
from tests.scoring.models import TREES, tiny_model, with_lora

OTHERS = {
    ("a:1", (5, 6, 7)): (40, 41, 5, 6, 7, 42),
    ("a:2", (11,)): (43,),
    ("a:3", (17, 18, 19, 20, 21, 2, 22)): (17, 18, 44),
}


def oracle(model):
    """``log p`` of each completion token behind the other prompt, from whole logits of one row at a time."""
    found = []
    for tree in TREES:
        other = OTHERS[tree.place, tree.prompt_ids]
        for completion in tree.completion_ids:
            with torch.no_grad():
                logits = model(torch.tensor([[*other, *completion]])).logits[0, len(other) - 1 : -1]
            found.append(logits.log_softmax(-1)[range(len(completion)), completion])
    return torch.cat(found)


@pytest.mark.parametrize("layout", [pad, pack])
def test_completions_keep_their_ids_and_are_predicted_behind_the_other_prompt(layout):
    model, policy, batch = tiny_model(seed=5), tiny_model(), layout(TREES, pad_token_id=2)
    reference = Prompted(FrozenModel(model, weights="w"), OTHERS, template="x")
    found = reference.logprobs(policy, batch)
    torch.testing.assert_close(found[batch.completion_mask], oracle(model), rtol=0, atol=2e-5)
    other = reference.batch(batch)
    assert torch.equal(other.completion_mask, batch.completion_mask)
    assert [completion for _, completion in other.token_ids()] == [completion for _, completion in batch.token_ids()]
    objective = Reading("reference_logprobs", away="divergence_to(forward_kl)", plain="divergence_to(forward_kl, t)")
    references = {"reference": reference, "t": FrozenModel(model)}
    scores = objective_inputs(policy, batch, references=references, objective=objective).completions
    torch.testing.assert_close(scores.reference_logprobs, found, rtol=0, atol=2e-5)
    away = (scores.measures["away"] - scores.measures["plain"]).abs()[batch.completion_mask]
    assert away.max() > 1e-3, "the whole distributions are behind the other prompt too"


def test_the_policy_behind_a_privileged_prompt_is_its_own_teacher_with_the_adapter_off_or_as_it_was():
    policy, batch = with_lora(tiny_model()), pad(TREES, pad_token_id=2)
    off = Prompted(AdapterOff(weights="w"), OTHERS, template="x")
    torch.testing.assert_close(
        off.logprobs(policy, batch)[batch.completion_mask], oracle(tiny_model()), rtol=0, atol=2e-5
    )
    past = Prompted(MovingReference.beside(policy, rule=PeriodicReset(every=2), weights="w"), OTHERS, template="x")
    assert past.moves
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".default." in name:
                parameter.add_(0.1)
    before = past.logprobs(policy, batch)
    past.move(policy, 2, None)
    moved = past.logprobs(policy, batch)
    assert not torch.allclose(before, moved)
    assert past.metrics() == {"moves": 1.0}
    torch.testing.assert_close(moved[batch.completion_mask], oracle(policy), rtol=0, atol=2e-5)


def test_a_combination_behind_a_prompt_is_that_of_its_members_there():
    policy, batch = tiny_model(), pad(TREES, pad_token_id=2)
    members = {"a": FrozenModel(tiny_model(seed=5), weights="a"), "b": FrozenModel(tiny_model(seed=6), weights="b")}
    weights = {"a": 1.25, "b": -0.25}
    whole = Prompted(Geometric(members, weights), OTHERS, template="x")
    each = {name: Prompted(member, OTHERS, template="x") for name, member in members.items()}
    torch.testing.assert_close(whole.logprobs(policy, batch), Geometric(each, weights).logprobs(policy, batch))


def test_the_cache_holds_the_values_behind_the_other_prompt(tmp_path):
    model, policy, batch = tiny_model(seed=5), tiny_model(), pad(TREES, pad_token_id=2)
    reference, key = Prompted(FrozenModel(model, weights="t"), OTHERS, template="x"), replace(KEY, weights="t")
    asked = []

    def make(inner, trees):
        asked.extend(trees)
        return Cached(inner, directory=tmp_path, key=key)

    cached = reference.with_cache(make, TREES)
    assert [tree.prompt_ids for tree in asked] == [*OTHERS.values()]
    expected = reference.logprobs(policy, batch)
    torch.testing.assert_close(cached.logprobs(policy, batch), expected)
    stored = Prompted(Cached(None, directory=tmp_path, key=key), OTHERS, template="x")
    torch.testing.assert_close(stored.logprobs(policy, batch), expected)


def test_the_identity_names_the_prompt_and_changes_with_its_tokens():
    model = FrozenModel(tiny_model(), weights="w")
    one, two = Prompted(model, OTHERS, template="x"), Prompted(model, {**OTHERS, ("a:2", (11,)): (44,)}, template="x")
    assert one.identity()["prompt"] == "x"
    assert one.identity()["weights"] == "w"
    assert one.identity()["prompts"] != two.identity()["prompts"]


def test_a_row_without_other_prompt_is_refused_by_its_place():
    reference = Prompted(FrozenModel(tiny_model()), OTHERS, template="{solution}")
    batch = pad([PromptTree((5, 6), ((7, 2),), place="b:9")], pad_token_id=2)
    with pytest.raises(DataError, match=r"^b:9: there is no prompt '\{solution\}' of this row"):
        reference.logprobs(tiny_model(), batch)


def test_it_answers_every_question_as_the_reference_inside_it():
    own = {"can_shard", "starts_as_policy", "logprobs_in", "states_in", "moves", "every", "cannot_shard"}
    assert {name for name in vars(Reference) if not name.startswith("_")} - own <= vars(Prompted).keys()

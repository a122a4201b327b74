"""One battery that every kind of reference passes; a new kind is one row of KINDS."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig

from falign.errors import ConfigError, ModelError
from falign.references import (
    AdapterOff,
    AdapterReference,
    Cached,
    CacheKey,
    FrozenModel,
    Geometric,
    Mixture,
    MovingAverage,
    MovingReference,
    PeriodicReset,
    Prompted,
    Reference,
    ResetOnStall,
    Soup,
    StallReset,
    VLLMReference,
    check_same_at_start,
)
from falign.rollouts import PromptScorer
from falign.runfile import OwnReferenceConfig, ReferenceSection
from falign.scoring import completion_scores, pack, pad
from falign.scoring.vocabulary import target_logprobs
from falign.training.trainer import _require_shardable
from tests.models.tiny import fill_adapter, tiny_tokenizer
from tests.references.spy import ForwardSpy
from tests.rollouts.loopback import Loopback
from tests.runfile.test_every_field import SECTIONS
from tests.scoring.models import TREES, VOCABULARY, tiny_model, with_lora

BATCH = pad(TREES, pad_token_id=2)
KEY = CacheKey(weights="w", config="c", vocabulary=VOCABULARY, tokenizer="t", dtype="float32", attention="sdpa")


def beside(policy: Any) -> Any:
    """Give a policy a frozen adapter that is the reference."""
    policy.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    return fill_adapter(policy, seed=4, scale=0.5, name="ref")


def adapter(policy: Any, folder: Any) -> AdapterReference:
    beside(policy)
    return AdapterReference(weights="w", path="sft")


def members(policy: Any) -> dict[str, Reference]:
    return {"a": FrozenModel(tiny_model(seed=5), weights="w"), "b": AdapterOff(weights="w")}


SERVERS: list[Loopback] = []


@pytest.fixture(autouse=True)
def stop_servers():
    yield
    while SERVERS:
        SERVERS.pop().stop()


@functools.cache
def served_model() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    tiny_model(seed=5).save_pretrained(folder.name)
    tiny_tokenizer().save_pretrained(folder.name)
    return folder


def served() -> VLLMReference:
    SERVERS.append(Loopback(served_model().name, max_rank=0).start())
    return VLLMReference(PromptScorer(SERVERS[-1].url, timeout=20.0, wait=0.0))


class Kind(NamedTuple):
    """A kind of reference.

    Attributes:
        build: Makes it for a policy, which may get an adapter more, with a folder for its files.
        starts_as_policy: Whether it is the policy as :func:`policy` makes it.
        moves: Whether it follows the policy.
        stalls: Whether it does so when evaluations stall, and not at intervals.
        whole: Whether the policy is a whole model, without adapter.
        writes: Whether it is a model that can be sampled from.
        distributions: Whether it gives whole distributions, and not only the log-probabilities of given tokens.
    """

    build: Callable[[Any, Any], Reference]
    starts_as_policy: bool = False
    moves: bool = False
    stalls: bool = False
    whole: bool = False
    writes: bool = True
    distributions: bool = True


AVERAGE, RESET = MovingAverage(alpha=0.3, every=2), PeriodicReset(every=2, reset_optimizer=True)
KINDS = {
    "adapter_off": Kind(lambda policy, folder: AdapterOff(weights="w", starts_as_policy=True), True),
    "adapter": Kind(adapter),
    "frozen": Kind(lambda policy, folder: FrozenModel(tiny_model(seed=5), weights="w")),
    "frozen_start": Kind(lambda policy, folder: FrozenModel(tiny_model(), weights="w", starts_as_policy=True), True),
    "soup": Kind(lambda policy, folder: Soup(adapter(policy, folder), record={"members": [{"path": "a"}]})),
    "moving_average": Kind(lambda p, folder: MovingReference.beside(p, rule=AVERAGE, weights="w"), True, True),
    "moving_average_full": Kind(
        lambda p, folder: MovingReference(FrozenModel(copy.deepcopy(p), weights="w"), rule=AVERAGE),
        True,
        True,
        whole=True,
    ),
    "periodic_reset": Kind(lambda p, folder: MovingReference.beside(p, rule=RESET, weights="w"), True, True),
    "reset_on_stall": Kind(
        lambda p, folder: StallReset.beside(p, rule=ResetOnStall(patience=1), weights="w"), True, True, stalls=True
    ),
    "mixture": Kind(lambda policy, folder: Mixture(members(policy), {"a": 0.7, "b": 0.3}), writes=False),
    "geometric": Kind(lambda policy, folder: Geometric(members(policy), {"a": 1.25, "b": -0.25}), writes=False),
    "prompted": Kind(
        lambda policy, folder: Prompted(
            AdapterOff(weights="w", starts_as_policy=True),
            {(tree.place, tree.prompt_ids): (31, 32, *tree.prompt_ids) for tree in TREES},
            template="a hint: {prompt}",
        ),
        writes=False,
    ),
    "vllm": Kind(lambda policy, folder: served(), writes=False, distributions=False),
    "cached": Kind(
        lambda policy, folder: Cached(AdapterOff(weights="w"), directory=folder / "cache", key=KEY), writes=False
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def built(kind, tmp_path):
    """A policy in training, before its first step, with its reference."""
    policy = policy_of(kind)
    return policy, kind.build(policy, tmp_path)


def test_every_kind_of_a_run_file_has_a_row():
    sections = [section for section in SECTIONS.values() if issubclass(section, ReferenceSection)]
    kinds = {section.model_fields["kind"].default for section in sections if section is not OwnReferenceConfig}
    assert kinds - {"auto", "python"} <= KINDS.keys()


def policy_of(kind: Kind) -> Any:
    return (tiny_model(attention_dropout=0.3) if kind.whole else with_lora(tiny_model(), lora_dropout=0.3)).train()


def trained(policy: Any, seed: int = 1) -> None:
    """Take a step in place of an optimizer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (each for each in policy.parameters() if each.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_the_identity_is_plain_names_its_kind_and_does_not_depend_on_the_policys_steps(built):
    policy, reference = built
    identity = reference.identity()
    assert isinstance(identity["kind"], str)
    assert json.loads(json.dumps(identity)) == identity
    trained(policy)
    reference.logprobs(policy, BATCH)
    assert reference.identity() == identity


def test_scores_are_constant_normal_and_leave_the_policy_as_it_was(built):
    policy, reference = built
    trained(policy)
    state = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    grads = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    logprobs = reference.logprobs(policy, BATCH)
    assert not logprobs.requires_grad
    assert (logprobs[BATCH.completion_mask] < 0).all()
    assert (logprobs[~BATCH.completion_mask] == 0).all()
    assert torch.equal(reference.logprobs(policy, BATCH), logprobs), "dropout is on, or the policy's state matters"
    torch.testing.assert_close(reference.logprobs(policy, pack(TREES, pad_token_id=2)), logprobs, rtol=0, atol=2e-6)
    assert all(torch.equal(state[name], parameter) for name, parameter in policy.named_parameters())
    assert grads == {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    assert policy.training


def test_whole_distributions_have_the_log_probabilities_of_the_tokens_also_once_the_policy_has_gone_on(kind, built):
    policy, reference = built
    if not kind.distributions:
        with pytest.raises(ConfigError, match="gives the log-probabilities of given tokens"):
            reference.states(policy, BATCH)
        return
    expected = reference.logprobs(policy, BATCH)[BATCH.completion_mask]
    distribution = reference.states(policy, BATCH).distribution
    trained(policy)  # the head is applied later
    tokens = torch.tensor([token for _, completion in BATCH.token_ids() for token in completion])
    found = target_logprobs({"reference": distribution}, tokens, chunk_tokens=4)["reference"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_it_is_the_policy_at_the_start_just_where_it_says_so(kind, built):
    policy, reference = built
    assert reference.starts_as_policy == kind.starts_as_policy
    if kind.starts_as_policy:
        check_same_at_start(policy, reference, BATCH)
        trained(policy)
    if reference.starts_as_policy or "reference" not in reference.identity():  # the cached one started as the policy
        with pytest.raises(ModelError, match="differ by"):
            check_same_at_start(policy, reference, BATCH)


def test_it_stays_until_it_moves_and_moves_when_it_is_due(kind, built):
    policy, reference = built
    optimizer = torch.optim.AdamW([each for each in policy.parameters() if each.requires_grad])
    assert reference.moves == kind.moves
    before = reference.logprobs(policy, BATCH)
    trained(policy)
    for step in (0, 1):
        reference.observe({"reward": 1.0 + step})
        reference.move(policy, step, optimizer)
        assert torch.equal(reference.logprobs(policy, BATCH), before)
    reference.observe({"reward": 2.0})
    reference.move(policy, 2, optimizer)
    assert torch.equal(reference.logprobs(policy, BATCH), before) != kind.moves
    assert (reference.metrics().get("moves") == 1.0) == kind.moves


def test_it_does_not_move_between_the_updates_on_a_rollout(kind, built):
    _, reference = built
    for updates in (1, 2):
        reference.check_rollouts(place="reference", updates=updates)
    if kind.moves and not kind.stalls:
        with pytest.raises(ConfigError, match=r"reference\.every=2 is not a multiple of the 4 optimizer steps"):
            reference.check_rollouts(place="reference", updates=4)
    else:
        reference.check_rollouts(place="reference", updates=4)


def test_what_is_saved_is_gone_on_from_bit_for_bit(kind, built, tmp_path):
    policy, reference = built
    (state := tmp_path / "state").mkdir()
    trained(policy)
    for _ in range(2):
        reference.observe({"reward": 1.0})
    reference.move(policy, 2, torch.optim.SGD(policy.parameters()))
    reference.save(state, policy)
    assert any(state.iterdir()) == kind.moves, "what does not move has nothing to save"
    expected = reference.logprobs(policy, BATCH)
    again = policy_of(kind)
    other = kind.build(again, tmp_path / "again")
    trained(again)
    other.load(state, again)
    assert torch.equal(other.logprobs(again, BATCH), expected)
    assert (other.identity(), other.metrics()) == (reference.identity(), reference.metrics())


def test_what_acts_is_the_reference_or_refuses(kind, built):
    policy, reference = built
    expected = reference.logprobs(policy, BATCH)
    if not kind.writes:
        with pytest.raises(ModelError, match="cannot generate"), reference.acting(policy):
            pass
        return
    with reference.acting(policy) as model, torch.no_grad():
        found = completion_scores(model.eval(), BATCH).logprobs
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_its_own_model_is_in_evaluation_and_never_trained_and_runs_in_place_of_the_policy(built):
    policy, reference = built
    if (model := reference.own_model) is None:
        return
    assert not any(parameter.requires_grad for parameter in model.parameters())
    own, others = ForwardSpy(model), ForwardSpy(policy)
    reference.logprobs(policy, BATCH)
    assert (len(own), len(others)) == (1, 0)


def test_it_fits_a_policy_of_as_many_ids_and_gives_only_the_first_ones_where_the_policy_has_fewer(built):
    policy, reference = built
    assert reference.check_fits(tiny_tokenizer(), VOCABULARY) == VOCABULARY
    if reference.own_model is not None and not reference.moves:
        assert reference.check_fits(tiny_tokenizer(), VOCABULARY - 7) == VOCABULARY - 7
        distribution = reference.states(policy, BATCH).distribution
        logits = distribution.head.embeddings(distribution.hidden)
        assert logits.shape[-1] == VOCABULARY - 7


def test_sharded_weights_are_read_or_refused_with_the_reason(built):
    _, reference = built
    assert reference.can_shard == (reference.cannot_shard == "")
    if reference.can_shard:
        _require_shardable({"reference": reference})
    else:
        with pytest.raises(
            ConfigError, match=r"teacher \((MovingReference|StallReset)\) under FSDP2: the reference moves by"
        ):
            _require_shardable({"teacher": reference})

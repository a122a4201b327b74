import pytest
import torch

from falign.models import (
    add_lora,
    export_adapter,
    load_adapter,
    load_model,
    load_tokenizer,
    start_from_adapter,
    write_soup,
)
from falign.models.adapter_copies import tensors_of
from falign.models.merging import lora_delta
from falign.references import AdapterOff, Cached, CacheKey, FrozenModel, Soup, check_same_at_start
from falign.references.adapters import adapter_acting
from falign.scoring import completion_scores, pad
from tests.models.tiny import fill_adapter
from tests.scoring.models import TREES

BATCH = pad(TREES, pad_token_id=2)


@pytest.fixture
def two(tiny, tmp_path):
    folders = []
    for i, (rank, targets) in enumerate([(2, ["q_proj", "v_proj"]), (3, "all-linear")]):
        adapted = add_lora(load_model(tiny), r=rank, alpha=5, seed=i, target_modules=targets)
        folders.append(export_adapter(fill_adapter(adapted, seed=i), load_tokenizer(tiny), tmp_path / f"sft{i}"))
    return folders


def test_it_is_the_soup_on_disk_while_the_policy_is_one_of_its_members(tiny, two, tmp_path):
    policy = start_from_adapter(load_model(tiny), two[0]).train()
    soup = Soup.of_adapters(policy, two, weights=[0.3, 0.7])
    with torch.no_grad():
        oracle = load_adapter(load_model(tiny), write_soup(two, tmp_path / "s", weights=[0.3, 0.7]), trainable=False)
        expected = completion_scores(oracle.eval(), BATCH).logprobs
        member = completion_scores(load_adapter(load_model(tiny), two[0], trainable=False).eval(), BATCH).logprobs
        own = completion_scores(policy.eval(), BATCH).logprobs
    torch.testing.assert_close(soup.logprobs(policy, BATCH), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(own, member, rtol=0, atol=0)
    assert (expected - member).abs().max() > 1e-3
    states = soup.states(policy, BATCH).distribution
    logprobs = states.head.logits(states.head.embeddings(states.hidden)).log_softmax(-1)
    assert logprobs.shape[0] == int(BATCH.completion_mask.sum())


def test_with_all_weight_on_the_policys_start_it_is_the_policy(tiny, two):
    policy = start_from_adapter(load_model(tiny), two[0])
    soup = Soup.of_adapters(policy, two, weights=[1.0, 0.0])
    check_same_at_start(policy, soup, BATCH, tolerance=0.0)
    ours, theirs = tensors_of(policy, "default"), tensors_of(policy, "ref")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def test_the_identity_has_the_members_their_shares_and_one_hash_of_all(tiny, two):
    identities = []
    for weights in ([0.3, 0.7], [0.7, 0.3], [0.3, 0.7]):
        policy = start_from_adapter(load_model(tiny), two[0])
        identities.append(Soup.of_adapters(policy, two, weights=weights).identity())
    assert identities[0] == identities[2] != identities[1]
    assert identities[0]["kind"] == "soup"
    assert [member["weight"] for member in identities[0]["members"]] == [0.3, 0.7]
    assert (
        len({identities[0]["weights"], identities[1]["weights"], *(m["sha256"] for m in identities[0]["members"])}) == 4
    )


def test_over_a_4_bit_base_each_layer_adds_the_average_to_its_own_output(tiny, two):
    base = load_model(tiny, quantization="nf4")
    policy = start_from_adapter(base, two[0])
    soup = Soup.of_adapters(policy, two, weights=[0.3, 0.7])
    assert soup.logprobs(policy, BATCH).isfinite().all()
    layer = policy.get_base_model().model.layers[1].self_attn.v_proj
    assert type(layer.base_layer).__name__ == "Linear4bit"
    plain = [load_adapter(load_model(tiny), folder, trainable=False).get_base_model() for folder in two]
    deltas = [lora_delta(model.model.layers[1].self_attn.v_proj, "default") for model in plain]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), adapter_acting(policy, "ref"):
        added = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(added, x @ (0.3 * deltas[0] + 0.7 * deltas[1]).T, rtol=0, atol=1e-4)


def test_only_a_model_of_its_own_is_a_second_one(tiny, two, tmp_path):
    policy, model = start_from_adapter(load_model(tiny), two[0]), load_model(tiny)
    record = {"kind": "checkpoint", "members": []}
    frozen = Soup(FrozenModel(model, weights="w"), record=record)
    assert frozen.own_model is model
    assert frozen.identity()["weights"] == "w"
    key = CacheKey(weights="w", config="c", vocabulary=260, tokenizer="t", dtype="d", attention="a")
    assert Cached(frozen, directory=tmp_path / "cache", key=key).own_model is model
    assert Cached(None, directory=tmp_path / "cache", key=key).own_model is None
    assert Soup.of_adapters(policy, two).own_model is AdapterOff().own_model is None

import pytest
import torch

from falign.errors import ConfigError, ModelError
from falign.models import load_model, weights_hash
from falign.models.adapter_copies import add_average, add_copy, average_into, copy_into, tensors_of
from falign.models.lora_factors import factors_of
from falign.models.structure import lora_layers, saved_modules
from tests.models.tiny import fill_adapter, save_tiny, tiny_model
from tests.scoring.models import with_lora


def policy_of(rank=3, **options):
    model = tiny_model("llama")
    return fill_adapter(with_lora(model, r=rank, lora_alpha=5, lora_dropout=0.4, **options), seed=0)


def retrained(policy, seed):
    """Stand in for optimizer steps: both factors elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    for matrix in tensors_of(policy, "default").values():
        matrix.copy_(0.1 * torch.randn(matrix.shape, generator=generator))


def updates(model, adapter):
    return {name: f.up.double() @ f.down.double() for name, f in factors_of(model, adapter).items()}


def closed_form(start, later, alpha):
    """ΔW_k = (1-α)^k ΔW_0 + Σ_i α (1-α)^(k-i) ΔW_i, in float64."""
    k = len(later)
    return {
        name: (1 - alpha) ** k * start[name]
        + sum(alpha * (1 - alpha) ** (k - i) * each[name] for i, each in enumerate(later, start=1))
        for name in start
    }


@pytest.mark.parametrize("alpha", [0.05, 0.6, 1.0])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"layers.0.self_attn.v_proj": 2}}])
def test_after_k_moves_the_update_is_the_closed_form_with_alpha_the_policys_weight(alpha, options):
    policy = policy_of(**options)
    add_average(policy, rank=21)  # seven adapters of three columns
    start, later = updates(policy, "default"), []
    for seed in range(1, 7):
        retrained(policy, seed)
        later.append(updates(policy, "default"))
        assert average_into(policy, alpha=alpha) < 1e-6
    for name, expected in closed_form(start, later, alpha).items():
        torch.testing.assert_close(updates(policy, "ref")[name], expected, rtol=0, atol=1e-6 * expected.abs().max())


def test_hundreds_of_moves_of_an_adapter_that_changes_in_one_factor_stay_at_the_closed_form():
    policy = policy_of()
    add_average(policy, rank=12)
    start, later = updates(policy, "default"), []
    generator = torch.Generator().manual_seed(9)
    for _ in range(300):
        for layer in lora_layers(policy, "default").values():
            layer.lora_B["default"].weight.data += 0.01 * torch.randn(
                layer.lora_B["default"].weight.shape, generator=generator
            )
        later.append(updates(policy, "default"))
        assert average_into(policy, alpha=0.1) < 1e-6
    for name, expected in closed_form(start, later, 0.1).items():
        torch.testing.assert_close(updates(policy, "ref")[name], expected, rtol=0, atol=1e-6 * expected.abs().max())


def test_what_the_rank_has_no_room_for_is_cut_off_and_measured():
    policy = policy_of()
    add_average(policy, rank=3)
    start = updates(policy, "default")
    retrained(policy, 1)
    exact = closed_form(start, [updates(policy, "default")], 0.5)
    lost = average_into(policy, alpha=0.5)
    error = sum((exact[name] - update).square().sum() for name, update in updates(policy, "ref").items())
    size = sum(each.square().sum() for each in exact.values())
    assert lost == pytest.approx((error / size).sqrt().item(), rel=1e-4)
    assert 0.05 < lost < 0.9


@pytest.mark.parametrize("add", [add_copy, lambda model: add_average(model, rank=9)])
def test_an_added_adapter_computes_what_the_policys_does_and_does_not_train(add):
    policy = policy_of(use_rslora=True).eval()
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    ids = torch.tensor([[4, 100, 7]])
    with torch.no_grad():
        expected = policy(ids).logits
        add(policy)
        torch.testing.assert_close(policy(ids).logits, expected, rtol=0, atol=0)
        assert {name for name, p in policy.named_parameters() if p.requires_grad} == trained
        policy.train()
        policy.set_adapter("ref")
        torch.testing.assert_close(policy(ids).logits, expected, rtol=0, atol=1e-5)  # without dropout too


def test_a_copy_is_set_to_the_policy_bit_for_bit():
    policy = policy_of()
    add_copy(policy)
    assert weights_hash(policy, adapter="ref") == weights_hash(policy, adapter="default")
    retrained(policy, 1)
    assert weights_hash(policy, adapter="ref") != weights_hash(policy, adapter="default")
    copy_into(policy)
    assert weights_hash(policy, adapter="ref") == weights_hash(policy, adapter="default")
    retrained(policy, 2)
    assert weights_hash(policy, adapter="ref") != weights_hash(policy, adapter="default")


def test_an_untrained_adapter_has_an_average_of_nothing():
    policy = with_lora(tiny_model("llama"))
    add_average(policy, rank=4)
    assert average_into(policy, alpha=0.5) == 0.0
    assert not any(update.any() for update in updates(policy, "ref").values())


def test_16_bit_bases_keep_the_followers_in_float32(tmp_path):
    policy = fill_adapter(with_lora(load_model(save_tiny(tmp_path / "half", dtype=torch.bfloat16))))
    add_average(policy, rank=4)
    add_copy(policy, name="copy")
    for adapter in ("ref", "copy"):
        assert {matrix.dtype for matrix in tensors_of(policy, adapter).values()} == {torch.float32}


def test_a_rank_below_the_policys_and_kinds_without_average_are_refused():
    with pytest.raises(ConfigError, match="a rank of 2 has no room for an adapter of rank 3: give at least 3"):
        add_average(policy_of(), rank=2)
    with pytest.raises(ModelError, match="has use_dora, and the average of two DoRA weights"):
        add_average(policy_of(use_dora=True), rank=9)
    with pytest.raises(ModelError, match="it is on an embedding, has a bias"):
        add_copy(policy_of(target_modules=["q_proj", "embed_tokens"]))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_modules_trained_as_a_whole_are_averaged_as_their_weights():
    policy = policy_of(modules_to_save=["model.norm"])
    add_average(policy, rank=12)
    (norm,) = saved_modules(policy, "default").values()
    norm.weight.data += 1.0
    average_into(policy, alpha=0.25)
    (average,) = saved_modules(policy, "ref").values()
    torch.testing.assert_close(average.weight, torch.full((64,), 1.25), rtol=0, atol=1e-6)
    assert not average.weight.requires_grad

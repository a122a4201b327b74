import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from falign.errors import ConfigError, ModelError
from falign.models import export_adapter, load_adapter, load_model, load_tokenizer, weights_hash
from falign.models.adapter_soup import adapter_soup
from falign.models.adapter_tensors import install_adapter, read_adapter
from falign.models.merging import fold_adapter
from falign.models.soup import write_soup
from falign.models.soup_members import soup_members
from tests.models.tiny import TEMPLATE, fill_adapter, save_tiny, swap_tokens
from tests.scoring.models import with_peft

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

IDS = torch.tensor([[7, 100, 30, 5, 222, 9]])

# Ranks, scales, targets and patterns that differ in every way plain LoRA can.
ALL, ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ["q_proj", "v_proj"]
FIRST = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "lora_dropout": 0.3}
SECOND = {"r": 3, "lora_alpha": 8, "target_modules": ALL, "use_rslora": True}
THIRD = {
    **{"r": 2, "lora_alpha": 3, "target_modules": ["v_proj", "lm_head"]},
    **{"rank_pattern": {"layers.0.self_attn.v_proj": 5}, "alpha_pattern": {"layers.1.self_attn.v_proj": 9}},
}


def save_adapter(base, folder, *, seed=1, **options):
    adapted = with_peft(load_model(base), LoraConfig(task_type="CAUSAL_LM", **options))
    fill_adapter(adapted, seed=seed)
    return export_adapter(adapted, load_tokenizer(base), folder)


@pytest.fixture
def three(tiny, tmp_path):
    return [save_adapter(tiny, tmp_path / f"a{i}", seed=i, **o) for i, o in enumerate((FIRST, SECOND, THIRD))]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def averaged_by_merging(base, folders, weights):
    """The oracle: every adapter merged into a base of its own, and those weights averaged in float64."""
    merged = []
    for folder in folders:
        model = load_model(base)
        fold_adapter(model, load_adapter(load_model(base), folder, trainable=False))
        merged.append(model.state_dict())
    target = load_model(base)
    state = {name: sum(w * m[name].double() for w, m in zip(weights, merged, strict=True)) for name in merged[0]}
    target.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return target


def test_adapters_trained_with_other_token_ids_are_refused(three, tmp_path):
    swap_tokens(three[1], "a", "b")
    for members in (three[:2], [three[1], three[2]]):
        with pytest.raises(
            ConfigError, match=r"a\d and .*a\d have different tokens: '[ab]' has the id 68 in the first and 69 in"
        ):
            write_soup(members, tmp_path / "soup")
    (three[1] / "tokenizer_config.json").unlink()  # as PEFT saves an adapter, without the tokenizer of its base
    (three[1] / "tokenizer.json").unlink()
    write_soup(three[:2], tmp_path / "soup")


@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3], [1 / 3] * 3, [0.6, 0.0, 0.4]])
def test_logits_are_those_of_the_averaged_merged_weights(tiny, three, tmp_path, weights):
    soup = load_adapter(load_model(tiny), write_soup(three, tmp_path / "soup", weights=weights), trainable=False)
    difference = logits(soup) - logits(averaged_by_merging(tiny, three, weights))
    assert difference.abs().max() < 1e-5 * logits(soup).abs().max().clamp(min=1)
    assert (logits(soup) - logits(load_model(tiny))).abs().max() > 0.1


def test_the_soup_of_a_transposed_base(tmp_path):
    base = save_tiny(tmp_path / "gpt2", kind="gpt2")
    options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    folders = [save_adapter(base, tmp_path / f"a{r}", seed=r, r=r, **options) for r in (2, 3)]
    soup = load_adapter(load_model(base), write_soup(folders, tmp_path / "soup", weights=[0.3, 0.7]), trainable=False)
    torch.testing.assert_close(
        logits(soup), logits(averaged_by_merging(base, folders, [0.3, 0.7])), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_all_weight_on_one_member_is_that_member_bit_for_bit(three, tmp_path, chosen):
    folder = write_soup(three, tmp_path / "soup", weights=[float(i == chosen) for i in range(3)])
    own, written = (load_file(path / "adapter_model.safetensors") for path in (three[chosen], folder))
    assert own.keys() == written.keys()
    assert all(torch.equal(own[name], written[name]) for name in own)
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (three[chosen], folder)]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]


def test_the_folder_is_complete_and_says_what_is_in_it(three, tmp_path):
    folder = write_soup(three[:2], tmp_path / "soup")
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    record = json.loads((folder / "soup.json").read_text())
    assert record["kind"] == "adapter"
    assert [each["weight"] for each in record["members"]] == [0.5, 0.5]
    assert [each["path"] for each in record["members"]] == [str(path.resolve()) for path in three[:2]]
    assert len({each["sha256"] for each in record["members"]}) == 2
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (7, 7)  # where both are, one beside the other
    assert set(config["rank_pattern"].values()) == {3}  # where the second is alone
    with pytest.raises(ModelError, match="not empty"):
        write_soup(three[:2], folder)
    write_soup(three[1:], folder, overwrite=True)


def test_an_installed_soup_is_frozen_and_leaves_the_policy_as_it_was(tiny, three):
    policy = load_adapter(load_model(tiny), three[0], trainable=True)
    before = [(name, p.requires_grad) for name, p in policy.named_parameters()]
    expected, base_hash = logits(policy), weights_hash(policy)
    install_adapter(policy, adapter_soup(soup_members(three)), name="ref")
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {name for name, grad in before if grad}
    assert policy.active_adapter == "default"
    torch.testing.assert_close(logits(policy), expected, rtol=0, atol=0)
    assert weights_hash(policy) == base_hash
    with pytest.raises(ModelError, match="'ref' already"):
        install_adapter(policy, adapter_soup(soup_members(three)), name="ref")


def test_an_adapter_over_a_16_bit_base_stays_float32(tmp_path, three):
    base = save_tiny(tmp_path / "half", dtype=torch.bfloat16)
    with pytest.warns(
        UserWarning, match=r"a0 was made for .*tiny according to its adapter_config.json, and is loaded over .*half"
    ):
        policy = load_adapter(load_model(base), three[0], trainable=True)
    install_adapter(policy, read_adapter(three[1]), name="ref")
    stored = load_file(three[1] / "adapter_model.safetensors")
    for name, parameter in policy.named_parameters():
        if ".ref." in name:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, stored[name.replace(".ref.", ".")])


def rewrite_config(source, target, **fields):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    if fields:  # as if PEFT had written it: without the record of what falign wrote
        save_file(load_file(target / "adapter_model.safetensors"), target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "changed is DoRA: only plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, r"fully trained modules \(modules_to_save\)"),
        ({"bias": "all"}, "replaces the base's own biases"),
        ({"init_lora_weights": "pissa"}, r"changed/adapter_config.json: .*subtracts the adapter's initial update"),
        ({"target_parameters": ["experts.down_proj"]}, r"\(target_parameters\)"),
        ({"base_model_name_or_path": "another/base"}, r"different bases \(base .*tiny and another/base\)"),
        ({"revision": "v2"}, r"different bases \(base .*tiny and .*tiny at v2\)"),
    ],
)
def test_what_is_not_plain_lora_over_one_base_is_refused(three, tmp_path, fields, message):
    changed = rewrite_config(three[1], tmp_path / "changed", **fields)
    with pytest.raises(ModelError, match=message):
        write_soup([three[0], changed], tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3), (7, 64)])
def test_matrices_that_are_no_pair_are_refused(three, shape):
    file = three[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(name for name in sorted(tensors) if "lora_A" in name)] = torch.zeros(shape)
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"adapter_model.safetensors (is damaged|do not belong together)"):
        read_adapter(three[0])


def test_adapters_of_another_shape_are_refused_with_the_first_layer(tiny, three, tmp_path):
    model = load_model(tiny)
    model.config.hidden_size = 32
    other = type(model)(copy.deepcopy(model.config))
    other.save_pretrained(tmp_path / "narrow")
    load_tokenizer(tiny).save_pretrained(tmp_path / "narrow")
    narrow = save_adapter(tmp_path / "narrow", tmp_path / "n", **FIRST)
    fitting = rewrite_config(narrow, tmp_path / "f", base_model_name_or_path=str(tiny))
    with pytest.raises(ModelError, match=r"layers.0.self_attn.q_proj is \(64, 64\) in .*a0 and \(64, 32\) in .*f"):
        write_soup([three[0], fitting], tmp_path / "soup")
    policy = load_adapter(load_model(tmp_path / "narrow"), narrow, trainable=True)
    with pytest.raises(ModelError, match=r"q_proj is \(64, 32\) in this model and \(64, 64\) in the adapter"):
        install_adapter(policy, read_adapter(three[0]), name="ref")


def test_one_base_that_was_moved_is_one_base_and_other_weights_are_not(tiny, three, tmp_path):
    moved = shutil.copytree(tiny, tmp_path / "moved")
    other = save_adapter(moved, tmp_path / "b", **SECOND)
    adapter_soup(soup_members([three[0], other]))
    changed = save_tiny(tmp_path / "changed", seed=1)
    with pytest.raises(ModelError, match=r"different bases \(base weights [0-9a-f]{64} and [0-9a-f]{64}\)"):
        adapter_soup(soup_members([three[0], save_adapter(changed, tmp_path / "c", **SECOND)]))
    # One base in two types has two hashes, so that its name has to do.
    quantized = with_peft(load_model(tiny, quantization="nf4"), LoraConfig(task_type="CAUSAL_LM", **SECOND))
    adapter_soup(soup_members([three[0], export_adapter(quantized, load_tokenizer(tiny), tmp_path / "d")]))


def test_a_run_that_has_not_ended_has_no_adapter(three, tmp_path):
    (tmp_path / "begun").mkdir()
    for name in ("run.yaml", "manifest.json"):
        (tmp_path / "begun" / name).write_text("{}")
    with pytest.raises(ModelError, match="is a run without a trained model yet"):
        soup_members([three[0], tmp_path / "begun"])


def test_weights_that_are_no_shares_are_refused(three):
    for weights, message in (
        ([0.5, 0.6], r"sum to 1.1"),
        ([1.5, -0.5], "-0.5 is not"),
        ([0.5, 0.25, 0.25], "3 weights for 2 members"),
        ([float("nan"), 1.0], "nan is not"),
    ):
        with pytest.raises(ConfigError, match=message):
            soup_members(three[:2], weights)
    with pytest.raises(ConfigError, match="a soup of 1"):
        soup_members(three[:1])
    with pytest.raises(ConfigError, match="a soup of 0"):
        soup_members([])
    soup_members(three[:2], [0.5 + 5e-7, 0.5])


def test_a_soup_of_an_adapter_and_a_checkpoint_is_refused(tiny, three):
    with pytest.raises(ModelError, match=r"of kind adapter and .*tiny of kind checkpoint.*merge the adapters"):
        soup_members([three[0], tiny])


def test_a_type_for_adapters_is_refused(three, tmp_path):
    with pytest.raises(ConfigError, match="float32 so that it is exact"):
        write_soup(three[:2], tmp_path / "soup", dtype="bfloat16")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_embeddings_beside_an_adapter_are_refused_with_two_ways_that_work(tiny, tmp_path):
    members = [tmp_path / "a0", tmp_path / "a1"]
    for seed, member in enumerate(members):
        adapted = with_peft(load_model(tiny), LoraConfig(task_type="CAUSAL_LM", **THIRD))
        fill_adapter(adapted, seed=seed).save_pretrained(member)
    with pytest.raises(ModelError, match=r"a0 has .*lm_head.base_layer.weight of its base .*save_embedding_layers=Fal"):
        write_soup(members, tmp_path / "soup")
    again, merged = tmp_path / "again", tmp_path / "merged"
    for member in members:
        adapted = PeftModel.from_pretrained(load_model(tiny), member)
        adapted.save_pretrained(again / member.name, save_embedding_layers=False)
        adapted.merge_and_unload().save_pretrained(merged / member.name)
        load_tokenizer(tiny).save_pretrained(merged / member.name)
    soups = [write_soup([way / "a0", way / "a1"], way / "soup") for way in (again, merged)]
    one, other = load_adapter(load_model(tiny), soups[0], trainable=False), load_model(soups[1])
    torch.testing.assert_close(logits(one), logits(other), rtol=0, atol=1e-5)

import json

import pytest
import torch

from falign.errors import ModelError
from falign.models import add_lora, config_hash, describe, load_adapter, load_model, weights_hash
from falign.models.structure import adapter_matrix, lora_layers
from tests.models.tiny import fill_adapter, save_tiny


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_equal_content_has_one_hash_with_and_without_adapters(tmp_path, kind, quantization):
    folder = save_tiny(tmp_path / "m", kind)
    first = load_model(folder, quantization=quantization)
    expected = weights_hash(first)
    assert len(expected) == 64
    model = fill_adapter(add_lora(load_model(folder, quantization=quantization), r=4, alpha=8, seed=1))
    assert weights_hash(model) == expected
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert weights_hash(model.eval()) == expected


def test_each_part_of_the_content_counts(tmp_path):
    folder = save_tiny(tmp_path / "m")
    model = load_model(folder)
    hashes = [
        weights_hash(model),
        weights_hash(load_model(folder, dtype="bfloat16")),
        weights_hash(load_model(folder, quantization="nf4")),
        weights_hash(load_model(save_tiny(tmp_path / "n", seed=1))),
    ]
    model.get_parameter("model.norm.weight").data[63] += 1e-6
    hashes.append(weights_hash(model))
    assert len(set(hashes)) == 5


def test_four_bit_codes_and_scales_count_but_not_their_storage_type(tiny):
    model = load_model(tiny, quantization="nf4")
    expected = weights_hash(model)
    weight = model.get_submodule("model.layers.1.mlp.up_proj").weight
    data = weight.data
    weight.data = data.view(torch.uint8)
    assert weights_hash(model) == expected
    weight.data = data
    weight.quant_state.state2.absmax[0] *= 1.01
    assert weights_hash(model) != expected


def test_repacked_four_bit_weights_are_refused(tiny):
    model = load_model(tiny, quantization="nf4")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight was repacked for inference"):
        weights_hash(model)


def test_an_adapter_has_its_own_hash_whatever_its_name_and_base_type(tiny, tmp_path):
    model = fill_adapter(add_lora(load_model(tiny), r=4, alpha=8, seed=1))
    expected = weights_hash(model, adapter="default")
    model.save_pretrained(tmp_path / "adapter")
    other = add_lora(load_model(tiny, dtype="bfloat16"), r=2, alpha=8, seed=7)
    other = load_adapter(other, tmp_path / "adapter", trainable=False, name="ref")
    assert weights_hash(other, adapter="ref") == expected
    assert weights_hash(other, adapter="default") != expected
    up = adapter_matrix(lora_layers(other, "ref")["model.layers.0.mlp.up_proj"].lora_B, "ref")
    up.data[0, 0] += 1e-3
    assert weights_hash(other, adapter="ref") != expected


def test_the_scale_of_an_adapter_counts(tiny):
    hashes = {
        weights_hash(add_lora(load_model(tiny), r=4, alpha=alpha, seed=1), adapter="default") for alpha in (8, 16)
    }
    assert len(hashes) == 2


def test_an_unknown_adapter_lists_the_known_ones(tiny):
    with pytest.raises(ModelError, match=r"no adapter named 'ref'; it has \['default'\]"):
        weights_hash(add_lora(load_model(tiny), r=4, alpha=8, seed=1), adapter="ref")
    with pytest.raises(ModelError, match=r"no adapter named 'default'; it has \[\]"):
        weights_hash(load_model(tiny), adapter="default")


@pytest.fixture(scope="module")
def hash_with(tmp_path_factory):
    """Return the hash of a model's configuration after some fields of its config.json have changed."""
    folder = save_tiny(tmp_path_factory.mktemp("config") / "m")
    written = json.loads((folder / "config.json").read_text())

    def hash_with(removed=(), **changes):
        content = {key: value for key, value in (written | changes).items() if key not in removed}
        (folder / "config.json").write_text(json.dumps(content))
        return config_hash(load_model(folder))

    return hash_with


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}},
        {"rope_theta": 20000.0, "rope_parameters": None},
        {"rms_norm_eps": 1e-4},
        {"hidden_act": "gelu"},
        {"attention_dropout": 0.1},
        {"pretraining_tp": 2},
        {"pad_token_id": 2},
        {"a_field_of_tomorrow": 3},
    ],
)
def test_each_field_that_may_change_logits_counts(hash_with, changes):
    assert hash_with(**changes) != hash_with()


def test_names_versions_types_caching_and_stop_ids_do_not_count(hash_with):
    assert hash_with(removed=["rms_norm_eps", "pretraining_tp"]) == hash_with()  # defaults
    assert (
        hash_with(
            _name_or_path="elsewhere",
            transformers_version="4.40.0",
            architectures=["Llama"],
            use_cache=False,
            dtype="bfloat16",
            eos_token_id=[1, 3],
            bos_token_id=2,
        )
        == hash_with()
    )


def test_a_configuration_has_one_hash_with_and_without_adapters_and_in_another_folder(tmp_path):
    first = load_model(save_tiny(tmp_path / "m"))
    expected = config_hash(first)
    second = add_lora(load_model(save_tiny(tmp_path / "n"), attn_implementation="eager"), r=4, alpha=8, seed=1)
    assert config_hash(second) == expected
    quantized = config_hash(load_model(tmp_path / "m", quantization="nf4"))
    assert quantized != expected  # its arithmetic is that of 4-bit layers
    assert len(expected) == 64


EMBEDDINGS = 2 * 260 * 64
NORMS = 5 * 64
LINEAR = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)


def test_a_full_model_is_all_trainable(tiny):
    description = describe(load_model(tiny))
    total = EMBEDDINGS + NORMS + LINEAR
    assert (description.total_parameters, description.trainable_parameters) == (total, total)
    assert description.parameters_by_dtype == {"float32": total}
    assert description.memory_bytes == 4 * total
    assert (description.quantization, description.adapters, description.adapter_parameters) == (None, (), 0)
    assert (description.architecture, description.name_or_path) == ("LlamaForCausalLM", str(tiny))


def test_four_bit_weights_count_one_by_one(tmp_path):
    base = load_model(save_tiny(tmp_path / "m", dtype=torch.bfloat16), quantization="nf4")
    description = describe(add_lora(base, r=3, alpha=6, seed=0, target_modules=["q_proj", "down_proj"]))
    adapter = 2 * 3 * (64 + 64 + 128 + 64)
    assert description.parameters_by_dtype == {
        "bfloat16": EMBEDDINGS + NORMS,
        "nf4": LINEAR,
        "float32": adapter,
    }
    assert description.trainable_parameters == description.adapter_parameters == adapter
    assert description.trainable_dtypes == ("float32",)
    assert description.memory_bytes == 2 * (EMBEDDINGS + NORMS) + LINEAR // 2 + 4 * adapter
    assert (description.quantization, description.adapters) == ("nf4", ("default",))

import torch

from falign.models import add_lora, describe, load_model
from tests.models.tiny import save_tiny

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

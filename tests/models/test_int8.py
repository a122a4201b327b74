"""8-bit bases of bitsandbytes: loaded, identified, trained with an adapter, merged and exported, on a CPU."""

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import falign
from falign.errors import ConfigError, ModelError
from falign.models import add_lora, describe, export_adapter, export_merged, load_model, load_tokenizer, weights_hash
from falign.models.base_weights import check_quantized_from
from falign.models.int8 import Int8Linear
from falign.runfile import parse_run
from falign.training import train
from falign.training.trainer import AlignmentTrainer
from tests.models.tiny import fill_adapter, save_tiny
from tests.training.pairs import run_data, write_pairs

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

IDS = torch.arange(4, 40).reshape(2, 18)


def rounded(model):
    """A model with the weights of its linear layers rounded to 8 bits, one scale per row: the oracle."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            scale = module.weight.abs().amax(dim=1, keepdim=True).double()
            module.weight.data = ((module.weight / scale * 127).double().round() * scale / 127).float()
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_an_8_bit_model_computes_with_its_rounded_weights_whatever_is_beside_a_row(tmp_path, kind):
    folder = save_tiny(tmp_path / "tiny", kind)
    model, oracle = load_model(folder, quantization="int8"), rounded(load_model(folder))
    assert describe(model).quantization == "int8"
    assert any(isinstance(each, Int8Linear) for each in model.modules())
    logits = model(IDS).logits
    if kind != "gpt2":  # whose layers are transposed
        # bitsandbytes reads the weights in float16 before it rounds them, which moves a few by one step.
        assert float((logits - oracle(IDS).logits).abs().max()) < 0.03 * float(logits.abs().max())
    assert torch.allclose(model(IDS[:1]).logits, logits[:1], atol=1e-5)
    assert torch.equal(model(IDS).logits, logits)


def test_the_gradient_is_that_of_the_rounded_weights(tmp_path):
    layer = next(
        each for each in load_model(save_tiny(tmp_path / "t"), quantization="int8").modules() if _is_int8(each)
    )
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    weight = layer.weight.data.float() * layer.weight.SCB[:, None] / 127
    out = layer(x)
    assert torch.allclose(out, x @ weight.T, atol=1e-5)
    given = torch.randn_like(out)
    out.backward(given)
    assert torch.allclose(x.grad, given @ weight, atol=1e-5)


def _is_int8(module):
    return isinstance(module, Int8Linear)


def test_the_identity_covers_weights_and_scales_and_no_forward_pass_changes_it(tmp_path):
    model = load_model(save_tiny(tmp_path / "tiny"), quantization="int8")
    before = weights_hash(model)
    model(IDS)
    assert weights_hash(model) == weights_hash(load_model(tmp_path / "tiny", quantization="int8")) == before
    layer = next(filter(_is_int8, model.modules()))
    layer.weight.SCB[0] *= 1.01
    assert weights_hash(model) != before
    layer.weight.SCB[0] /= 1.01
    layer.weight.data[0, 0] += 1
    assert weights_hash(model) != before


def test_a_checkpoint_stored_in_8_bits_is_loaded_as_it_is_and_merged_into_its_original(tmp_path):
    folder = save_tiny(tmp_path / "tiny")
    config = BitsAndBytesConfig(load_in_8bit=True)
    stored = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
    stored.save_pretrained(tmp_path / "stored")
    load_tokenizer(folder).save_pretrained(tmp_path / "stored")
    model, quantized = load_model(tmp_path / "stored"), load_model(folder, quantization="int8")
    assert torch.equal(model(IDS).logits, quantized(IDS).logits)
    with pytest.raises(ConfigError, match="is stored as int8 already"):
        load_model(tmp_path / "stored", quantization="nf4")
    check_quantized_from(load_model(folder), model)
    with pytest.raises(ModelError, match=r"is not the model .*, where 8 bits explain 5%"):
        check_quantized_from(load_model(save_tiny(tmp_path / "other", seed=1)), model)
    adapted, tokenizer = fill_adapter(add_lora(model, r=4, alpha=8, seed=0)), load_tokenizer(folder)
    with pytest.raises(ModelError, match=r"is stored quantized \(int8\).*give the 16-bit model"):
        export_merged(adapted, tokenizer, tmp_path / "merged")
    export_merged(adapted, tokenizer, tmp_path / "merged", base_name_or_path=folder)
    export_adapter(adapted, tokenizer, tmp_path / "adapter")


def test_a_run_over_8_bits_starts_at_its_reference_resumes_and_exports_with_proof(tmp_path, monkeypatch):
    folder, data = save_tiny(tmp_path / "tiny"), write_pairs(tmp_path / "pairs.jsonl")

    def start(name, resume=False, **changes):
        model = {"quantization": "int8"}
        training = {"save_steps": 2, "max_steps": 4}
        config = parse_run(run_data(folder, data, tmp_path / name, model=model, training=training, **changes))
        return train(config, console=Console(quiet=True), resume=resume)

    whole = start("whole")
    manifest = whole.folder.read_json("manifest.json")
    assert manifest["reference"]["kind"] == "adapter_off"
    assert manifest["model"]["quantization"] == "int8"
    assert manifest["layout"] == "tree"
    assert whole.before["rewards/margins"] == 0
    assert whole.after["loss"] < whole.before["loss"]
    original = AlignmentTrainer.compute_loss

    def dies(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AlignmentTrainer, "compute_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            start("broken")
    assert start("broken", resume=True).after == whole.after
    run = falign.load(whole.folder.path)
    merged, adapter = run.export("merged"), run.export("adapter")
    assert merged.four_bit_base
    assert adapter.proof.max_abs_export_error < 1e-4
    assert merged.proof.max_abs_export_error < 1e-4
    with pytest.raises(ConfigError, match=r"quantization=int8 with adapter=null: quantized weights do not train"):
        start("full", adapter=None)

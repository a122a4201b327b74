import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from falign.errors import ModelError
from falign.models import (
    add_lora,
    export_adapter,
    export_merged,
    load_model,
    load_tokenizer,
    probe_ids,
    verify_export,
)
from tests.models.tiny import fill_adapter, save_tiny

PROBE = [[0, 20, 33, 7, 100, 41], [5, 6, 7]]


@pytest.fixture
def case(tmp_path):
    def build(kind="llama", stored=torch.float32, scale=0.1, **options):
        folder = save_tiny(tmp_path / "m", kind, dtype=stored)
        model = fill_adapter(add_lora(load_model(folder, **options), r=4, alpha=8, seed=1), scale=scale)
        return model, load_tokenizer(folder), tmp_path / "out"

    return build


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_export_is_exact(case, kind, quantization, dtype):
    model, tokenizer, out = case(kind, quantization=quantization, dtype=dtype)
    export_adapter(model, tokenizer, out)
    proof = verify_export(model.train(), out, tokenizer=tokenizer, kind="adapter", probe=PROBE)
    assert model.training
    assert (proof.kind, proof.dtype, proof.compared_tokens, proof.bound) == ("adapter", dtype, 9, 1e-5)
    assert proof.max_abs_logit_difference == proof.max_abs_export_error == 0
    assert proof.max_abs_change_against_base > 0.1


@pytest.mark.parametrize("written", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_merge_is_as_near_as_its_type_allows(case, written, quantization):
    model, tokenizer, out = case(quantization=quantization)
    export_merged(model, tokenizer, out, dtype=written)
    proof = verify_export(model, out, tokenizer=tokenizer, kind="merged", probe=PROBE)
    assert (proof.dtype, proof.bound) == (written, {"float32": 1e-4, "bfloat16": 0.125, "float16": 0.02}[written])
    assert 0 < proof.max_abs_export_error <= proof.bound * proof.max_abs_logit
    assert proof.max_abs_change_against_base > 0.1
    if quantization == "nf4":  # the quantization error is reported, and not taken for an export error
        assert proof.max_abs_logit_difference > 3 * proof.max_abs_export_error


def test_full_fine_tuning_is_compared_directly(tiny, tmp_path):
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data += 0.05
    export_merged(model, tokenizer, tmp_path / "out")
    proof = verify_export(model, tmp_path / "out", tokenizer=tokenizer, kind="merged", probe=PROBE)
    assert proof.max_abs_export_error == proof.max_abs_logit_difference == 0
    assert proof.max_abs_change_against_base > 0


def test_the_default_probe_is_real_text(case):
    model, tokenizer, out = case()
    export_adapter(model, tokenizer, out)
    proof = verify_export(model, out, tokenizer=tokenizer, kind="adapter")
    assert proof.compared_tokens == sum(len(row) for row in probe_ids(tokenizer)) > 300  # bytes


def test_an_untrained_adapter_is_refused(case):
    model, tokenizer, out = case(scale=0.0)
    export_adapter(model, tokenizer, out)
    with pytest.raises(ModelError, match="same logits as its base: all B matrices of adapter 'default' are zero"):
        verify_export(model, out, tokenizer=tokenizer, kind="adapter", probe=PROBE)


def test_a_merge_that_is_the_base_is_refused(case, tmp_path):
    model, tokenizer, _ = case()
    with pytest.raises(ModelError, match="same logits as its base: the export lost the training"):
        verify_export(model, tmp_path / "m", tokenizer=tokenizer, kind="merged", probe=PROBE)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_other_weights_than_the_trained_ones_are_refused(case, kind):
    model, tokenizer, out = case()
    (export_adapter if kind == "adapter" else export_merged)(model, tokenizer, out)
    fill_adapter(model, seed=6)
    with pytest.raises(ModelError, match=r"is not the trained model: its logits differ by up to \d"):
        verify_export(model, out, tokenizer=tokenizer, kind=kind, probe=PROBE)


@pytest.mark.parametrize("weight", ["model.embed_tokens.weight", "lm_head.weight"])
def test_one_row_of_a_token_that_the_probe_lacks_is_seen(case, weight):
    model, tokenizer, out = case()
    export_merged(model, tokenizer, out)
    tensors = load_file(out / "model.safetensors")
    tensors[weight][200] += 1.0
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"is not the trained model: (its logits differ|the embedding of token 200)"):
        verify_export(model, out, tokenizer=tokenizer, kind="merged", probe=PROBE)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_one_row_of_an_adapter_on_the_head_is_seen(tmp_path, kind):
    folder = save_tiny(tmp_path / "m")
    model = fill_adapter(add_lora(load_model(folder), r=2, alpha=4, seed=1, target_modules=["q_proj", "lm_head"]))
    tokenizer, out = load_tokenizer(folder), tmp_path / "out"
    (export_adapter if kind == "adapter" else export_merged)(model, tokenizer, out)
    model.get_base_model().lm_head.lora_B["default"].weight.data[200] += 1.0  # what the export should have had
    with pytest.raises(ModelError, match=r"is not the trained model: its logits differ"):
        verify_export(model, out, tokenizer=tokenizer, kind=kind, probe=PROBE)


def test_a_bound_of_ones_own_is_used(case):
    model, tokenizer, out = case()
    export_merged(model, tokenizer, out)
    with pytest.raises(ModelError, match="rounding to float32 explains at most 1e-12"):
        verify_export(model, out, tokenizer=tokenizer, kind="merged", probe=PROBE, bound=1e-12)


def test_another_chat_template_or_vocabulary_is_refused(case):
    model, tokenizer, out = case()
    export_adapter(model, tokenizer, out)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match="its tokenizer differs from that of the training"):
        verify_export(model, out, tokenizer=tokenizer, kind="adapter", probe=PROBE)
    (out / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ModelError, match="its chat template differs from that of the training"):
        verify_export(model, out, tokenizer=tokenizer, kind="adapter", probe=PROBE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: {}, "its adapter has no weights"),
        (
            lambda weights: {**weights, "lm_head.weight": torch.ones(1)},
            "lm_head.weight is not a weight of the trained adapter",
        ),
        (lambda weights: {name: torch.empty(0) for name in weights}, r"of shape \(0,\) is empty, NaN or infinite"),
        (lambda weights: {name: value * torch.nan for name, value in weights.items()}, "is empty, NaN or infinite"),
    ],
)
def test_broken_adapter_weights_are_refused(case, change, message):
    model, tokenizer, out = case()
    export_adapter(model, tokenizer, out)
    path = out / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(ModelError, match=message):
        verify_export(model, out, tokenizer=tokenizer, kind="adapter", probe=PROBE)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_demonstration_model_goes_through_4_bit_training_and_both_exports(demo, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(demo)
    model = add_lora(load_model(demo, quantization="nf4", dtype="bfloat16"), r=8, alpha=16, seed=1).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    probe = probe_ids(tokenizer)[1:3]
    row = torch.tensor([probe[0]])
    losses = []
    for _ in range(3):
        loss = model(input_ids=row, labels=row, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3

    export_adapter(model, tokenizer, tmp_path / "adapter")
    proof = verify_export(model, tmp_path / "adapter", tokenizer=tokenizer, kind="adapter", probe=probe)
    assert proof.max_abs_logit_difference == 0
    assert proof.max_abs_change_against_base > 1

    export_merged(model, tokenizer, tmp_path / "merged", dtype="bfloat16")
    proof = verify_export(model, tmp_path / "merged", tokenizer=tokenizer, kind="merged", probe=probe)
    assert proof.max_abs_export_error < 0.06 * proof.max_abs_logit
    assert proof.max_abs_change_against_base > 1

    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        difference = (plain(input_ids=row).logits - merged(input_ids=row).logits).abs().max()
    assert difference < 0.06 * proof.max_abs_logit


def test_a_merge_into_another_base_is_refused(tiny, tmp_path):
    model = fill_adapter(add_lora(load_model(tiny), r=4, alpha=8, seed=0))
    tokenizer = load_tokenizer(tiny)
    save_tiny(tiny, seed=9)  # what lies on disk is no longer the trained model
    target = export_merged(model, tokenizer, tmp_path / "merged")
    with pytest.raises(ModelError, match="is not the trained model"):
        verify_export(model, target, tokenizer=tokenizer, kind="merged")

"""Kinds of adapters under every kind of reference: the start is the reference, and what is trained is exported."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from falign.errors import ConfigError, ModelError
from falign.models import add_lora, export_adapter
from falign.runfile import parse_run
from falign.runfile.policy_config import ModelConfig
from falign.runs import RunFolder
from falign.runs.export import export
from falign.runs.loading import load_trained
from falign.training import train
from tests.models.tiny import VOCABULARY, fill_adapter, save_tiny
from tests.training.pairs import run_data, write_pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

IDS = torch.tensor([[0, 40, 60, 61, 70, 80, 5, 7]])
NEW_IDS = torch.tensor([[0, 260, 60, 261, 70]])  # Qwen's tokenizer has 261 for the first of them
ALL = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
KINDS = {
    "DoRA": (
        "llama",
        {**ALL, "use_dora": True, "use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 3}},
        {},
    ),
    "modules_to_save": ("llama", {**ALL, "modules_to_save": ["lm_head", "model.norm"]}, {}),
    "experts": ("qwen3_moe", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}, {}),
    "PiSSA": ("llama", {**ALL, "init_lora_weights": "pissa", "alpha_pattern": {"down_proj": 2.0}}, {}),
    "OLoRA": ("llama", {**ALL, "init_lora_weights": "olora", "use_rslora": True}, {}),
    "new tokens": ("llama", ALL, {"new_tokens": ["<plan>", "</plan>"]}),
    "new tied tokens": ("qwen2", ALL, {"new_tokens": ["<plan>", "</plan>"]}),
}
REFERENCES = {
    "adapter_off": {"kind": "adapter_off"},
    "moving_average": {"kind": "moving_average", "alpha": 0.5, "every": 1, "rank": 24},
    "periodic_reset": {"kind": "periodic_reset", "every": 2},
    "adapter": {"kind": "adapter", "path": "sft0"},
    "soup": {"kind": "soup", "paths": ["sft0", "sft1"]},
}
REFUSED = {
    ("DoRA", "moving_average"): "has use_dora",
    ("experts", "moving_average"): "has target_parameters",
    ("new tokens", "soup"): "has trained tokens",
    ("new tied tokens", "soup"): "has trained tokens",
}


@torch.no_grad()
def logits(model):
    model.eval()
    rows = [IDS, NEW_IDS] if model.config.vocab_size > VOCABULARY else [IDS]
    return torch.cat([model(input_ids=row, use_cache=False).logits[0].float() for row in rows])


class World:
    """The bases and the reference adapters, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rows = [json.loads(line) for line in write_pairs(root / "pairs.jsonl", n=12).read_text().splitlines()]
        self.data = root / "plans.jsonl"
        plans = [json.dumps({**row, "chosen": f"<plan>a</plan>{row['chosen']}"}) + "\n" for row in rows]
        self.data.write_text("".join(plans))

    def base(self, kind):
        folder = self.root / kind
        return folder if folder.is_dir() else save_tiny(folder, kind)

    def sft(self, base, name, model):
        folder = self.root / f"{base}-{name}{'-grown' * bool(model)}"
        if not folder.is_dir():
            seed = int(name[-1])
            targets = ["q_proj", "v_proj"]
            section = ModelConfig(path=str(self.base(base)), **model)
            tokens = section.new_token_ids()
            adapted = add_lora(section.build(), r=2, alpha=4, seed=seed, target_modules=targets, token_ids=tokens)
            export_adapter(fill_adapter(adapted, seed=seed, scale=0.05), section.build_tokenizer(), folder)
        return str(folder)

    def config(self, run, kind, reference, adapter=None, **changes):
        base, own, model = KINDS[kind]
        adapter = own if adapter is None else adapter
        values = run_data(self.base(base), self.data, run, **changes)
        values["model"] |= model
        values["adapter"] = {"r": 2, "alpha": 4, **adapter} if "init" not in adapter else adapter
        reference = dict(reference)
        if "path" in reference:
            reference["path"] = self.sft(base, reference["path"], model)
        if "paths" in reference:
            reference["paths"] = [self.sft(base, name, model) for name in reference["paths"]]
        values["reference"] = reference
        values["data"] |= {"eval_size": 2}
        values["training"] |= {"max_steps": 3, "save_steps": 2, "learning_rate": 0.02}
        values["sampling"] = {"prompts": []}
        return parse_run(values)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("kinds"))


def run(config):
    console = Console(file=io.StringIO(), width=300)
    train(config, console=console)
    return RunFolder.open(config.output_dir)


def resume_again(config, folder):
    """Repeat the steps after the checkpoint, and return the adapter's weights of both times."""
    first = load_file(folder.adapter / "adapter_model.safetensors")
    shutil.rmtree(folder.adapter)
    (folder.path / "summary.json").unlink()
    if (folder.path / "checkpoint-3").is_dir():
        shutil.rmtree(folder.path / "checkpoint-3")
    train(config, console=Console(quiet=True), resume=True)
    return first, load_file(folder.adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains_under_each_reference_or_is_refused_by_name(world, kind, reference, tmp_path):
    config = world.config(tmp_path / "run", kind, REFERENCES[reference])
    if reason := REFUSED.get((kind, reference)):
        with pytest.raises(ModelError, match=reason):
            run(config)
        assert not (tmp_path / "run").exists()
        return
    folder = run(config)
    metrics = [each for each in folder.metrics() if "loss" in each]
    if reference == "adapter_off":  # log 2 where policy and reference are the same model
        assert metrics[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    first, again = resume_again(config, folder)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_exported(world, kind, quantization, tmp_path):
    config = world.config(
        tmp_path / "run",
        kind,
        {"kind": "adapter_off"},
        model={"quantization": quantization},
        training={"gradient_checkpointing": True},
    )
    folder = run(config)
    trained = logits(load_trained(folder).model)
    proof = export(str(folder.path), "adapter", out=tmp_path / "adapter").proof
    assert proof.max_abs_logit_difference <= 1e-5 * proof.max_abs_logit
    assert proof.max_abs_change_against_base > 1e-2
    export(str(folder.path), "merged", out=tmp_path / "merged")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    if quantization is None:
        torch.testing.assert_close(merged, trained, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_trains_moves_over_a_16_bit_base(world, kind, tmp_path):
    config = world.config(tmp_path / "run", kind, {"kind": "adapter_off"}, model={"dtype": "bfloat16"})
    model = config.adapter.build(config.model.build(), seed=1, token_ids=config.model.new_token_ids())
    start = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    assert {each.dtype for each in start.values()} == {torch.float32}
    # A rate of which bfloat16 would lose each step: 1e-4 of values near 1.
    settings = {"learning_rate": 1e-4, "max_steps": 3, "save_steps": 3}
    run(config.model_copy(update={"training": config.training.model_copy(update=settings)}))
    saved = load_file(tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors")
    after = {name.removesuffix(".weight"): tensor for name, tensor in saved.items()}
    for name, before in start.items():
        plain = name.replace(".default", "").replace(".modules_to_save", "").removesuffix(".weight")
        assert not torch.equal(before, after.pop(plain)), name
    assert not after


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_continues_from_each_kind(world, kind, tmp_path):
    first = run(world.config(tmp_path / "first", kind, {"kind": "adapter_off"}))
    config = world.config(tmp_path / "second", kind, {"kind": "auto"}, {"init": str(first.path)})
    second = run(config)
    metrics = [each for each in second.metrics() if "loss" in each]
    assert metrics[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert export(str(second.path), "merged", out=tmp_path / "merged").proof.max_abs_change_against_base > 1e-2


def test_weight_decay_is_refused_with_factors_of_the_weights(world, tmp_path):
    config = world.config(tmp_path / "run", "PiSSA", {"kind": "adapter_off"}, training={"weight_decay": 0.1})
    with pytest.raises(ConfigError, match=r"training.weight_decay=0.1 with adapter.init_lora_weights=pissa"):
        run(config)

"""The run folder itself is what other libraries load: an adapter, or whole weights."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import falign
from falign.errors import ConfigError
from falign.models import load_model
from falign.runfile import parse_run
from falign.runs import RunFolder
from falign.training import train
from tests.models.tiny import save_tiny
from tests.training.pairs import run_data, write_pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    # PEFT 0.21 reads an attribute that Transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
IDS = torch.tensor([[68, 70, 90, 12, 33]])


def trained(folder, name, **changes):
    tiny, data = folder / "tiny", folder / "pairs.jsonl"
    if not tiny.exists():
        save_tiny(tiny)
        write_pairs(data)
    values = run_data(tiny, data, folder / name, training={"max_steps": 2}, **changes)
    train(parse_run(values), console=Console(quiet=True))
    return folder / name


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def test_peft_loads_the_folder_of_a_run_without_a_second_copy(tmp_path):
    run = trained(tmp_path, "run")
    expected = logits(falign.load(run).policy)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    before = logits(base).clone()
    assert (before - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, run)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(run)), expected, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(run)("ab").input_ids == [68, 69]
    for file in (run / "adapter").iterdir():
        assert os.path.samefile(file, run / file.name)
    with pytest.raises(ConfigError, match=r"out=.*other is a run: choose another folder"):
        falign.export(run, "adapter", out=trained(tmp_path, "other"), overwrite=True)


def test_transformers_loads_the_folder_of_a_run_that_trained_all_weights(tmp_path):
    run = trained(tmp_path, "run", adapter=None, reference={"kind": "frozen"})
    expected = logits(falign.load(run).policy)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(run)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(load_model(run, device="cpu")), expected, rtol=0, atol=1e-5)


def test_a_disk_without_hard_links_gets_copies_and_a_run_that_goes_on_shows_no_old_model(tmp_path, monkeypatch):
    source = tmp_path / "adapter"
    source.mkdir(parents=True)
    (source / "adapter_config.json").write_text("{}")
    folder = RunFolder(tmp_path)

    def no_links(self, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    for _ in range(2):
        folder.show_model(source)
    assert (tmp_path / "adapter_config.json").read_text() == "{}"
    assert not os.path.samefile(source / "adapter_config.json", tmp_path / "adapter_config.json")
    (tmp_path / "metrics.jsonl").write_text("")
    folder.reopen()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "metrics.jsonl"]
    shutil.rmtree(source)
    folder.hide_model()

import json

import pytest
import torch
from peft import LoraConfig
from torch import nn

from falign.errors import ModelError
from falign.models import add_lora, export_adapter, load_adapter, load_model, load_tokenizer, start_from_adapter
from falign.models.structure import lora_layers
from tests.models.tiny import fill_adapter
from tests.scoring.models import with_peft

IDS = torch.tensor([[7, 100, 30, 5]])


@pytest.fixture
def sft(tiny, tmp_path):
    adapted = add_lora(load_model(tiny), r=3, alpha=7, seed=0, dropout=0.4, target_modules=["q_proj"], rslora=True)
    return export_adapter(fill_adapter(adapted), load_tokenizer(tiny), tmp_path / "sft")


def test_the_policy_starts_as_the_adapter_and_trains_with_its_rank_scale_and_targets(tiny, sft):
    policy = start_from_adapter(load_model(tiny), sft, dropout=0.25)
    with torch.no_grad():
        expected = load_adapter(load_model(tiny), sft, trainable=False)(IDS).logits
        torch.testing.assert_close(policy.eval()(IDS).logits, expected, rtol=0, atol=0)
    config = policy.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, set(config.target_modules)) == (3, 7, True, {"q_proj"})
    assert {n.split(".")[-3] for n, p in policy.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    dropouts = [layer.lora_dropout["default"] for layer in lora_layers(policy, "default").values()]
    assert [each.p for each in dropouts] == [0.25, 0.25]


def test_dropout_is_the_runs_own(tiny, sft):
    policy = start_from_adapter(load_model(tiny), sft)
    assert all(isinstance(e.lora_dropout["default"], nn.Identity) for e in lora_layers(policy, "default").values())
    assert policy.peft_config["default"].lora_dropout == 0.0


def test_an_export_records_the_base_that_was_trained(tiny, sft, tmp_path):
    recorded = json.loads((sft / "adapter_config.json").read_text())
    moved = {**recorded, "base_model_name_or_path": "/moved/away"}
    (sft / "adapter_config.json").write_text(json.dumps(moved))
    policy = start_from_adapter(load_model(tiny), sft, revision="v2")
    folder = export_adapter(policy, load_tokenizer(tiny), tmp_path / "out")
    written = json.loads((folder / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == (str(tiny), "v2")


def test_what_could_not_be_exported_again_is_refused(tiny, tmp_path):
    adapted = with_peft(load_model(tiny), LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    adapted.save_pretrained(tmp_path / "embeddings", save_embedding_layers=False)
    with pytest.raises(ModelError, match="it is on an embedding, has a bias"):
        start_from_adapter(load_model(tiny), tmp_path / "embeddings")

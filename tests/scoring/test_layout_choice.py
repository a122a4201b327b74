import pytest
import torch
from torch import nn

from falign.scoring import choose_layout, why_not_trees
from tests.scoring.models import FAMILIES, TREES, tiny_model, with_lora


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_trees(family):
    model = tiny_model(family, **({"attn_pdrop": 0.0} if family == "gpt2" else {})).train()
    choice = choose_layout(model, TREES, pad_token_id=2)
    assert choice.layout == "tree", choice.reason
    assert choice.as_requested
    assert model.training


def test_adapters_do_not_hide_the_configuration():
    assert choose_layout(with_lora(tiny_model("gemma3_text"), trained=True), TREES, pad_token_id=2).layout == "tree"


def test_a_model_that_reads_trees_wrongly_gets_padded_rows():
    model = tiny_model("mistral")
    model.config.sliding_window = None  # its layers keep no window of their own: the mask is what it has
    assert choose_layout(model, TREES, pad_token_id=2).layout == "tree"

    class CountsColumns(nn.Module):
        """A rotation by column and not by position, as a model that ignores `position_ids`."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, position_ids):
            return self.inner(x, torch.arange(position_ids.shape[1])[None].expand_as(position_ids))

    model.model.rotary_emb = CountsColumns(model.model.rotary_emb)
    choice = choose_layout(model, TREES, pad_token_id=2)
    assert (choice.layout, choice.as_requested) == ("padded", False)
    assert "misreads them" in choice.reason


def test_attention_dropout_other_kernels_and_other_layers_are_reasons_for_padded_rows():
    model = tiny_model()
    model.model.layers[1].self_attn.attention_dropout = 0.1
    assert "dropout" in str(why_not_trees(model))
    gpt2 = tiny_model("gpt2", attn_pdrop=0.1)
    assert "dropout" in str(why_not_trees(gpt2))
    other = tiny_model()
    other.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in str(why_not_trees(other))
    linear = tiny_model()
    linear.config.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in str(why_not_trees(linear))
    assert choose_layout(linear, TREES, pad_token_id=2).layout == "padded"
    with pytest.raises(ValueError, match=r"layout='tree' is not possible.*linear_attention.*'padded'"):
        choose_layout(linear, TREES, pad_token_id=2, wanted="tree")


def test_what_is_asked_for_is_taken():
    model = tiny_model()
    assert choose_layout(model, TREES, pad_token_id=2, wanted="padded").layout == "padded"
    assert choose_layout(model, TREES, pad_token_id=2, wanted="tree").layout == "tree"

"""The MaPO mask against the paper's code, read and written again in NumPy with forward passes of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from falign.errors import ModelError
from falign.scoring import PromptTree, completion_states, pack, pad
from falign.scoring.token_weights import MapoMask
from tests.scoring.models import TREES, tiny_model, with_lora

LAYERS, HEADS, SIZE = 2, 2, 8  # of tests.scoring.models; one head of keys and values
GROUPS = {"mlp": LAYERS, "attn": 6 * LAYERS, "resid": 7 * LAYERS + 2, "logits": 1}


def rms(x, weight, eps):
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def layer_norm(x, weight, bias, eps):
    return weight * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) + bias


def attend(q, k, v):
    """Causal attention of one head."""
    scores = q @ k.T / math.sqrt(SIZE)
    scores[np.triu_indices(len(q), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ v


def rotated(x, base):
    """Each pair (i, i + 4) of a head's eight values turned by its angle, by complex numbers."""
    angles = np.outer(np.arange(len(x)), base ** (-np.arange(0, SIZE, 2) / SIZE))
    turned = (x[..., : SIZE // 2] + 1j * x[..., SIZE // 2 :]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def llama(w, ids, *, eps, base, normed):
    """Return the activations by group, and the logits, of one row; ``normed`` are Qwen 3's queries and keys."""
    found = {group: [] for group in GROUPS}
    x = w["model.embed_tokens.weight"][ids]
    found["resid"].append(x)
    for n in range(LAYERS):
        p = f"model.layers.{n}."
        h = rms(x, w[p + "input_layernorm.weight"], eps)
        q, k, v = (h @ w[f"{p}self_attn.{name}_proj.weight"].T for name in "qkv")
        qs, ks = q.reshape(-1, HEADS, SIZE).transpose(1, 0, 2), k.reshape(1, -1, SIZE)
        if normed:
            qs, ks = (rms(s, w[f"{p}self_attn.{name}_norm.weight"], eps) for name, s in (("q", qs), ("k", ks)))
        qs, ks = rotated_all(qs, base), rotated_all(ks, base)
        heads = np.concatenate([attend(each, ks[0], v) for each in qs], axis=-1)
        found["attn"] += [q, k, v, np.concatenate(list(qs), -1), ks[0], heads]
        attended = heads @ w[p + "self_attn.o_proj.weight"].T
        between = x + attended
        h2 = rms(between, w[p + "post_attention_layernorm.weight"], eps)
        gate, up = h2 @ w[p + "mlp.gate_proj.weight"].T, h2 @ w[p + "mlp.up_proj.weight"].T
        neurons = gate / (1 + np.exp(-gate)) * up
        found["mlp"].append(neurons)
        fed = neurons @ w[p + "mlp.down_proj.weight"].T
        found["resid"] += [x, h, attended, between, h2, fed, between + fed]
        x = between + fed
    last = rms(x, w["model.norm.weight"], eps)
    found["resid"].append(last)
    found["logits"].append(last @ w["lm_head.weight"].T)
    return found


def rotated_all(heads, base):
    return np.stack([rotated(head, base) for head in heads])


def gpt2(w, ids, *, eps):
    found = {group: [] for group in GROUPS}
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)]
    found["resid"].append(x)
    for n in range(LAYERS):
        p = f"transformer.h.{n}."
        h = layer_norm(x, w[p + "ln_1.weight"], w[p + "ln_1.bias"], eps)
        q, k, v = np.split(h @ w[p + "attn.c_attn.weight"] + w[p + "attn.c_attn.bias"], 3, axis=-1)
        parts = [slice(i * SIZE, (i + 1) * SIZE) for i in range(HEADS)]
        heads = np.concatenate([attend(q[:, part], k[:, part], v[:, part]) for part in parts], axis=-1)
        found["attn"] += [q, k, v, heads]
        attended = heads @ w[p + "attn.c_proj.weight"] + w[p + "attn.c_proj.bias"]
        between = x + attended
        h2 = layer_norm(between, w[p + "ln_2.weight"], w[p + "ln_2.bias"], eps)
        z = h2 @ w[p + "mlp.c_fc.weight"] + w[p + "mlp.c_fc.bias"]
        neurons = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        found["mlp"].append(neurons)
        fed = neurons @ w[p + "mlp.c_proj.weight"] + w[p + "mlp.c_proj.bias"]
        found["resid"] += [x, h, attended, between, h2, fed, between + fed]
        x = between + fed
    last = layer_norm(x, w["transformer.ln_f.weight"], w["transformer.ln_f.bias"], eps)
    found["resid"].append(last)
    found["logits"].append(last @ w["transformer.wte.weight"].T)
    return found


def papers_mask(found, start):
    """Means over the hidden size, standardized and scaled over the completion, averaged in groups and over them."""
    groups = []
    for activations in found.values():
        scaled = []
        for activation in activations:
            a = activation[start - 1 : -1].mean(-1)  # where the tokens are predicted
            if len(a) == 1:
                scaled.append(np.ones(1))
                continue
            z = (a - a.mean()) / (a.std(ddof=1) + 1e-12)
            scaled.append((z - z.min()) / (z.max() - z.min()))
        groups.append(np.mean(scaled, axis=0))
    return np.mean(groups, axis=0)


def activations_of(family, model, ids):
    weights = {name: each.detach().numpy() for name, each in model.state_dict().items()}
    if family == "gpt2":
        return gpt2(weights, ids, eps=model.config.layer_norm_epsilon)
    base = model.config.rope_parameters["rope_theta"]
    return llama(weights, ids, eps=model.config.rms_norm_eps, base=base, normed=family == "qwen3")


@pytest.mark.parametrize("lay_out", [pack, pad], ids=["tree", "padded"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_the_mask_is_the_papers(family, lay_out):
    model = tiny_model(family).double().eval()
    for name, parameter in model.named_parameters():
        if "ln_" in name:  # as they are made, their outputs have a mean of 0 at each token, and their scale is rounding
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    batch = lay_out(TREES, pad_token_id=2)
    weights = completion_states(model, batch, weighting="mapo").token_weights
    assert weights.dtype == torch.float64
    row = 0
    for tree in TREES:
        for completion in tree.completion_ids:
            ids = np.array(tree.prompt_ids + completion)
            found = activations_of(family, model, ids)
            logits = model(torch.tensor(ids[None])).logits[0].detach().numpy()
            np.testing.assert_allclose(found["logits"][0], logits, rtol=0, atol=1e-5)  # the oracle is the model
            if family != "gpt2":
                assert {group: len(each) for group, each in found.items()} == GROUPS
            expected = papers_mask(found, len(tree.prompt_ids))
            actual = weights[row, : len(completion)].numpy()
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)  # norms and angles are float32
            row += 1
    assert (weights[~batch.completion_mask] == 0).all()
    assert weights[batch.completion_mask].std() > 0.1


def test_the_model_is_the_same_afterwards_and_an_adapter_acts():
    model = with_lora(tiny_model(), trained=True).eval()
    batch = pad(TREES, pad_token_id=2)
    expected = completion_states(model, batch).distribution.hidden
    on = completion_states(model, batch, weighting="mapo")
    assert torch.equal(on.distribution.hidden, expected)
    with model.disable_adapter():
        off = completion_states(model, batch, weighting="mapo").token_weights
    assert (on.token_weights - off).abs().max() > 0.01
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_completion_of_one_token_counts_as_without_a_mask():
    batch = pad([PromptTree((5, 6), ((7,), (8, 9)), (1.0, 0.0), "rows:1")], pad_token_id=2)
    weights = completion_states(tiny_model().eval(), batch, weighting="mapo").token_weights
    assert weights[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma"])
def test_layers_of_this_form_are_known_in_each_family(family):
    model, batch = tiny_model(family).eval(), pad(TREES, pad_token_id=2)
    mask = MapoMask(model, batch)
    with mask.recording():
        completion_states(model, batch)
    assert mask.counts == {"mlp": LAYERS, "attn": 6 * LAYERS, "resid": 7 * LAYERS + 1}  # and the last two at the end


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "cohere", "phi3", "olmo2", "qwen3_moe"])
def test_layers_of_another_form_are_refused_with_the_remedy(family):
    with pytest.raises(ModelError, match=r"MaPO mask .* Set weighting to activations or none"):
        MapoMask(tiny_model(family), pad(TREES, pad_token_id=2))

"""Adapters with a byte, a value or a tensor changed: refused with the file, or the same model as before.

``FALIGN_MUTATIONS=300`` tries that many; CI tries a part of them, the same ones each time.
"""

import copy
import json
import os
import random
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from falign.errors import FalignError
from falign.models import add_lora, export_adapter, load_adapter, load_model, load_tokenizer
from falign.models.adapter_tensors import read_adapter
from tests.models.tiny import fill_adapter, save_tiny

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

COUNT = int(os.environ.get("FALIGN_MUTATIONS", "60"))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.tensor([[0, 40, 60, 61, 70, 80, 5, 7]])
VALUES = [
    *(None, True, False, -1, 0, 1, 3, 10**9, 0.5, -2.5, float("nan"), float("inf"), "", "x", "pissa", "gaussian"),
    *([], [1], ["q_proj"], ["("], {}, {"a": 1}, {"q_proj": 3}, {"(": 2}, [[0, 1]]),
]


def change_value(folder, rng):
    file = folder / CONFIG
    settings = json.loads(file.read_text())
    key = rng.choice(sorted(settings))
    settings[key] = rng.choice(VALUES)
    file.write_text(json.dumps(settings))
    return key


def drop_or_rename_key(folder, rng):
    file = folder / CONFIG
    settings = json.loads(file.read_text())
    key = rng.choice(sorted(settings))
    value = settings.pop(key)
    if rng.random() < 0.5:
        settings[f"{key}s"] = value
    file.write_text(json.dumps(settings))
    return key


def damage_bytes(folder, rng):
    name = rng.choice([CONFIG, WEIGHTS])
    content = bytearray((folder / name).read_bytes())
    for _ in range(rng.choice([1, 1, 4])):
        content[rng.randrange(min(len(content), rng.choice([200, 10**9])))] ^= 1 << rng.randrange(8)
    if rng.random() < 0.2:
        content = content[: rng.randrange(len(content))]
    (folder / name).write_bytes(content)
    return name


def change_tensor(folder, rng):
    tensors = load_file(folder / WEIGHTS)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    changed = {
        "dropped": {},
        "renamed": {name.replace("q_proj", "x_proj").replace("v_proj", "x_proj"): tensor},
        "NaN": {name: tensor * float("nan")},
        "integers": {name: tensor.to(torch.int32)},
        "cut": {name: tensor[:1].contiguous()},
        "flat": {name: tensor.reshape(-1)},
        "empty": {name: tensor[:0].contiguous()},
        "more": {name: tensor, f"{name}.more": tensor.clone()},
    }
    kind = rng.choice(sorted(changed))
    save_file(tensors | changed[kind], folder / WEIGHTS)
    return f"{kind} {name}"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A base, an adapter as falign writes it, and the same as PEFT does, without a digest."""
    root = tmp_path_factory.mktemp("mutated")
    base = save_tiny(root / "base")
    policy = fill_adapter(add_lora(load_model(base), r=2, alpha=3, seed=0, target_modules=["q_proj", "v_proj"]))
    ours = export_adapter(policy, load_tokenizer(base), root / "falign")
    pefts = shutil.copytree(ours, root / "peft")
    save_file(load_file(pefts / WEIGHTS), pefts / WEIGHTS)
    return load_model(base), {"falign": ours, "peft": pefts}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("writer", ["falign", "peft"])
def test_a_changed_adapter_is_refused_with_its_file_or_is_the_same_model(written, tmp_path, writer):
    base, folders = written
    expected = logits(load_adapter(copy.deepcopy(base), folders[writer], trainable=False))
    rng, refused, problems = random.Random(11), 0, []
    for number in range(COUNT):
        mutate = rng.choice([change_value, change_value, drop_or_rename_key, damage_bytes, change_tensor])
        folder = shutil.copytree(folders[writer], tmp_path / f"{number}")
        what = f"{number}: {mutate.__name__} {mutate(folder, rng)}"
        for read in (lambda: load_adapter(copy.deepcopy(base), folder, trainable=False), lambda: read_adapter(folder)):  # noqa: B023
            try:
                model = read()
            except FalignError as error:
                refused += 1
                if CONFIG not in str(error) and WEIGHTS not in str(error):
                    problems.append(f"{what}: {error}")
            except Exception as error:
                problems.append(f"{what}: {error!r}")
            else:
                # Without a digest, nothing tells another scale or weight from the one that was trained.
                if writer == "falign" and isinstance(model, PeftModel) and not torch.equal(logits(model), expected):
                    problems.append(f"{what}: taken, with other logits")
    assert not problems, "\n".join(problems)
    assert refused > COUNT / 2


def test_a_scale_that_was_edited_is_named(written, tmp_path):
    base, folders = written
    folder = shutil.copytree(folders["falign"], tmp_path / "edited")
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(settings | {"lora_alpha": 5}))
    with pytest.raises(FalignError, match=r"adapter_config.json or .* has changed since it was written.*lora_alpha"):
        load_adapter(copy.deepcopy(base), folder, trainable=False)
    (folder / CONFIG).write_text(json.dumps(settings | {"use_rslora": "yes"}))
    with pytest.raises(FalignError, match=r"adapter_config.json: use_rslora='yes': it is true or false"):
        load_adapter(copy.deepcopy(base), folder, trainable=False)
    (folder / CONFIG).write_text(json.dumps(settings | {"use_rsloraa": True}))
    with pytest.raises(
        FalignError, match=r"does not know use_rsloraa=True and would ignore it. Did you mean 'use_rslo"
    ):
        load_adapter(copy.deepcopy(base), folder, trainable=False)

"""Learned masks train with the policy, and a resumed run goes on with them."""

import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from falign.runfile import parse_run
from falign.training import train
from falign.training.trainer import MASK_HEAD
from tests.training.pairs import run_data, write_pairs

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

LEARNED = {"kind": "token_pairwise", "variant": 1, "weighting": "learned_independent", "mask_l1": 0.05}


def masks(folder, step):
    return load_file(folder / f"checkpoint-{step}" / MASK_HEAD)


def test_masks_move_and_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tiny, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    training = {"max_steps": 4, "save_steps": 1, "save_total_limit": None, "learning_rate": 0.01}

    def run(name, *, resume=False):
        data = run_data(tiny, pairs, tmp_path / name, objective=LEARNED, training=training)
        return train(parse_run(data), console=Console(quiet=True), resume=resume)

    whole, broken = run("whole"), run("broken")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "broken" / f"checkpoint-{step}")
    resumed = run("broken", resume=True)
    del broken
    first, last, again = masks(tmp_path / "whole", 1), masks(tmp_path / "whole", 4), masks(tmp_path / "broken", 4)
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert all(torch.equal(last[name], again[name]) for name in last)
    sizes = [[log["mask"] for log in each.folder.metrics() if "loss" in log] for each in (whole, resumed)]
    assert sizes[0] == sizes[1]
    assert all(size > 0 for size in sizes[0])

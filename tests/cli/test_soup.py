"""``falign soup`` as a user types it."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from tests.models.tiny import save_tiny


@pytest.fixture
def soup(falign):
    """Return a function that runs the command and returns exit status, output and errors."""
    return partial(falign, "soup", columns=200)


@pytest.fixture
def three(tmp_path):
    return [save_tiny(tmp_path / f"c{seed}", seed=seed) for seed in range(3)]


def recorded(folder):
    return [member["weight"] for member in json.loads((folder / "soup.json").read_text())["members"]]


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ([], [0.5, 0.5]),
        (["--weights", "0.3", "0.7"], [0.3, 0.7]),
        (["--weights", "0.3", "--weights", "0.7"], [0.3, 0.7]),
    ],
)
def test_weights_are_given_as_a_list_or_left_out(soup, three, tmp_path, given, weights):
    status, out, err = soup(*three[:2], *given, "--out", tmp_path / "soup")
    assert status == 0, err
    assert recorded(tmp_path / "soup") == weights
    assert "c1" in out
    written, *members = (load_file(folder / "model.safetensors") for folder in (tmp_path / "soup", *three[:2]))
    name = "model.layers.1.mlp.up_proj.weight"
    expected = weights[0] * members[0][name] + weights[1] * members[1][name]
    torch.testing.assert_close(written[name], expected)


def test_members_may_come_after_the_weights(soup, three, tmp_path):
    status, _, err = soup("--weights", "0.2", "0.3", "0.5", "--out", tmp_path / "soup", *three)
    assert status == 0, err
    assert recorded(tmp_path / "soup") == [0.2, 0.3, 0.5]


def test_what_cannot_be_averaged_ends_with_a_message_and_no_folder(soup, three, tmp_path):
    for arguments, message in (
        ([three[0]], "a soup of 1: give at least two"),
        ([*three[:2], "--weights", "0.5", "0.6"], "sum to 1.1"),
        ([*three[:2], "--weights", "-0.5", "1.5"], "-0.5 is not"),
        ([three[0], tmp_path / "nowhere"], "does not exist"),
        ([*three[:2], "--dtype", "int3"], "--dtype 'int3' is unknown"),
    ):
        status, _, err = soup(*arguments, "--out", tmp_path / "soup")
        assert status == 2
        assert message in err
        assert not (tmp_path / "soup").exists()


def test_only_models_are_replaced(soup, three, tmp_path):
    for folder in ("soup", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    status, _, err = soup(*three[:2], "--out", tmp_path / "other", "--overwrite")
    assert status == 2
    assert "something other than a model" in err
    status, _, err = soup(*three[:2], "--out", three[1], "--overwrite")
    assert (status, f"--out {three[1]} would replace {three[1]}, which a model is made from" in err) == (2, True)
    assert soup(*three[:2], "--out", tmp_path / "soup")[0] == 0
    status, _, err = soup(*three[1:], "--out", tmp_path / "soup")
    assert status == 2
    assert "not empty" in err
    assert soup(*three[1:], "--out", tmp_path / "soup", "--overwrite", "--dtype", "bfloat16")[0] == 0
    assert load_file(tmp_path / "soup" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16

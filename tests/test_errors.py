"""Messages of libraries are passed on whole: what is cut is a user's data alone."""

import re
from pathlib import Path

import pytest

import falign
from falign.errors import ConfigError, EngineError, TrainingError, one_line
from falign.report.writing import made_of
from falign.rollouts import SamplingParams, vllm_completions
from falign.rollouts.vllm_client import HTTPClient
from falign.training.resumable import reading_checkpoint

LONG = "a reason " * 100 + "and the remedy"


def test_a_message_of_several_lines_becomes_one():
    assert one_line(ValueError("two\n  lines\tand  more ")) == "two lines and more"


def test_no_message_of_an_exception_is_cut():
    cut = re.compile(r"(str\(error\)[^\n]{0,12}|\{error\}[\"'])\)?\[:")
    for file in Path(falign.__file__).parent.rglob("*.py"):
        assert not cut.search(file.read_text()), file


def test_a_checkpoint_that_cannot_be_read_has_the_whole_reason():
    with pytest.raises(TrainingError, match="and the remedy"), reading_checkpoint("checkpoint-1"):
        raise RuntimeError(LONG)


def test_a_page_that_cannot_be_made_has_the_whole_reason():
    def section(runs):
        raise KeyError(LONG)

    with pytest.raises(ConfigError, match="and the remedy"):
        made_of(section, [])


def complete():
    vllm_completions.complete(
        HTTPClient("http://127.0.0.1:1", timeout=1.0),
        (1,),
        1,
        SamplingParams(max_new_tokens=1),
        model="m",
        version=0,
        seed=0,
    )


def test_a_server_that_refuses_has_its_whole_message(monkeypatch):
    refusal = {"object": "error", "message": LONG, "code": 400}
    for reply in (refusal, {"error": {"message": LONG}}, {"error": LONG}):
        monkeypatch.setattr(HTTPClient, "post_json", lambda *_, reply=reply: reply)
        with pytest.raises(EngineError, match="and the remedy"):
            complete()
    monkeypatch.setattr(HTTPClient, "post_json", lambda *_: {"choices": "x" * 10_000})
    with pytest.raises(EngineError, match=r"x \.\.\. \(10015 characters\)$"):  # data of the run
        complete()

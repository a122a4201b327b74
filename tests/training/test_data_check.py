"""``falign.check_data``: data in memory, in a file, or of a run."""

import json

import pytest
from datasets import Dataset

import falign
from falign.errors import ConfigError, DataError
from falign.models import load_model
from falign.runfile import load_run_file
from tests.models.tiny import TEMPLATE, save_tiny
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

PAIRS = [{"prompt": f"q{i}: ", "chosen": "a b c", "rejected": "d"} for i in range(8)]
EQUAL = {"prompt": "q: ", "chosen": "a", "rejected": "a"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("check") / "tiny")


@pytest.fixture
def run_file(model, tmp_path):
    def write(**changes):
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(run_data(model, write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run", **changes)))
        return path

    return write


def test_rows_in_memory_are_counted_and_nothing_is_printed(capsys):
    found = falign.check_data([*PAIRS, EQUAL], keep=1)
    (report,) = found.sources
    assert (report.unit, report.source.read, report.source.bad) == ("words", 9, 1)
    assert report.source.messages[0].startswith("python:list row 9: 'chosen' and 'rejected' are equal")
    assert not found.ok
    with pytest.raises(DataError, match=r"python:list: 1 bad row; fix the file, or set data\.bad_rows=skip"):
        found.require_ok()
    assert falign.check_data(Dataset.from_list(PAIRS)).ok
    assert capsys.readouterr() == ("", "")


def test_a_loaded_model_counts_the_tokens_of_the_model_by_name(model):
    by_name = falign.check_data(PAIRS, model=model, chat=False, max_length=9, long_completion="drop")
    loaded = falign.check_data(
        {"rows": PAIRS, "chat": False}, model=load_model(model), max_length=9, long_completion="drop"
    )
    assert by_name.sources == loaded.sources
    assert by_name.sources[0].length_rows() == [
        ("prompt", 8, 4, 4, 4, 4),
        ("chosen", 8, 6, 6, 6, 6),  # with the stop token
        ("rejected", 8, 2, 2, 2, 2),
    ]
    assert by_name.sources[0].source.dropped == {"long completion": 8}
    with pytest.raises(DataError, match=r"drops all 8 rows .* raise `max_length`, .*\(long_prompt=cut, "):
        by_name.require_ok()


OPENS_OTHERWISE = TEMPLATE + "{% if add_generation_prompt %}>{% endif %}"


def test_drift_is_refused_only_where_a_limit_is_given(model):
    options = {"model": model, "chat_template": OPENS_OTHERWISE, "chat": True}
    assert falign.check_data(PAIRS, **options).ok
    with pytest.raises(DataError, match=r"in 100\.0% of the rows .* \(at most 5\.0% are allowed\)"):
        falign.check_data(PAIRS, **options, max_drift=0.05).require_ok()


def test_rows_without_preferences_are_told_of():
    found = falign.check_data(
        [{"question": "q", "answer": "a"}], columns={"prompt": "question", "completion": "answer"}
    )
    assert found.ok
    assert [notice.text.partition(",")[0] for notice in found.notices] == ["Rows of this format have no preferences"]


def test_a_run_is_checked_as_its_file(run_file):
    path = run_file()
    found = falign.check_data(path)
    assert found == falign.check_data(load_run_file(path))
    assert [notice.text for notice in found.notices] == ["data: 18 rows to train on, 6 held out"]
    assert found.sources[0].unit == "tokens"
    found = falign.check_data(run_file(training={"tokens_per_batch": 2}))
    assert found.notices
    with pytest.raises(ConfigError, match="tokens_per_batch=2 is less than"):
        found.require_ok()
    found = falign.check_data(run_file(data={"max_length": 8, "long_prompt": "drop"}))
    with pytest.raises(DataError, match=r"raise `data\.max_length`, .*\(data\.long_prompt=cut"):
        found.require_ok()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 9}, "`max_length` needs a tokenizer: give `model`"),
        ({"chat_template": "x"}, "`chat_template` needs a tokenizer"),
        ({"max_drift": 2.0}, "max_drift=2.0 must be a share"),
        ({"format": "hhh"}, "format='hhh' is unknown.* did you mean 'hh'"),
        ({"data": {"rows": PAIRS, "chat": False}, "chat": True}, "`chat`: data is a section, which has this itself"),
        ({"data": {"rows": PAIRS, "chta": False}}, "data: chta: "),
        ({"ignore": "id"}, "data: ignore: Input should be a valid list"),
        ({"data": "run.yaml", "format": "hh"}, r"`format`: run\.yaml is a run file, which sets this itself"),
        ({"data": "run.yaml", "model": "x", "chat": True}, r"`model`: run\.yaml is a run file"),
        ({"data": "run.yaml"}, r"No run file at run\.yaml"),
    ],
)
def test_a_wrong_argument_is_named(options, message):
    data = options.pop("data", PAIRS)
    with pytest.raises(ConfigError, match=message):
        falign.check_data(data, **options)


def test_a_template_beside_a_loaded_model_and_a_run_with_prompts_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="`chat_template` applies to a model by name"):
        falign.check_data(PAIRS, model=load_model(model), chat_template="x")
    run = online_data(model, write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "run")
    (tmp_path / "online.yaml").write_text(json.dumps(run))
    with pytest.raises(ConfigError, match=r"the run of .*run has prompts and no data"):
        falign.check_data(load_run_file(tmp_path / "online.yaml"))

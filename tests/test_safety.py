"""What a run must never do: write secrets down, follow a link out of its folder, load pickles or code of others."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import falign
from falign import errors, plain_yaml
from falign.cli import main
from falign.errors import ConfigError, ModelError, refuse_passwords, without_passwords
from falign.models import load_model, load_tokenizer
from falign.references.store import CacheKey, LogprobStore
from falign.runfile import parse_run
from falign.runfile.reading import load_run_file
from falign.runs import RunFolder
from falign.runs.loading import result_folder
from tests.training.pairs import run_data

SOURCES = sorted(Path(falign.__file__).parent.rglob("*.py"))
KEY = CacheKey(weights="w", config="c", vocabulary=260, tokenizer="t", dtype="float32", attention="sdpa")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.yaml", "manifest.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["..", ".", "", "../other", "a/b", "/tmp"])
def test_a_name_cannot_lead_out_of_the_run_folder(folder, name):
    with pytest.raises(ConfigError, match="must be the name of a folder, not a path"):
        result_folder(str(folder), name, None)


def test_results_do_not_follow_a_link_out_of_the_run_folder(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "evaluation").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="leads out"):
        result_folder(str(folder), "mine", None)


LINKS = [
    *("metrics.jsonl", "adapter", "checkpoint-3", ".metrics.jsonl.partial", "report-figures/x.png"),
    *("evaluation/mine/.summary.json.new", "evaluation/mine/.items.jsonl.partial.json.new", "checkpoint-3/a/b"),
]


@pytest.mark.parametrize("name", LINKS)
def test_a_run_folder_with_a_link_out_of_it_at_any_depth_is_refused(folder, tmp_path, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=rf"{re.escape(name)} is a link that leads out of the run folder"):
        RunFolder.open(folder)


def test_a_cache_with_a_link_is_refused(tmp_path):
    LogprobStore(tmp_path / "real", key=KEY).append({b"d" * 32: torch.zeros(2)})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="link is a link"):
        LogprobStore(tmp_path / "link", key=KEY)
    (shard,) = (tmp_path / "real").glob("shard-*")
    shard.rename(tmp_path / "moved")
    shard.symlink_to(tmp_path / "moved")
    with pytest.raises(ConfigError, match="is a link"):
        LogprobStore(tmp_path / "real", key=KEY)


SECRETS = [
    ("data.train.0.path", "https://me:hunter2@example.org/pairs.jsonl"),
    ("model.token", "hunter2"),
    ("model.api_key", "hunter2"),
    ("tracker.WANDB_API_KEY", "hunter2"),
    ("database.password", "hunter2"),
    ("model.token", "12345678"),
    ("data.train.0.path", "https://hunter2@example.org/pairs.jsonl"),
    ("data.train.0.path", "https://example.org/pairs.jsonl?download=1&token=hunter2"),
    ("data.train.0.path", "https://example.org/p?X-Amz-Signature=hunter2"),
    ("model.path", "hf_hunter2abcdefghijklmnop"),
    ("objective.divergence", "hf_hunter2abcdefghijklmnop"),
    ("no.such.field", "https://me:hunter2@example.org"),
]


@pytest.mark.parametrize(("path", "value"), SECRETS)
def test_a_run_file_with_a_secret_is_refused_without_showing_it(tmp_path, path, value):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(run_data(tmp_path, tmp_path / "pairs.jsonl", tmp_path / "run")))
    with pytest.raises(ConfigError, match=rf"run.yaml: {re.escape(path)} is a ") as error:
        load_run_file(str(file), [f"{path}={value}"])
    assert "hunter2" not in str(error.value)
    assert "12345678" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "https://me:hunter2@example.org/x",
        "model.path.x=https://me:hunter2@example.org/x",
        "model.path.token=hunter2",
        "data.train.x.api_key=hunter2",
        "model.token=[hunter2",
        "model.path=[https://me:hunter2@example.org/x",
        "=hf_hunter2abcdefghijklmnop",
    ],
)
def test_an_override_that_cannot_be_read_is_quoted_without_its_secret(tmp_path, override):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(run_data(tmp_path, tmp_path / "pairs.jsonl", tmp_path / "run")))
    with pytest.raises(ConfigError) as error:
        load_run_file(str(file), [override])
    assert "hunter2" not in str(error.value)


SECRET_TEXTS = {
    "https://me:hunter2@h/x": "https://***@h/x",
    "https://hunter2@h/x": "https://***@h/x",
    "No run file at https:/me:hunter2@h/x.": "No run file at https:/***@h/x.",
    "https://h/x?a=1&access_token=hunter2#p": "https://h/x?a=1&access_token=***#p",
    "No file at 'hf_hunter2abcdefghijklmnop'.": "No file at '***'.",
    "ghp_hunter2abcdefghijklmnop": "***",
}


FUNCTIONS = {"holds_secret", "one_line", "refuse_passwords", "without_passwords", "without_secrets"}


# StoppedError makes its message itself.
@pytest.mark.parametrize("kind", sorted({*errors.__all__} - {"StoppedError", *FUNCTIONS}))
def test_every_error_masks_what_it_quotes(kind):
    for text, masked in SECRET_TEXTS.items():
        assert str(getattr(errors, kind)(text)) == masked
    assert "***" not in str(getattr(errors, kind)("pad_token='<pad>' of hf_home, at https://h/x?page=2"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "m", "rows.jsonl", "--reference", "https://me:hunter2@example.org/m"],
        ["train", "https://me:hunter2@example.org/run.yaml"],
        ["report", "https://me:hunter2@example.org/run"],
        ["export", "hf_hunter2abcdefghijklmnop", "--format", "merged"],
        ["data", "check", "https://example.org/p.jsonl?token=hunter2"],
    ],
)
def test_no_command_repeats_a_secret(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["falign", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capfd.readouterr()
    assert "hunter2" not in printed.out + printed.err
    assert printed.err


def test_what_only_looks_like_a_secret_is_none(tmp_path):
    data = run_data(tmp_path, tmp_path / "a.jsonl", tmp_path / "run", rollout={"max_new_tokens": 4})
    data["data"]["train"][0]["path"] = "https://example.org:8080/a@b.jsonl"
    refuse_passwords(data, place="run")
    refuse_passwords({"pad_token": "", "tokens": "x", "max_tokens": 5}, place="run")


def test_a_password_in_a_url_is_masked_in_what_is_written(tmp_path):
    RunFolder(tmp_path).write_json("summary.json", {"path": "https://me:hunter2@example.org/x", "to": "a:b@c"})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"path": "https://***@example.org/x", "to": "a:b@c"}
    assert without_passwords("x http://u:p@h/ and https://h:80/@") == "x http://***@h/ and https://h:80/@"


def calls(name):
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
                yield file.name, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_nothing_is_unpickled_but_requests_from_the_parent_process():
    assert {file for file, _ in calls("pickle.loads")} == {"worker.py"}
    assert not [*calls("pickle.load"), *calls("joblib.load"), *calls("numpy.load")]
    assert list(calls("yaml.load")) == [("plain_yaml.py", {"Loader": "_UniqueKeys"})]
    assert issubclass(plain_yaml._UniqueKeys, yaml.SafeLoader)
    assert all(keywords.get("weights_only") == "True" for _, keywords in calls("torch.load"))


def test_every_loader_says_whether_code_of_a_repository_runs():
    loaders = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer", "AutoConfig")
    for loader in loaders:
        for file, keywords in calls(f"{loader}.from_pretrained"):
            local = "gguf_file" in keywords  # a GGUF file brings no code
            assert local or keywords.get("trust_remote_code") in {"False", "trust_remote_code"}, (file, loader)


def test_code_of_a_repository_is_refused_unless_the_run_file_asks_for_it(tiny):
    config = json.loads((tiny / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tiny / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto_map}))
    (tiny / "own.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(ModelError, match="Set trust_remote_code only if you trust that code"):
        load_model(tiny)
    run = parse_run(run_data(tiny, tiny / "pairs.jsonl", tiny / "run"))
    assert run.model.trust_remote_code is False


def test_pickled_weights_are_refused(tiny):
    (tiny / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, tiny / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        load_model(tiny)
    assert load_tokenizer(tiny).eos_token

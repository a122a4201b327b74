"""The command line as a user types it: real files, a real tiny model, exit statuses."""

import errno
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.tiny import save_tiny
from tests.training.pairs import run_data, write_pairs

# transformers moves batches to pinned memory when asked to, and warns on a machine without an accelerator.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@pytest.fixture
def run_file(tiny, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl")

    def write(**changes):
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(run_data(tiny, data, tmp_path / "run", **changes)), encoding="utf-8")
        return path

    return write


def test_train_export_sample_and_report(falign, run_file, tmp_path):
    status, out, _ = falign("train", run_file(), "objective.beta=0.4")
    assert status == 0
    assert "reward accuracy" in out
    assert "50.0%" in out
    assert "question 1:" in out
    run = tmp_path / "run"
    for kind in ("adapter", "merged"):
        status, out, err = falign("export", run, "--format", kind)
        assert status == 0, err
        assert "wrote" in out
        assert (run / "export" / kind).is_dir()
    status, _, err = falign("export", run, "--format", "adapter")
    assert status == 2
    assert "not empty" in err
    status, out, _ = falign("sample", run, "--prompt", "question 1: ", "--max-new-tokens", "3", "--json")
    assert status == 0
    assert json.loads(out)["prompt"] == "question 1: "
    status, out, _ = falign("report", run)
    assert status == 0
    assert "mean margin" in out
    assert "report.html" in out
    assert "reward accuracy" in (run / "report.html").read_text(encoding="utf-8")


def test_sampling_a_file_is_reproducible(falign, tiny, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\n")
    arguments = ("sample", tiny, "--file", prompts, "--temperature", "1.0", "--max-new-tokens", "6", "--json")
    first, second, other = falign(*arguments), falign(*arguments), falign(*arguments, "--seed", "1")
    assert first[0] == 0
    assert [json.loads(line)["prompt"] for line in first[1].splitlines()] == ["one", "two"]
    assert first[1] == second[1] != other[1]


def test_conversations_and_a_system_column_are_sampled(falign, tiny, tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    last = {"role": "user", "content": "who?"}
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"prompt": [*turns, last]},
        {"prompt": "who?", "system": "Be brief."},
        {"prompt": [{"from": "human", "value": "who?"}]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = falign("sample", tiny, "--file", tmp_path / "p.jsonl", "--max-new-tokens", 2, "--json")
    assert status == 0, err
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == [[*turns, last], [system, last], [last]]
    status, out, err = falign("sample", tiny, "--file", tmp_path / "p.jsonl", "--max-new-tokens", 2)
    assert "system: Be brief." in out
    for row, message in (
        ({"x": 1}, "'prompt' is missing"),
        ({"prompt": "a", "system": 3}, "`system`"),
        ({"prompt": turns}, ""),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps(row))
        status, _, err = falign("sample", tiny, "--file", tmp_path / "bad.jsonl")
        assert status == 2
        assert "bad.jsonl:1" in err
        assert message in err


def break_row(path, **fields):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3] = {key: value for key, value in {**rows[3], **fields}.items() if value is not None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rejected": None}, "rejected"),
        ({"chosen": "  "}, "chosen"),
        ({"chosen": "same", "rejected": "same"}, "equal"),
        ({"prompt": "long " * 40}, "max_length"),
    ],
)
def test_a_bad_row_stops_the_run_with_file_line_and_reason(falign, run_file, tmp_path, fields, message):
    path = run_file()
    break_row(tmp_path / "pairs.jsonl", **fields)
    status, _, err = falign("train", path)
    assert status == 2
    assert "pairs.jsonl:4" in err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_line_that_is_not_json_is_named(falign, run_file, tmp_path):
    path, data = run_file(), tmp_path / "pairs.jsonl"
    lines = data.read_text().splitlines()
    lines[5] = lines[5][:-4]
    data.write_text("\n".join(lines))
    status, _, err = falign("train", path)
    assert status == 2
    assert "pairs.jsonl:6" in err
    assert "JSON" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"learning_rat": 1}}, "unknown key 'training.learning_rat': did you mean training.learning_rate"),
        ({"objective": {"divergence": "jensen_shanon"}}, "did you mean 'jensen_shannon'"),
        ({"objective": {"divergence": "pearson_chi2"}}, "no closed form under pearson_chi2"),
        ({"objective": {"divergence": "kl"}}, "'reverse_kl'"),
        ({"model": {"path": "nowhere/at-all/here"}}, "nowhere"),
        ({"data": {"train": [{"path": "missing.jsonl"}]}}, "missing.jsonl"),
    ],
)
def test_a_bad_run_file_ends_with_status_2_and_a_remedy(falign, run_file, tmp_path, changes, message):
    status, _, err = falign("train", run_file(**changes))
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_conversation_without_a_chat_template_names_the_option(falign, run_file, tiny, tmp_path):
    (tiny / "chat_template.jinja").unlink()
    row = {
        "prompt": [{"role": "user", "content": "hello"}],
        "chosen": [{"role": "assistant", "content": "good day"}],
        "rejected": [{"role": "assistant", "content": "what"}],
    }
    path = run_file()
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    status, _, err = falign("train", path)
    assert status == 2
    assert "chat_template" in err


def test_a_model_folder_without_weights_is_refused(falign, run_file, tiny, tmp_path):
    path = run_file()
    (tiny / "model.safetensors").unlink()
    status, _, err = falign("train", path)
    assert status == 2
    assert "weights" in err
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_refused(falign, run_file):
    path = run_file(training={"max_steps": 1})
    assert falign("train", path)[0] == 0
    status, _, err = falign("train", path)
    assert status == 2
    assert "holds another run" in err
    assert "--resume" in err


def test_a_full_disk_while_writing_a_checkpoint(falign, run_file, tmp_path, monkeypatch):
    from transformers import Trainer

    def full(self, output_dir):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Trainer, "_save_rng_state", full)
    status, _, err = falign("train", run_file(training={"save_steps": 2}))
    assert status == 2
    assert "the disk is full" in err
    assert not list((tmp_path / "run").glob("*checkpoint*"))


@pytest.mark.parametrize("name", ["before.json", "metrics.jsonl", "curves.png"])
def test_a_full_disk_while_writing_another_file_names_it(falign, run_file, tmp_path, monkeypatch, name):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    opened = Path.open

    def full(self, *arguments, **options):
        return Full() if name in self.name else opened(self, *arguments, **options)

    def full_picture(self, path, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = run_file()
    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full_picture)
    status, _, err = falign("train", path)
    assert status == 2
    assert f"{tmp_path / 'run' / name}: the disk is full. Free some space" in err


def test_divergences_prints_the_table_and_draws(falign, tmp_path):
    status, out, _ = falign("divergences")
    assert status == 0
    assert sum("yes" in line for line in out.splitlines()) == 9
    assert sum("no barrier" in line for line in out.splitlines()) == 3
    picture = tmp_path / "f.png"
    status, out, _ = falign("divergences", "js", "alpha(0.3)", "--plot", picture)
    assert status == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "log(2u/(1+u))" in out
    status, _, err = falign("divergences", "js", "--plot", tmp_path / "f.doc")
    assert status == 2
    assert ".doc" in err


def test_divergences_shows_whole_names_in_a_narrow_terminal(falign):
    _, out, _ = falign("divergences", columns=80)
    assert "…" not in out
    assert "generalized_js(0.3)" in out
    assert "generalized_js(0.7)" in out


COMMANDS = [
    "train", "report", "sample", "score", "export", "soup", "divergences",
    "data check", "evaluate rewards", "evaluate samples", "evaluate frontier",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_whole_names_of_options_in_80_columns(falign, command):
    status, out, _ = falign(*command.split(), "--help", columns=80)
    assert (status, "…" in out) == (0, False)


@pytest.mark.parametrize("name", ["F.PNG", "f.Svg"])
def test_the_suffix_of_a_picture_may_be_in_capitals(falign, tmp_path, name):
    status, _, err = falign("divergences", "js", "--plot", tmp_path / name)
    assert status == 0, err
    assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize("name", ["f.doc", "nowhere/f.png", "f"])
def test_a_picture_that_cannot_be_drawn_is_refused_before_the_table(falign, tmp_path, name):
    status, out, err = falign("divergences", "js", "--plot", tmp_path / name)
    assert status == 2
    assert "--plot" in err
    assert not out.strip()


def test_data_check_counts_and_refuses(falign, tmp_path, tiny):
    data = write_pairs(tmp_path / "pairs.jsonl")
    status, out, _ = falign("data", "check", data, "--plain", "--model", tiny)
    assert status == 0
    assert "length in tokens" in out
    break_row(data, chosen="")
    status, out, err = falign("data", "check", data)
    assert status == 2
    assert "pairs.jsonl:4" in out
    assert "1 bad row" in err


def test_a_run_that_is_not_finished_says_so(falign, run_file, tmp_path):
    path = run_file(training={"max_steps": 1})
    assert falign("train", path)[0] == 0
    (tmp_path / "run" / "summary.json").unlink()
    status, out, _ = falign("report", tmp_path / "run", "--out", tmp_path / "so-far.html")
    assert status == 0
    assert "has not ended" in out
    assert "run.yaml --resume" in out
    assert (tmp_path / "so-far.html").is_file()
    status, _, err = falign("export", tmp_path, "--format", "merged")
    assert status == 2
    assert "not a run folder" in err


def test_a_report_is_refused_before_anything_is_printed(falign, run_file, tmp_path):
    assert falign("train", run_file(training={"max_steps": 1}))[0] == 0
    for arguments, message in (
        ((tmp_path / "run", tmp_path / "run"), "is given twice"),
        ((tmp_path / "run", tmp_path), "not a run folder"),
        ((tmp_path / "run", "--out", tmp_path / "run.yaml" / "x.html"), "run.yaml"),
    ):
        status, out, err = falign("report", *arguments)
        assert status == 2
        assert message in err
        assert not out.strip()


def test_nothing_to_sample_is_refused(falign, tiny):
    status, _, err = falign("sample", tiny)
    assert status == 2
    assert "--prompt" in err


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({}, "vLLM serves it over the base model with --enable-lora --max-lora-rank 8"),
        ({"r": 9}, "--max-lora-rank 16"),
        ({"target_modules": ["q_proj", "lm_head"]}, "vLLM does not serve it (embeddings or head have an adapter"),
    ],
)
def test_an_adapters_export_says_how_vllm_serves_it(falign, run_file, tmp_path, adapter, expected):
    base = run_data(tmp_path / "tiny", tmp_path / "pairs.jsonl", tmp_path / "run")["adapter"]
    changes = {"max_steps": 1, "learning_rate": 1e-2}
    assert falign("train", run_file(adapter={**base, **adapter}, training=changes))[0] == 0
    status, out, err = falign("export", tmp_path / "run", "--format", "adapter")
    assert status == 0, err
    assert expected in " ".join(out.split())


def test_full_fine_tuning_is_exported(falign, run_file, tmp_path):
    assert falign("train", run_file(adapter=None, training={"learning_rate": 1e-3}))[0] == 0
    status, out, err = falign("export", tmp_path / "run", "--format", "merged")
    assert status == 0, err
    assert "difference from the base model" in out
    status, _, err = falign("export", tmp_path / "run", "--format", "adapter")
    assert status == 2
    assert "has no adapter" in err


def test_the_export_of_a_4_bit_run_says_what_is_rounding_of_its_base(falign, run_file, tmp_path):
    path = run_file(model={"quantization": "nf4"}, training={"learning_rate": 0.05})
    assert falign("train", path)[0] == 0
    status, out, err = falign("export", tmp_path / "run", "--format", "merged")
    assert status == 0, err
    rows = [line.strip("│ ").split("│")[0].strip() for line in out.splitlines() if "│" in line]
    assert rows.index("difference caused by the export") + 1 == rows.index("tolerance of the export")
    assert "tolerance" not in rows
    note = "note: the trained model has a quantized base, and the export has the original weights"
    assert note in " ".join(out.split())


def test_a_base_that_has_changed_since_is_refused(falign, run_file, tiny, tmp_path):
    assert falign("train", run_file())[0] == 0
    save_tiny(tiny, seed=9)
    for command in (("export", tmp_path / "run", "--format", "merged"), ("sample", tmp_path / "run", "-p", "hello")):
        status, _, err = falign(*command)
        assert status == 2
        assert "holds other weights now" in err
    assert not (tmp_path / "run" / "export").exists()


def test_an_export_that_is_not_proven_does_not_stay(falign, run_file, tmp_path, monkeypatch):
    assert falign("train", run_file())[0] == 0
    monkeypatch.setattr("falign.models.proof._default_bound", lambda *_: -1.0)  # no difference is small enough
    status, _, err = falign("export", tmp_path / "run", "--format", "merged")
    assert status == 2
    assert "is not the trained model" in err
    assert not (tmp_path / "run" / "export" / "merged").exists()


def test_overwrite_does_not_replace_what_is_no_export(falign, run_file, tmp_path):
    assert falign("train", run_file())[0] == 0
    run = tmp_path / "run"
    status, _, err = falign("export", run, "--format", "merged", "--out", run, "--overwrite")
    assert status == 2
    assert f"--out {run} is a run: choose another folder" in err
    other = tmp_path / "notes"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    status, _, err = falign("export", run, "--format", "merged", "--out", other, "--overwrite")
    assert status == 2
    assert "something other than an export" in err
    assert (other / "notes.txt").read_text() == "mine"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("target", ["base", "run/adapter", "run/checkpoint-2", "."])
def test_overwrite_does_not_replace_the_base_or_a_part_of_the_run(falign, run_file, tiny, tmp_path, target):
    base = shutil.copytree(tiny, tmp_path / "base")
    training = {"max_steps": 2, "save_steps": 2}
    assert falign("train", run_file(model={"path": str(base)}, training=training))[0] == 0
    kept = sorted(tmp_path.rglob("*"))
    status, _, err = falign("export", tmp_path / "run", "--format", "merged", "--out", tmp_path / target, "--overwrite")
    assert (status, sorted(tmp_path.rglob("*"))) == (2, kept)
    assert "choose another folder" in err


def test_a_dtype_without_effect_is_refused(falign, run_file, tmp_path):
    assert falign("train", run_file())[0] == 0
    run = tmp_path / "run"
    status, _, err = falign("export", run, "--format", "adapter", "--dtype", "float16")
    assert (status, "--dtype float16 applies only to merged weights: give --format merged" in err) == (2, True)
    status, _, err = falign("sample", run, "--prompt", "a", "--dtype", "bfloat16")
    assert (status, f"--dtype: {run} is a run, which has its own (model.dtype): leave it out." in err) == (2, True)


def test_brackets_in_prompts_and_answers_are_text(falign, run_file):
    status, out, err = falign("train", run_file(sampling={"prompts": ["what does [/b] mean? [bold]"]}))
    assert status == 0, err
    assert "[/b]" in out
    assert "[bold]" in out


def test_a_divergence_beside_the_run_file_is_found_by_the_installed_command(run_file, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from falign.divergences import from_generator\n"
        "cautious = from_generator(lambda u: u * u.log() + (u - 1) ** 2, name='cautious')\n"
    )
    path = run_file(objective={"divergence": "mine:cautious"}, training={"max_steps": 1})
    command = [str(Path(sys.executable).with_name("falign")), "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "cautious" in (tmp_path / "run" / "run.yaml").read_text()


@pytest.mark.parametrize("kind", ["pairwise", "token_pairwise"])
def test_measures_of_ones_own_and_of_the_registry_are_logged_and_change_nothing_of_the_training(
    falign, run_file, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "least_measure", raising=False)
    (tmp_path / "least_measure.py").write_text(
        "class Least:\n"
        "    references = frozenset({'reference'})\n"
        "    def __call__(self, at):\n"
        "        return -(at.logprobs - at.reference()).abs().amax(dim=-1)\n"
    )
    logs = {}
    asked = {"least": "least_measure:Least", "js": "divergence_to(jensen_shannon)"}
    for name, measures in {"with": asked, "without": {}}.items():
        changes = {"objective": {"kind": kind}, "measures": measures, "training": {"max_steps": 2}}
        status, _, err = falign("train", run_file(output_dir=str(tmp_path / name), **changes))
        assert status == 0, err
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        logs[name] = [log for log in lines if "loss" in log]
    (first, second), without = logs["with"], logs["without"]
    assert [log["loss"] for log in logs["with"]] == pytest.approx([log["loss"] for log in without], rel=1e-6)
    # Before the first update policy and reference are the same.
    assert first["measures/least"] == pytest.approx(0.0, abs=1e-6)
    assert first["measures/js"] == pytest.approx(0.0, abs=1e-6)
    assert second["measures/least"] < -1e-4
    assert second["measures/js"] > 0
    assert not [name for log in without for name in log if name.startswith("measures/")]


def test_an_error_of_the_operating_system_is_an_error_and_no_traceback(falign, run_file, tmp_path):
    status, _, err = falign("train", run_file(), f"output_dir={tmp_path / 'pairs.jsonl' / 'x'}")
    assert status == 2
    assert "pairs.jsonl" in err


def test_data_check_refuses_what_a_run_would_refuse(falign, tmp_path, tiny):
    data = write_pairs(tmp_path / "pairs.jsonl")
    break_row(data, prompt="long " * 40)
    assert falign("data", "check", data, "--plain", "--model", tiny, "--max-length", 64)[0] == 2
    assert falign("data", "check", data, "--plain", "--model", tiny, "--max-length", 64, "--long-prompt", "cut")[0] == 0
    (tmp_path / "empty.jsonl").write_text("")
    status, _, err = falign("data", "check", tmp_path / "empty.jsonl")
    assert status == 2
    assert "no rows" in err or "empty" in err


def test_data_check_says_when_the_window_drops_every_row(falign, tmp_path, tiny):
    data = write_pairs(tmp_path / "pairs.jsonl")
    status, _, err = falign(
        "data", "check", data, "--plain", "--model", tiny, "--max-length", 4, "--long-prompt", "drop"
    )
    assert status == 2
    assert "the window drops all 24 rows (long prompt: 24): raise --max-length" in err
    assert "bad row" not in err


@pytest.mark.parametrize(
    "option",
    [
        ("--max-length", 64),
        ("--max-completion-length", 8),
        ("--long-prompt", "cut"),
        ("--long-completion", "drop"),
        ("--chat-template", "{{ x }}"),
    ],
)
def test_data_check_refuses_options_about_tokens_without_a_model(falign, tmp_path, option):
    status, _, err = falign("data", "check", write_pairs(tmp_path / "pairs.jsonl"), *option)
    assert status == 2
    assert f"{option[0]} needs a tokenizer: give --model" in err


def test_messages_of_data_check_are_not_wrapped(falign, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl")
    break_row(data, chosen=7, prompt="a long prompt " * 20)
    _, out, _ = falign("data", "check", data)
    (line,) = [line for line in out.splitlines() if "pairs.jsonl:4" in line]
    assert len(line) > 120
    assert line.endswith(".")

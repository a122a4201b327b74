"""``falign score`` as a user types it."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from falign.models import load_tokenizer
from tests.models.tiny import save_tiny
from tests.training.pairs import run_data, write_pairs

# transformers moves batches to pinned memory when asked to, and warns on a machine without an accelerator.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@pytest.fixture
def base(tmp_path):
    return save_tiny(tmp_path / "base", seed=1)


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl")


@pytest.fixture
def score(falign, tiny, base, pairs, tmp_path):
    """Score the tiny model against another one; ``*arguments`` come on top."""

    def run(*arguments, model=tiny, file=pairs, out=tmp_path / "scores.jsonl", reference=base):
        against = [] if reference is None else ["--reference", reference, "--plain"]
        return falign("score", model, file, "--out", out, *against, "--max-length", 64, *arguments)

    return run


@pytest.fixture
def trained(falign, tiny, pairs, tmp_path):
    """Train a tiny run that evaluates on the rows it has trained on, and return its folder."""

    def run(**changes):
        data = {"eval": [{"path": str(pairs), "chat": False}], "eval_size": 0, "max_length": 64}
        content = run_data(tiny, pairs, tmp_path / "run", data=data, **changes)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        status, _, err = falign("train", tmp_path / "run.yaml")
        assert status == 0, err
        return tmp_path / "run"

    return run


def rows_of(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def mean(rows, name, preference):
    values = [row[name] for row in rows if row["preference"] == preference]
    return sum(values) / len(values)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": {"divergence": "alpha(0.3)", "length_norm": "token"}},
        {"objective": {"kind": "listwise"}},
        {"objective": {"kind": "token_pairwise", "divergence": "total_variation", "alpha": 0.2}},
        {"objective": {"kind": "token_pairwise", "divergence": "forward_kl", "variant": 1, "weighting": "activations"}},
        {"adapter": None, "training": {"learning_rate": 1e-3}},
    ],
    ids=["pairwise", "normalised", "listwise", "tdpo2", "tdpo1_weighted", "full"],
)
def test_a_runs_scores_on_its_rows_are_the_values_that_it_logged(falign, trained, pairs, tmp_path, changes):
    run, out = trained(**changes), tmp_path / "scores.jsonl"
    status, table, err = falign("score", run, pairs, "--out", out, "--tokens-per-batch", 300)
    assert status == 0, err
    logged = json.loads((run / "summary.json").read_text())["after"]
    rows = rows_of(out)
    assert len(rows) == 48
    for side, preference in (("chosen", 1.0), ("rejected", 0.0)):
        assert mean(rows, "implicit_reward", preference) == pytest.approx(logged[f"rewards/{side}"], abs=2e-5)
        assert mean(rows, "log_ratio", preference) == pytest.approx(logged[f"logratios/{side}"], abs=2e-5)
        logps = [sum(row["logprobs"]) for row in rows if row["preference"] == preference]
        assert sum(logps) / len(logps) == pytest.approx(logged[f"logps/{side}"], abs=1e-4)
    entropies = [value for row in rows for value in row["entropy"]]
    assert sum(entropies) / len(entropies) == pytest.approx(logged["entropy"], abs=2e-5)
    assert f"{logged['rewards/accuracies']:.1%} of 24 pairs" in table
    assert ("token_divergence" in rows[0]) == (changes.get("objective", {}).get("kind") == "token_pairwise")


def test_a_model_beside_a_reference(score, tmp_path):
    status, table, err = score("--divergence", "jensen_shannon", "--beta", "0.5")
    assert status == 0, err
    rows = rows_of(tmp_path / "scores.jsonl")
    assert "48" in table
    assert "reward accuracy" in table
    assert "layout: tree" in err
    assert max(row["implicit_reward"] for row in rows) < 0.5 * 0.6932
    assert rows[0]["place"].endswith("pairs.jsonl:1")
    assert {file.name for file in tmp_path.iterdir()} == {
        *("tiny", "base", "pairs.jsonl", "scores.jsonl", "scores.jsonl.sha256")
    }
    checksum = hashlib.sha256((tmp_path / "scores.jsonl").read_bytes()).hexdigest()
    assert (tmp_path / "scores.jsonl.sha256").read_text() == f"{checksum}  scores.jsonl\n"


def test_parquet_and_jsonl_and_both_layouts_agree(score, tmp_path):
    import pyarrow.parquet

    assert score()[0] == 0
    assert score("--layout", "padded", out=tmp_path / "scores.parquet")[0] == 0
    rows, others = rows_of(tmp_path / "scores.jsonl"), pyarrow.parquet.read_table(tmp_path / "scores.parquet")
    for row, other in zip(rows, others.to_pylist(), strict=True):
        assert row["token_ids"] == other["token_ids"]
        assert other["log_ratios"] == pytest.approx(row["log_ratios"], abs=2e-5)


def test_completions_without_preference_have_no_accuracy(score, tmp_path):
    file = tmp_path / "plain.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{i} ", "completion": "fine"}) + "\n" for i in range(5)))
    status, table, err = score(file=file)
    assert status == 0, err
    assert "accuracy" not in table
    assert {row["preference"] for row in rows_of(tmp_path / "scores.jsonl")} == {None}


def break_row(path, **fields):
    lines = path.read_text().splitlines()
    lines[19] = json.dumps({**json.loads(lines[19]), **fields})
    path.write_text("\n".join(lines) + "\n")


def test_a_bad_row_stops_with_its_place_and_the_call_goes_on_when_it_is_mended(score, pairs, tmp_path):
    assert score(out=tmp_path / "whole.jsonl")[0] == 0
    whole, good = rows_of(tmp_path / "whole.jsonl"), pairs.read_text()
    break_row(pairs, chosen=" ")
    status, _, err = score("--tokens-per-batch", 200)
    assert status == 2
    assert "pairs.jsonl:20" in err
    assert "'chosen' is empty" in err
    assert "Traceback" not in err
    assert not (tmp_path / "scores.jsonl").exists()
    pairs.write_text(good)
    status, table, err = score("--tokens-per-batch", 200)
    assert status == 0, err
    assert "scored by an earlier call" in table
    rows = rows_of(tmp_path / "scores.jsonl")
    assert [row["token_ids"] for row in rows] == [row["token_ids"] for row in whole]


def test_bad_rows_can_be_left_out_and_are_counted(score, pairs, tmp_path):
    break_row(pairs, chosen=" ")
    status, _, err = score("--bad-rows", "skip")
    assert status == 0, err
    assert "bad rows: 1" in err
    assert "pairs.jsonl:20" in err
    assert len(rows_of(tmp_path / "scores.jsonl")) == 46


def test_other_settings_do_not_go_on_with_what_is_there(score, pairs, tmp_path):
    break_row(pairs, chosen=" ")
    assert score("--tokens-per-batch", 200)[0] == 2
    status, _, err = score("--beta", "0.7", "--layout", "padded")
    assert status == 2
    assert "objective.beta (0.1 there, 0.7 now)" in err
    assert "layout ('tree' there, 'padded' now)" in err
    assert "--overwrite" in err
    status, _, err = score("--beta", "0.7", "--bad-rows", "skip", "--overwrite")
    assert status == 0, err
    assert not list(tmp_path.glob(".scores*"))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {"file": "missing.jsonl"}, "missing.jsonl: no such file"),
        ((), {"reference": None}, "give --reference MODEL"),
        ((), {"out": "scores.csv"}, "name it .jsonl or .parquet"),
        ((), {"out": "nowhere/scores.jsonl"}, "does not exist; create it"),
        (("--divergence", "pearson_chi2"), {}, "no closed form under pearson_chi2"),
        (("--divergence", "kl"), {}, "'reverse_kl'"),
        (("--beta", "0"), {}, "must be positive"),
        (("--format", "pears"), {}, "--format 'pears' is unknown"),
        (("--layout", "trees"), {}, "did you mean 'tree'"),
        (("--bad-rows", "ignore"), {}, "'skip'"),
        (("--dtype", "float23"), {}, "float23"),
        (("--columns", "{prompt: nothing}"), {}, "names a column that is missing"),
        (("--max-length", "8"), {}, "the prompt has"),
        (("--max-length", "4096"), {}, "2048 positions"),
        ((), {"model": "nowhere/at-all/here"}, "nowhere"),
    ],
)
def test_a_mistake_ends_with_status_2_and_a_remedy(score, tmp_path, monkeypatch, arguments, options, message):
    monkeypatch.chdir(tmp_path)
    before = {file.name for file in tmp_path.iterdir()}
    status, _, err = score(*arguments, **options)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert {file.name for file in tmp_path.iterdir()} == before


def test_an_existing_output_is_replaced_only_when_asked_for(score, tmp_path):
    (tmp_path / "scores.jsonl").write_text("mine")
    status, _, err = score()
    assert status == 2
    assert "--overwrite" in err
    assert (tmp_path / "scores.jsonl").read_text() == "mine"
    assert score("--overwrite")[0] == 0
    assert len(rows_of(tmp_path / "scores.jsonl")) == 48


def test_the_file_that_is_scored_is_not_overwritten(score, pairs):
    before = pairs.read_text()
    status, _, err = score("--overwrite", out=pairs)
    assert status == 2
    assert "give the scores another name" in err
    assert pairs.read_text() == before


def test_models_with_different_tokens_are_not_compared(score, base):
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    status, _, err = score()
    assert status == 2
    assert "different tokens: 'a' has the id" in err


@pytest.mark.parametrize("row", [0, 20], ids=["among_the_first", "later"])
def test_a_token_without_a_row_is_refused_with_its_place(score, tiny, base, pairs, row):
    for folder in (tiny, base):
        tokenizer = load_tokenizer(folder)
        tokenizer.add_tokens(["<tool>"])
        tokenizer.save_pretrained(folder)
    lines = pairs.read_text().splitlines(keepends=True)
    pairs.write_text("".join([*lines[:row], lines[row].replace("question", "<tool>"), *lines[row + 1 :]]))
    status, _, err = score("--tokens-per-batch", 300)
    assert status == 2
    assert f"pairs.jsonl:{row + 1}: a token has the id 260" in err
    assert "has 260 rows in its embeddings" in err


def test_a_run_is_scored_as_it_was_trained(falign, trained, pairs, tmp_path):
    run = trained(training={"max_steps": 1})
    options = ("--divergence", "js", "--beta", "0.2", "--reference", "base", "--dtype", "float32")
    status, _, err = falign("score", run, pairs, "--out", tmp_path / "scores.jsonl", *options)
    assert status == 2
    assert "--reference, --divergence, --beta, --dtype would change its rewards" in err
    shutil.rmtree(run / "adapter")
    status, _, err = falign("score", run, pairs, "--out", tmp_path / "scores.jsonl")
    assert status == 2
    assert "no trained model yet" in err


@pytest.mark.parametrize("adapter", [True, False])
def test_a_run_whose_configuration_has_changed_is_not_scored(falign, trained, tiny, pairs, tmp_path, adapter):
    run = trained(training={"max_steps": 1, "learning_rate": 1e-3}, **({} if adapter else {"adapter": None}))
    file = (tiny if adapter else run / "model") / "config.json"
    written = file.read_text()
    out = tmp_path / "scores.jsonl"
    for changes, message in (
        ({"rms_norm_eps": 0.3}, "has another configuration now than when"),
        ({"use_cache": False, "transformers_version": "4.0.0"}, None),
    ):
        file.write_text(json.dumps(json.loads(written) | changes))
        status, _, err = falign("score", run, pairs, "--out", out)
        assert status == (2 if message else 0), err
        assert message is None or (message in err and "restore its config.json" in err)


def test_a_run_whose_own_divergence_has_changed_is_not_scored(falign, trained, pairs, tmp_path, monkeypatch):
    module = tmp_path / "of_this_run.py"
    module.write_text('from falign import divergences\n\ndivergence = divergences.get("reverse_kl")\n')
    monkeypatch.chdir(tmp_path)
    run = trained(objective={"divergence": "of_this_run:divergence"}, training={"max_steps": 1})
    out = tmp_path / "scores.jsonl"
    status, _, err = falign("score", run, pairs, "--out", out, "--trust-code")
    assert status == 0, err
    out.unlink()
    module.write_text(module.read_text().replace("reverse_kl", "jensen_shannon"))
    status, _, err = falign("score", run, pairs, "--out", out, "--trust-code")
    assert (status, out.exists()) == (2, False)
    assert "was trained with another version of objective.divergence=of_this_run:divergence" in err
    assert "restore the module" in err


def test_a_killed_call_leaves_nothing_under_the_final_name_and_goes_on(score, tiny, base, pairs, tmp_path):
    write_pairs(pairs, n=600)
    out, partial = tmp_path / "scores.jsonl", tmp_path / ".scores.jsonl.partial.jsonl"
    code = "from falign.cli import main; main()"
    options = ["--out", out, "--reference", base, "--plain", "--max-length", 64, "--tokens-per-batch", 100]
    command = [sys.executable, "-c", code, "score", tiny, pairs, *options]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size > 10_000) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    status, table, err = score("--tokens-per-batch", 100)
    assert status == 0, err
    assert "scored by an earlier call" in table
    assert score("--tokens-per-batch", 100, out=tmp_path / "whole.jsonl")[0] == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_column_that_looks_like_the_prompt_can_be_ignored(score, tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "history": "we talked of ships"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    status, _, err = score(file=tmp_path / "rows.jsonl")
    assert (status, "or set --ignore history if it is not part of the prompt" in err) == (2, True)
    status, _, err = score("--ignore", "history", file=tmp_path / "rows.jsonl")
    assert status == 0, err


def test_a_prompt_that_is_too_long_names_the_options_that_there_are(score):
    _, _, err = score("--max-length", "8")
    assert "Raise --max-length; a run can also lower `max_completion_length`" in err

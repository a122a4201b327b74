"""Runs that are held to combinations of references."""

import pytest
import torch
from rich.console import Console

from falign.errors import ConfigError, ModelError
from falign.models import load_model
from falign.runfile import parse_run
from falign.runs.loading import load_trained
from falign.training import train
from falign.training.references import rebuild_reference
from tests.models.tiny import save_tiny
from tests.training.pairs import run_data, write_pairs

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@pytest.fixture
def run_file(tiny, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl")
    save_tiny(tmp_path / "teacher", seed=3)
    return lambda name, **changes: run_data(tiny, data, tmp_path / name, **changes)


def members(folder, **base):
    teacher = {"kind": "frozen", "path": str(folder / "teacher")}
    return {"teacher": teacher, "base": {"kind": "adapter_off", **base}}


def start(data, *, resume=False):
    return train(parse_run(data), console=Console(quiet=True), resume=resume)


def losses(summary):
    return [log["loss"] for log in summary.folder.metrics() if "loss" in log]


BEYOND = {"kind": "geometric", "weights": {"teacher": 1.25, "base": -0.25}}
HALVES = {"kind": "mixture", "weights": {"teacher": 0.5, "base": 0.5}}


def test_a_run_is_held_to_a_combination_and_evaluated_against_it_and_only_the_same_one_goes_on(run_file, tmp_path):
    given = {
        "references": {"reference": BEYOND, **members(tmp_path)},
        "measures": {"away": "divergence_to(forward_kl)"},
    }
    summary = start(run_file("run", **given))
    assert all(log["measures/away"] > 0 for log in summary.folder.metrics() if "loss" in log)
    manifest = summary.folder.read_json("manifest.json")
    assert manifest["reference"]["members"] == BEYOND["weights"]
    assert manifest["references"]["teacher"]["weights"] != manifest["references"]["base"]["weights"]
    policy, tokenizer, config, _ = load_trained(summary.folder, None)
    device = torch.device("cpu")
    found = rebuild_reference(config, policy, tokenizer, summary.folder, device=device)
    assert found.identity() == manifest["reference"]
    other = {"kind": "geometric", "weights": {"teacher": 1.5, "base": -0.5}}
    with pytest.raises(ConfigError, match="references"):
        start(run_file("run", references={"reference": other, **members(tmp_path)}), resume=True)
    load_model(save_tiny(tmp_path / "teacher", seed=4))
    with pytest.raises(ModelError, match=r"The teacher of .* holds other weights now than when the run was trained"):
        rebuild_reference(config, policy, tokenizer, summary.folder, device=device)


def test_the_cache_of_a_member_of_a_mixture_changes_nothing(run_file, tmp_path):
    live = start(run_file("live", references={"reference": HALVES, **members(tmp_path)}))
    stored = members(tmp_path, cache=str(tmp_path / "cache"))
    cached = start(run_file("cached", references={"reference": HALVES, **stored}))
    assert losses(cached) == pytest.approx(losses(live), abs=1e-6)
    manifest = cached.folder.read_json("manifest.json")
    assert manifest["references"]["base"]["kind"] == "cached"
    assert manifest["reference"]["weights"] == live.folder.read_json("manifest.json")["reference"]["weights"]


def test_members_move_under_their_own_names(run_file, tmp_path):
    moving = {"teacher": {"kind": "moving_average", "alpha": 0.5, "every": 2}, "base": {"kind": "adapter_off"}}
    summary = start(run_file("run", references={"reference": HALVES, **moving}))
    logs = [log for log in summary.folder.metrics() if "loss" in log]
    assert logs[-1]["teacher/moves"] > 1
    assert logs[0]["loss"] != logs[-1]["loss"]


NESTED = {"kind": "mixture", "weights": {"reference": 1.0}}


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (
            {"reference": {**HALVES, "weights": {"base": 0.5}}, "base": {}},
            r"references\.reference\.weights=.* sum to 0\.5",
        ),
        ({"reference": {**BEYOND, "weights": {"base": 1.25}}, "base": {}}, r"sum to 1\.25, .* add the base"),
        (
            {"reference": HALVES, "base": {}},
            r"reference\.weights names the reference 'teacher', and the run has base, ",
        ),
        (
            {"reference": {**HALVES, "weights": {"a": 1.0}}, "a": NESTED},
            r"references\.reference -> references\.a -> ref",
        ),
        ({"reference": {**BEYOND, "level": "sequence"}, "teacher": {}, "base": {}}, r"level=sequence: .* set level to"),
        (
            {"reference": HALVES, "teacher": {**BEYOND, "weights": {"base": 1}, "level": "sequence"}, "base": {}},
            r"references\.teacher is known only up to a factor per prompt .* and references\.reference needs",
        ),
        ({"reference": {**HALVES, "cache": "c"}, "teacher": {}, "base": {}}, "give those a cache, or leave it out"),
    ],
)
def test_combinations_that_are_no_distribution_are_refused_before_anything_is_loaded(run_file, references, message):
    with pytest.raises(ConfigError, match=message):
        parse_run(run_file("run", references=references)).check()


def test_a_single_reference_that_is_a_combination_has_no_members(run_file):
    with pytest.raises(ConfigError, match=r"names the reference 'teacher', and the run has reference: add it under"):
        parse_run(run_file("run", reference=HALVES)).check()


TEACHER_TOP = {"data_top": "top_k(forward_kl, k=8, reference=teacher, tail=bucket)"}


def test_the_most_likely_tokens_of_a_teacher_on_the_data_are_stored_once_and_stand_for_it(run_file, tmp_path):
    def run(name, measures=TEACHER_TOP, **stored):
        teacher = {"kind": "frozen", "path": str(tmp_path / "teacher"), **stored}
        return start(run_file(name, references={"reference": {}, "teacher": teacher}, measures=measures))

    stored = {"cache": str(tmp_path / "cache"), "cache_top_k": 8}
    live, cached = run("live"), run("cached", **stored)
    values = [[log["measures/data_top"] for log in each.folder.metrics() if "loss" in log] for each in (live, cached)]
    assert values[1] == pytest.approx(values[0], abs=1e-5)
    assert min(values[0]) > 0
    assert cached.folder.read_json("manifest.json")["references"]["teacher"]["top_k"] == 8
    for name, measure, message in (
        ("wider", "top_k(forward_kl, k=9, reference=teacher)", "store more tokens of the reference"),
        ("whole", "divergence_to(forward_kl, teacher)", "of which only the 8 most likely tokens are known"),
    ):
        folder = tmp_path / f"cache-{name}"
        with pytest.raises(ConfigError, match=message):
            run(name, {"m": measure}, **{**stored, "cache": str(folder)})
        (key,) = folder.iterdir()
        assert len(list(key.glob("shard-*"))) == 1, "refused after the first row"
    with pytest.raises(ConfigError, match=r"cache_top_k=8 without cache: give the folder too"):
        run("no-folder", cache_top_k=8)
    with pytest.raises(ConfigError, match=r"references.teacher.cache_top_k=100000 is more than the \d+ tokens of the"):
        run("too-many", **{**stored, "cache_top_k": 100000})
    with pytest.raises(
        ConfigError, match=r"measure 'm': k=100000 must be between 1 and the \d+ tokens of the vocabulary"
    ):
        run("too-wide", {"m": "top_k(forward_kl, k=100000, reference=teacher)"})

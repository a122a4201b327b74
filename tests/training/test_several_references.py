"""Runs that are held to several references by name."""

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from falign.errors import ConfigError, ModelError
from falign.models import add_lora, export_adapter, load_model, load_tokenizer
from falign.runfile import parse_run
from falign.training import train
from falign.training.trainer import AlignmentTrainer
from tests.models.tiny import fill_adapter, save_tiny
from tests.training.pairs import run_data, write_pairs

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

MEASURES = {"measures": {"away": "divergence_to(forward_kl, teacher)"}}


@pytest.fixture
def sft(tiny, tmp_path):
    adapted = fill_adapter(add_lora(load_model(tiny), r=2, alpha=4, seed=0), seed=0, scale=0.05)
    return str(export_adapter(adapted, load_tokenizer(tiny), tmp_path / "sft"))


@pytest.fixture
def run_file(tiny, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl")
    return lambda name, **changes: run_data(tiny, data, tmp_path / name, **changes)


def start(data, *, resume=False):
    return train(parse_run(data), console=Console(quiet=True), resume=resume)


def losses(summary):
    return {log["step"]: log["loss"] for log in summary.folder.metrics() if "loss" in log}


def test_each_reference_moves_is_saved_logged_hashed_and_taken_up_under_its_name(run_file, sft, monkeypatch):
    changes = {
        "references": {
            "reference": {"kind": "moving_average", "alpha": 0.4, "every": 2},
            "teacher": {"kind": "moving_average", "alpha": 0.9, "every": 3},
        },
        **MEASURES,
        "training": {"save_steps": 2},
    }
    whole = start(run_file("whole", **changes))
    logs = {log["step"]: log for log in whole.folder.metrics() if "loss" in log}
    assert [logs[step]["reference/moves"] for step in (2, 3, 7)] == [0, 1, 3]
    assert [logs[step]["teacher/moves"] for step in (3, 4, 7)] == [0, 1, 2]
    assert logs[8]["measures/away"] > 0
    manifest = whole.folder.read_json("manifest.json")
    assert (manifest["reference"]["alpha"], manifest["references"]["teacher"]["alpha"]) == (0.4, 0.9)
    assert manifest["inputs"]["hashes"]["references"]["teacher"]["config"] == manifest["base_config"]
    kept = [whole.folder.reference_state(name) / "reference.safetensors" for name in ("reference", "teacher")]
    states = [load_file(file) for file in kept]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not [name for name in load_file(whole.folder.adapter / "adapter_model.safetensors") if ".ref" in name]

    original = AlignmentTrainer.compute_loss

    def dies(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AlignmentTrainer, "compute_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            start(run_file("broken", **changes))
    checkpoint = whole.folder.path.parent / "broken" / "checkpoint-4"
    assert (checkpoint / "reference.safetensors").is_file()
    assert (checkpoint / "references" / "teacher" / "reference.safetensors").is_file()
    assert {entry.name for entry in checkpoint.iterdir() if entry.is_dir()} == {"references"}
    resumed = start(run_file("broken", **changes), resume=True)
    assert losses(resumed) == losses(whole)
    assert resumed.after == whole.after
    assert resumed.folder.read_json("manifest.json")["references"] == manifest["references"]


def test_one_reference_under_its_name_is_the_run_with_the_section_of_one(run_file, sft):
    one = {"kind": "adapter", "path": sft}
    plain, named = start(run_file("plain", reference=one)), start(run_file("named", references={"reference": one}))
    assert losses(named) == losses(plain)
    assert "reference" not in named.folder.read_run_file()
    records = [run.folder.read_json("manifest.json") for run in (plain, named)]
    assert records[0]["reference"] == records[1]["reference"]


def test_a_teacher_with_more_rows_in_its_head_is_cut_with_all_others(run_file, sft, tmp_path):
    teacher = load_model(save_tiny(tmp_path / "teacher", seed=3))
    plain = start(run_file("plain", references={"reference": {}, "teacher": frozen(tmp_path)}, **MEASURES))
    torch.manual_seed(3)
    teacher.resize_token_embeddings(304, mean_resizing=False)
    teacher.save_pretrained(tmp_path / "teacher")
    padded = start(run_file("padded", references={"reference": {}, "teacher": frozen(tmp_path)}, **MEASURES))
    assert losses(padded) == pytest.approx(losses(plain), abs=1e-6)
    away = [[log["measures/away"] for log in run.folder.metrics() if "loss" in log] for run in (plain, padded)]
    assert away[1] == pytest.approx(away[0], abs=1e-5)


def frozen(folder):
    return {"kind": "frozen", "path": str(folder / "teacher")}


TEACHER = {"references": {"reference": {}, "teacher": {"kind": "frozen", "path": "x"}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**TEACHER, "reference": {"kind": "auto"}}, "reference and references exclude each other: write the one"),
        (TEACHER, r"references.teacher: neither objective.kind=pairwise nor a measure reads a reference of this name"),
        (
            MEASURES,
            r"^measures\.\w+ reads the reference 'teacher', and the run has reference: add it under references, as",
        ),
        (
            {"references": {"reference": {}, "techer": {}}, **MEASURES},
            r"has reference, techer: is 'techer' the one that is meant\? Give both the same name; or add it under",
        ),
        ({"references": {"teacher": {}}, **MEASURES}, "reads the reference 'reference', and the run has teacher"),
        ({"references": {"My teacher": {}}}, r"references\.My teacher: a name is a lower-case letter"),
        ({"references": {"reference": {"kind": "soup", "paths": ["a"]}}}, "references.reference: a soup of 1"),
        ({"references": {"reference": {"kind": "frozn"}}}, "references.reference.kind='frozn' is unknown: did you"),
        (
            {"references": {"teacher": {"kind": "frozen", "alpha": 1}}},
            "references.teacher.kind=frozen has no such field",
        ),
    ],
)
def test_references_that_contradict_each_other_or_the_objective_are_refused_with_the_remedy(run_file, changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_run(run_file("run", **changes)).check()


def test_a_model_of_a_reference_that_is_missing_or_a_run_is_refused_with_its_field(run_file, tmp_path):
    data = run_file(
        "run", **MEASURES, references={"reference": {}, "teacher": {"kind": "frozen", "path": "no/such/one"}}
    )
    with pytest.raises(ModelError, match=r"^references\.teacher: no/such/one does not exist"):
        parse_run(data).require_files()
    (tmp_path / "old" / "adapter").mkdir(parents=True)
    (tmp_path / "old" / "adapter" / "adapter_config.json").write_text("{}")
    data["references"]["teacher"]["path"] = str(tmp_path / "old")
    with pytest.raises(
        ModelError, match=r"old has no config.json.* holds an adapter, in adapter/: give it .* export RUN"
    ):
        start(data)


def test_a_measure_of_ones_own_that_reads_a_missing_reference_is_refused_before_anything_is_loaded(run_file):
    config = parse_run(
        run_file("run", model={"path": "nowhere"}, measures={"t": "tests.runfile.own_members:OfTeacher"})
    )
    with pytest.raises(
        ConfigError, match=r"^measures\.t reads the reference 'teacher', and the run has reference: add"
    ):
        train(config, console=Console(quiet=True))


def test_an_own_reference_that_is_none_is_told_what_it_must_define(run_file):
    with pytest.raises(ConfigError, match=r"subclass of falign's Reference that defines identity, logprobs, states\."):
        start(run_file("run", reference={"kind": "tests.runfile.own_members:Bare"}))


def test_an_objective_that_reads_no_reference_needs_none_of_that_name(run_file, tmp_path):
    save_tiny(tmp_path / "teacher", seed=3)
    teacher = {"references": {"teacher": frozen(tmp_path)}, **MEASURES}
    summary = start(run_file("run", objective={"kind": "supervised", "divergence": None, "beta": None}, **teacher))
    manifest = summary.folder.read_json("manifest.json")
    assert manifest["reference"] == {}
    assert manifest["references"]["teacher"]["kind"] == "frozen_model"
    assert all(log["measures/away"] > 0 for log in summary.folder.metrics() if "loss" in log)


def test_a_reference_of_ones_own_is_named_in_a_run_file_and_takes_its_settings(run_file):
    own = {"kind": "tests.references.own:Shifted", "shift": 0.25}
    base, shifted = start(run_file("base")), start(run_file("shifted", reference=own))
    identity = shifted.folder.read_json("manifest.json")["reference"]
    assert identity["kind"] == "shifted"
    gap = shifted.before["logratios/chosen"] - base.before["logratios/chosen"]
    assert gap > 0.25  # per token, and a completion has several
    assert "tests.references.own:Shifted" in shifted.folder.read_inputs()["hashes"]["objective_code"]
    with pytest.raises(ConfigError, match=r"reference\.shft.*did you mean shift"):
        start(run_file("typo", reference={"kind": own["kind"], "shft": 1}))

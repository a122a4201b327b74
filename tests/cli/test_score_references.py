"""``falign score`` on runs against references that have to be built again."""

import json
import shutil

import pytest
import yaml

from falign.models import add_lora, export_adapter, load_model, load_tokenizer
from tests.models.tiny import fill_adapter, save_tiny
from tests.training.pairs import run_data, write_pairs

# transformers moves batches to pinned memory when asked to, and warns on a machine without an accelerator.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

FULL = {"adapter": None, "training": {"learning_rate": 1e-3}}


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FALIGN_CACHE", str(tmp_path / "made"))


@pytest.fixture
def trained(falign, tiny, tmp_path):
    """Train a tiny run that evaluates on the rows it has trained on, and return its folder and those rows."""
    pairs = write_pairs(tmp_path / "pairs.jsonl")

    def run(**changes):
        data = {"eval": [{"path": str(pairs), "chat": False}], "eval_size": 0, "max_length": 64}
        content = run_data(tiny, pairs, tmp_path / "run", data=data, **changes)
        if "init" in (content["adapter"] or {}):
            content["adapter"] = {"init": content["adapter"]["init"]}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        status, _, err = falign("train", tmp_path / "run.yaml")
        assert status == 0, err
        return tmp_path / "run", pairs

    return run


@pytest.fixture
def sft(tiny, tmp_path):
    folders = []
    for i, rank in enumerate((2, 3)):
        adapted = fill_adapter(add_lora(load_model(tiny), r=rank, alpha=2 * rank, seed=i), seed=i, scale=0.05)
        folders.append(str(export_adapter(adapted, load_tokenizer(tiny), tmp_path / f"sft{i}")))
    return folders


@pytest.mark.parametrize(
    "kind", ["init", "adapter", "soup", "checkpoints", "average", "average_full", "reset", "cached_soup"]
)
def test_scores_on_a_runs_rows_are_the_values_that_it_logged(falign, trained, sft, tmp_path, kind):
    soup = {"kind": "soup", "paths": sft, "weights": [0.3, 0.7]}
    checkpoints = [str(save_tiny(tmp_path / f"c{seed}", seed=seed)) for seed in (0, 1)]
    changes = {
        "init": {"adapter": {"init": sft[0]}},
        "adapter": {"reference": {"kind": "adapter", "path": sft[0]}},
        "soup": {"adapter": {"init": sft[0]}, "reference": soup},
        "checkpoints": {"reference": {"kind": "soup", "paths": checkpoints}},
        "average": {"reference": {"kind": "moving_average", "alpha": 0.4, "every": 2}},
        "average_full": {**FULL, "reference": {"kind": "moving_average", "alpha": 0.4, "every": 2}},
        "reset": {"reference": {"kind": "periodic_reset", "every": 3}},
        "cached_soup": {"reference": {**soup, "cache": str(tmp_path / "cache")}},
    }[kind]
    run, pairs = trained(**changes)
    status, _, err = falign("score", run, pairs, "--out", tmp_path / "scores.jsonl")
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    logged = json.loads((run / "summary.json").read_text())["after"]
    for side, preference in (("chosen", 1.0), ("rejected", 0.0)):
        ratios = [row["log_ratio"] for row in rows if row["preference"] == preference]
        assert sum(ratios) / len(ratios) == pytest.approx(logged[f"logratios/{side}"], abs=2e-5)
    status, _, err = falign("report", run)
    assert status == 0, err
    if kind in ("soup", "average"):
        for form in ("adapter", "merged"):
            status, _, err = falign("export", run, "--format", form)
            assert status == 0, err
        assert not list((run / "export").rglob("ref"))


def test_a_reference_that_changed_or_is_gone_is_no_reference(falign, trained, sft, tmp_path):
    run, pairs = trained(reference={"kind": "adapter", "path": sft[0]})
    weights = f"{sft[0]}/adapter_model.safetensors"
    shutil.move(weights, tmp_path / "kept")
    status, _, err = falign("score", run, pairs, "--out", tmp_path / "scores.jsonl")
    assert status == 2
    assert "sft0 has no adapter_model.safetensors" in err
    adapted = fill_adapter(add_lora(load_model(tmp_path / "tiny"), r=2, alpha=4, seed=0), seed=9, scale=0.05)
    export_adapter(adapted, load_tokenizer(tmp_path / "tiny"), sft[0], overwrite=True)
    status, _, err = falign("score", run, pairs, "--out", tmp_path / "scores.jsonl")
    assert status == 2
    assert "holds other weights now than when the run was trained" in err

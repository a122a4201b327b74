"""Whole runs of a tiny model against each kind of reference."""

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from falign.errors import ConfigError, ModelError
from falign.models import add_lora, describe, export_adapter, load_adapter, load_model, load_tokenizer, weights_hash
from falign.runfile import parse_run
from falign.training import train
from falign.training.references import build_references, rebuild_reference
from falign.training.trainer import AlignmentTrainer
from tests.models.tiny import fill_adapter, save_tiny, swap_tokens
from tests.training.pairs import run_data, write_pairs

# transformers moves batches to pinned memory when asked to, and warns on a machine without an accelerator.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

AVERAGE = {"kind": "moving_average", "alpha": 0.4, "every": 2}
RESET = {"kind": "periodic_reset", "every": 3, "reset_optimizer": True}
FULL = {"adapter": None, "training": {"learning_rate": 1e-3}}


@pytest.fixture
def sft(tiny, tmp_path):
    """Two adapters that stand in for supervised tuning, of different ranks."""
    folders = []
    for i, rank in enumerate((2, 3)):
        adapted = fill_adapter(add_lora(load_model(tiny), r=rank, alpha=2 * rank, seed=i), seed=i, scale=0.05)
        folders.append(str(export_adapter(adapted, load_tokenizer(tiny), tmp_path / f"sft{i}")))
    return folders


@pytest.fixture
def start(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("FALIGN_CACHE", str(tmp_path / "made"))
    data = write_pairs(tmp_path / "pairs.jsonl")

    def run(name="run", console=Console(quiet=True), resume=False, init=None, **changes):  # noqa: B008
        run = run_data(tiny, data, tmp_path / name, **changes)
        if init is not None:
            run["adapter"] = {"init": init}
        return train(parse_run(run), console=console, resume=resume)

    return run


def losses(folder):
    return {log["step"]: log["loss"] for log in folder.metrics() if "loss" in log}


def first_log(summary):
    return next(log for log in summary.folder.metrics() if log["step"] == 1 and "loss" in log)


def kinds(sft, tmp_path):
    """Each reference with what the policy starts from, and whether it starts at the reference."""
    checkpoints = [str(save_tiny(tmp_path / f"c{seed}", seed=seed)) for seed in (0, 1)]
    return {
        "adapter": ({"reference": {"kind": "adapter", "path": sft[0]}}, False),
        "init": ({"init": sft[0], "reference": {"kind": "auto"}}, True),
        "soup": ({"init": sft[0], "reference": {"kind": "soup", "paths": sft, "weights": [0.3, 0.7]}}, False),
        "checkpoints": ({"reference": {"kind": "soup", "paths": checkpoints}}, False),
        "average": ({"reference": AVERAGE}, True),
        "average_init": ({"init": sft[0], "reference": {**AVERAGE, "rank": 7}}, True),
        "average_full": ({**FULL, "reference": AVERAGE}, True),
        "reset": ({"reference": RESET}, True),
        "reset_full": ({**FULL, "reference": RESET}, True),
    }


KINDS = ["adapter", "init", "soup", "checkpoints", "average", "average_init", "average_full", "reset", "reset_full"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_reference_trains_resumes_bit_for_bit_and_leaves_only_the_policy(start, sft, tmp_path, monkeypatch, kind):
    changes, same_at_start = kinds(sft, tmp_path)[kind]
    changes = {**changes, "training": {**changes.get("training", {}), "save_steps": 2}}
    whole = start("whole", **changes)
    assert whole.after["rewards/margins"] > whole.before["rewards/margins"] or "reset" in kind
    log = first_log(whole)
    assert (max(abs(log["logratios/chosen"]), abs(log["logratios/rejected"])) < 1e-5) == same_at_start

    original = AlignmentTrainer.compute_loss

    def dies(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AlignmentTrainer, "compute_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            start("broken", **changes)
    resumed = start("broken", resume=True, **changes)
    assert losses(resumed.folder) == losses(whole.folder)
    assert resumed.after == whole.after
    assert (
        resumed.folder.read_json("manifest.json")["reference"] == whole.folder.read_json("manifest.json")["reference"]
    )

    for folder in (whole.folder.path, resumed.folder.path):
        assert not list(folder.rglob("ref"))
        for file in folder.rglob("adapter_model.safetensors"):
            assert not [name for name in load_file(file) if ".ref." in name]
    kept = whole.folder.reference_state() / "reference.safetensors"
    assert kept.is_file() == kind.startswith(("average", "reset"))


@pytest.mark.parametrize("kind", ["adapter", "soup", "checkpoints", "average"])
def test_layouts_and_caches_change_nothing(start, sft, tmp_path, kind):
    changes, _ = kinds(sft, tmp_path)[kind]
    tree, padded = (start(layout, **changes, training={"layout": layout}) for layout in ("tree", "padded"))
    assert losses(tree.folder) == pytest.approx(losses(padded.folder), abs=1e-5)
    if kind != "average":
        changes = {**changes, "reference": {**changes["reference"], "cache": str(tmp_path / "cache")}}
        cached = start("cached", **changes)
        assert losses(cached.folder) == pytest.approx(losses(tree.folder), abs=1e-5)
        identity = cached.folder.read_json("manifest.json")["reference"]
        assert identity["kind"] == "cached"
        assert identity["reference"]["kind"] == ("adapter" if kind == "adapter" else "soup")


@pytest.mark.parametrize("reference", ["adapter", "soup", "average"])
def test_whole_distributions_of_every_reference(start, sft, tmp_path, reference):
    changes, _ = kinds(sft, tmp_path)[reference]
    summary = start(**changes, objective={"kind": "token_pairwise", "alpha": 0.2})
    assert summary.after["divergence/rejected"] > 0
    assert summary.after["rewards/margins"] > summary.before["rewards/margins"]


def test_the_policy_of_a_soup_run_starts_from_the_first_member(start, sft, tiny):
    summary = start(init=sft[0], reference={"kind": "soup", "paths": sft}, training={"learning_rate": 1e-12})
    kept, own = (load_adapter(load_model(tiny), path, trainable=False) for path in (summary.folder.adapter, sft[0]))
    ids = torch.tensor([[4, 9, 100]])
    with torch.no_grad():
        torch.testing.assert_close(kept(ids).logits, own(ids).logits, rtol=0, atol=1e-6)
    assert summary.before["logratios/chosen"] != 0.0
    identity = summary.folder.read_json("manifest.json")["reference"]
    assert [member["path"] for member in identity["members"]] == sft
    assert [member["weight"] for member in identity["members"]] == [0.5, 0.5]
    assert len(identity["weights"]) == 64


def test_the_soup_with_all_weight_on_the_start_is_the_run_against_the_start_bit_for_bit(start, sft):
    soup = start("soup", init=sft[0], reference={"kind": "soup", "paths": sft, "weights": [1.0, 0.0]})
    plain = start("plain", init=sft[0])
    assert losses(soup.folder) == losses(plain.folder)
    assert soup.after == plain.after


def test_a_moving_average_is_behind_the_policy_by_what_alpha_says(start, tiny):
    """With α = 1 and a move before every step, the reference is the policy of one step before."""
    summary = start(reference={"kind": "moving_average", "alpha": 1.0, "every": 1})
    logs = [log for log in summary.folder.metrics() if "loss" in log]
    assert [log["reference/moves"] for log in logs] == list(range(8))
    assert all(abs(log["logratios/chosen"]) < 1e-5 for log in logs)  # measured before each step
    assert all(log["reference/truncation"] < 1e-6 for log in logs[1:])
    far = start("far", reference={"kind": "moving_average", "alpha": 0.01, "every": 1})
    assert abs(far.after["logratios/rejected"]) > 5 * abs(summary.after["logratios/rejected"])
    identity = far.folder.read_json("manifest.json")["reference"]
    assert identity["kind"] == "moving_average"
    assert identity["moves"] == 7
    assert (identity["alpha"], identity["every"], identity["rank"]) == (0.01, 1, None)


def test_what_is_measured_at_a_step_is_measured_before_the_reset(start):
    summary = start(reference={"kind": "periodic_reset", "every": 4}, training={"eval_steps": 4})
    evaluations = {log["step"]: log for log in summary.folder.metrics() if "eval_loss" in log}
    steps = {log["step"]: log for log in summary.folder.metrics() if "loss" in log}
    assert evaluations[4]["eval_rewards/margins"] > 0.01
    assert evaluations[8]["eval_rewards/margins"] > 0.01
    assert steps[5]["logratios/chosen"] == steps[5]["logratios/rejected"] == 0.0  # the first after it
    assert (steps[4]["reference/moves"], steps[5]["reference/moves"], steps[8]["reference/moves"]) == (0, 1, 1)


def test_the_optimizer_forgets_at_a_reset_when_asked_to(start):
    settings = {"kind": "periodic_reset", "every": 4}
    kept, forgot = (start(str(flag), reference={**settings, "reset_optimizer": flag}) for flag in (False, True))
    before = {step: loss for step, loss in losses(kept.folder).items() if step <= 5}
    assert {step: losses(forgot.folder)[step] for step in before} == before
    assert losses(kept.folder)[6] != losses(forgot.folder)[6]


def test_a_finished_run_gives_back_the_reference_of_its_last_step(start, tiny, sft):
    summary = start(init=sft[0], reference=AVERAGE)
    config = parse_run(summary.folder.read_run_file())
    policy = load_adapter(load_model(tiny), summary.folder.adapter, trainable=False)
    reference = rebuild_reference(config, policy, load_tokenizer(tiny), summary.folder, device=torch.device("cpu"))
    assert reference.identity() == summary.folder.read_json("manifest.json")["reference"]
    assert weights_hash(policy, adapter="ref") != weights_hash(policy, adapter="default")
    shutil.rmtree(summary.folder.reference_state())
    again = load_adapter(load_model(tiny), summary.folder.adapter, trainable=False)
    with pytest.raises(ConfigError, match="has no last state of its moving reference"):
        rebuild_reference(config, again, load_tokenizer(tiny), summary.folder, device=torch.device("cpu"))


def test_a_reference_that_was_overwritten_since_is_refused(start, tiny, sft):
    summary = start(reference={"kind": "adapter", "path": sft[0]})
    config = parse_run(summary.folder.read_run_file())
    shutil.copy(f"{sft[1]}/adapter_model.safetensors", f"{sft[0]}/adapter_model.safetensors")
    shutil.copy(f"{sft[1]}/adapter_config.json", f"{sft[0]}/adapter_config.json")
    policy = load_adapter(load_model(tiny), summary.folder.adapter, trainable=False)
    with pytest.raises(ModelError, match=r"reference of .*run \(adapter\) holds other weights now"):
        rebuild_reference(config, policy, load_tokenizer(tiny), summary.folder, device=torch.device("cpu"))


def test_runs_stand_for_their_adapters(start, tiny):
    first = start("first", training={"max_steps": 2})
    second = start("second", init=str(first.folder.path), training={"max_steps": 2})
    assert second.folder.read_json("manifest.json")["reference"]["kind"] == "adapter"
    assert first_log(second)["logratios/chosen"] == 0.0
    members = [str(first.folder.path), str(second.folder.path)]
    third = start("third", reference={"kind": "soup", "paths": members}, training={"max_steps": 1})
    assert len(third.folder.read_json("manifest.json")["reference"]["members"]) == 2


@pytest.mark.parametrize("how", ["init", "reference", "folder"])
def test_the_adapter_of_a_run_that_was_changed_since_is_refused_before_anything_is_loaded(start, how, tmp_path):
    first = start("first", training={"max_steps": 1})
    weights = first.folder.adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    run = str(first.folder.path)
    changes = {
        "init": {"init": run},
        "reference": {"reference": {"kind": "adapter", "path": run}},
        "folder": {"init": f"{run}/adapter"},
    }[how]
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is not what .*first has trained"):
        start("second", **changes)
    assert not (tmp_path / "second").exists()


def test_an_initial_adapter_brings_its_rank_scale_and_targets_to_the_result(start, sft):
    summary = start(init=sft[1], training={"max_steps": 1})
    config = json.loads((summary.folder.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    assert summary.folder.read_run_file()["adapter"] == {"dropout": 0.0, "init": sft[1]}


def test_adapters_as_reference_of_a_policy_that_trains_all_weights_are_refused(start, sft, tmp_path):
    with pytest.raises(ConfigError, match=r"reference.kind=adapter with adapter=null"):
        start(**FULL, reference={"kind": "adapter", "path": sft[0]})
    with pytest.raises(ConfigError, match=r"reference.kind=soup of adapters with adapter=null"):
        start(**FULL, reference={"kind": "soup", "paths": sft})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["frozen", "soup"])
def test_a_reference_with_other_token_ids_is_refused_with_the_first_of_them(start, tmp_path, kind):
    others = [save_tiny(tmp_path / f"other{seed}", seed=seed) for seed in (1, 2)]
    for other in others:
        swap_tokens(other, "a", "b")
    where = {"frozen": {"path": str(others[0])}, "soup": {"paths": [str(other) for other in others]}}[kind]
    with pytest.raises(
        ConfigError, match=r"reference\.paths?=.*other.* have different tokens: 'a' has the id 68 .* and 69"
    ):
        start(reference={"kind": kind, **where})


@pytest.mark.parametrize("lacking", ["policy", "reference"])
def test_a_token_without_a_row_is_refused_before_weights_are_loaded(start, tiny, tmp_path, monkeypatch, lacking):
    other = save_tiny(tmp_path / "other", seed=1)
    for folder in (tiny, other):
        tokenizer = load_tokenizer(folder)
        tokenizer.add_tokens(["question"])
        tokenizer.save_pretrained(folder)
    if lacking == "reference":
        padded(tiny, 261)
        load_tokenizer(other).save_pretrained(tiny)
    monkeypatch.setattr("falign.models.load_model", lambda *args, **options: pytest.fail("weights were loaded"))
    name = "tiny" if lacking == "policy" else "other"
    with pytest.raises(
        ModelError, match=rf"pairs\.jsonl:1: token 'question' has the id 260, and .*{name} has 260 rows"
    ):
        start(reference={"kind": "frozen", "path": str(other)})


def padded(folder, rows, seed=1):
    """Save a model with more rows than there are tokens, as checkpoints whose vocabulary is padded have them."""
    model = load_model(save_tiny(folder, seed=seed))
    torch.manual_seed(seed)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.get_output_embeddings().weight.data[260:] += 3.0  # no small share of the softmax
    model.save_pretrained(folder)
    return folder


TDPO = {"kind": "token_pairwise", "alpha": 0.2}


@pytest.mark.parametrize("larger", ["reference", "policy"])
@pytest.mark.parametrize("objective", [{}, TDPO], ids=["pairs", "whole_distributions"])
def test_padded_heads_are_cut_to_the_ids_that_both_have(start, tiny, tmp_path, larger, objective):
    """The padded model gives what the same model without its padding gives."""
    other = save_tiny(tmp_path / "other", seed=1)
    reference = {"reference": {"kind": "frozen", "path": str(other)}, "objective": objective}
    plain = start("plain", **reference)
    if larger == "reference":
        padded(other, 304)
    else:
        padded(tiny, 304, seed=0)
    cut = start("cut", told := Console(file=io.StringIO(), width=300), **reference)
    tells = "head: the policy has 304 rows and the reference 260, so both distributions are over the first 260 ids."
    assert (tells in told.file.getvalue()) == (larger == "policy")
    assert losses(cut.folder) == pytest.approx(losses(plain.folder), abs=1e-5)
    assert cut.after == pytest.approx(plain.after, abs=1e-4)
    if not objective:
        cache = {"reference": {**reference["reference"], "cache": str(tmp_path / "cache")}}
        assert losses(start("cached", **cache).folder) == pytest.approx(losses(plain.folder), abs=1e-5)


def test_a_reference_has_its_own_type_and_quantization(start, tiny, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1, dtype=torch.bfloat16)

    def reference_of(policy, **fields):
        config = parse_run(run_data(tiny, "none.jsonl", tmp_path / "r", model={"path": str(tiny), **policy}, **fields))
        found = build_references(config, config.model.build(), load_tokenizer(tiny), device=torch.device("cpu"))
        return found["reference"].model

    def kind(model):
        return str(model.dtype), describe(model).quantization

    own = {"kind": "frozen", "path": str(other)}
    assert kind(reference_of({"quantization": "nf4"}, reference=own)) == ("torch.bfloat16", None)
    assert kind(reference_of({"dtype": "float16"}, reference={**own, "dtype": "float32"})) == ("torch.float32", None)
    assert kind(reference_of({}, reference={**own, "quantization": "nf4"}))[1] == "nf4"
    assert kind(reference_of({"quantization": "nf4"}, reference={"kind": "frozen"}))[1] == "nf4"
    with pytest.raises(ConfigError, match=r"quantization applies only to a reference with its own path"):
        reference_of({}, reference={"kind": "frozen", "quantization": "nf4"})
    # The same checkpoint in another type is no longer the policy before its first step.
    config = run_data(tiny, "none.jsonl", tmp_path / "r", reference={**own, "path": str(tiny), "dtype": "bfloat16"})
    assert not starts_as_policy(config)
    config["reference"].pop("dtype")
    assert starts_as_policy(config)


def starts_as_policy(data):
    config = parse_run(data)
    return config.reference_sections()["reference"].starts_as_policy(config)


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": 40.0, "rope_type": "default"}},
        {"rms_norm_eps": 0.3},
        {"hidden_act": "relu"},
    ],
)
def test_a_cache_belongs_to_the_configuration_of_its_reference(start, tmp_path, changes):
    other = save_tiny(tmp_path / "other", seed=1)

    def first_loss(name, **reference):
        return losses(start(name, reference={"kind": "frozen", "path": str(other), **reference}).folder)[1]

    cache = {"cache": str(tmp_path / "cache")}
    before = first_loss("before", **cache)
    change_config(other, **changes)
    live, cached = first_loss("live"), first_loss("cached", **cache)
    assert cached == pytest.approx(live, abs=1e-5)
    assert abs(live - before) > 1e-3


@pytest.mark.parametrize("kind", ["frozen", "average_full"])
def test_a_reference_whose_configuration_changed_is_refused(start, tiny, tmp_path, kind):
    other = save_tiny(tmp_path / "other", seed=1)
    if kind == "frozen":
        summary = start(reference={"kind": "frozen", "path": str(other)}, training={"max_steps": 1})
    else:
        summary = start(**{**FULL, "training": {**FULL["training"], "max_steps": 1}}, reference=AVERAGE)
    config = parse_run(summary.folder.read_run_file())
    policy = load_model(summary.folder.weights if kind == "average_full" else tiny)
    change_config(other if kind == "frozen" else tiny, rms_norm_eps=0.3)
    with pytest.raises(ModelError, match=r"configuration of the reference .* restore config\.json"):
        rebuild_reference(config, policy, load_tokenizer(tiny), summary.folder, device=torch.device("cpu"))

"""Whole runs of a tiny model through the real trainer, PEFT and files."""

import errno
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from falign.errors import ConfigError, FalignError, ModelError, TrainingError
from falign.models import load_adapter, load_model
from falign.runfile import parse_run
from falign.runs import RunFolder
from falign.training import train
from tests.models.tiny import VOCABULARY, save_tiny, tiny_tokenizer
from tests.training.pairs import run_data, write_pairs

# transformers moves batches to pinned memory when asked to, and warns on a machine without an accelerator.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@pytest.fixture
def start(tiny, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl")

    def run(name="run", resume=False, **changes):
        config = parse_run(run_data(tiny, data, tmp_path / name, **changes))
        return train(config, console=Console(quiet=True), resume=resume)

    return run


def losses(folder):
    return {log["step"]: log["loss"] for log in folder.metrics() if "loss" in log}


def test_a_run_learns_the_preference_and_leaves_a_whole_folder(start):
    summary = start()
    assert summary.before["rewards/accuracies"] == 0.5
    assert summary.before["rewards/margins"] == 0.0
    assert summary.after["rewards/accuracies"] >= 0.8
    assert summary.after["rewards/margins"] > 0.1
    assert summary.after["loss"] < summary.before["loss"] == pytest.approx(0.693147, abs=1e-6)
    files = {path.name for path in summary.folder.path.iterdir()}
    assert files == {
        *("run.yaml", "manifest.json", "rows.txt", "metrics.jsonl", "before.json", "summary.json", "samples.json"),
        *("adapter", "curves.png"),
        *(path.name for path in summary.folder.adapter.iterdir()),  # shown at the top
    }
    manifest = summary.folder.read_json("manifest.json")
    assert manifest["reference"]["kind"] == "adapter_off"
    assert len(manifest["reference"]["weights"]) == 64
    assert manifest["data"]["num_eval"] == 6
    assert [sample.prompt for sample in summary.samples] == ["question 1: "]


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "listwise"},
        {"kind": "token_pairwise", "alpha": 0.2},
        {"kind": "token_pairwise", "divergence": "total_variation", "variant": 1, "weighting": "activations"},
        {"kind": "token_pairwise", "variant": 1, "weighting": "mapo"},
    ],
    ids=["listwise", "tdpo2", "tdpo1_weighted", "mapo"],
)
def test_every_kind_of_objective_learns_the_preference_from_its_run_file(start, objective):
    summary = start(objective=objective)
    assert summary.after["rewards/accuracies"] >= 0.8
    assert summary.after["loss"] < summary.before["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert ("rewards/top1" in summary.after) == (objective["kind"] == "listwise")
    assert ("divergence/rejected" in summary.after) == (objective["kind"] == "token_pairwise")
    assert summary.folder.read_json("manifest.json")["objective"].items() >= objective.items()


def test_a_model_without_the_activations_of_the_mapo_mask_is_refused_before_training(tmp_path, start):
    config = AutoConfig.for_model(
        "gpt_neox",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "neox")
    tiny_tokenizer().save_pretrained(tmp_path / "neox")
    with pytest.raises(ModelError, match=r"GPTNeoXForCausalLM: the MaPO mask .* Set weighting to activations or none"):
        start(
            model={"path": str(tmp_path / "neox")},
            objective={"kind": "token_pairwise", "variant": 1, "weighting": "mapo"},
        )
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_ranked_lists_with_ties_are_learned_from_a_file_in_one_tree_each(tiny, tmp_path):
    rows = [
        {"prompt": f"question {i}: ", "completions": ["kindly", "thanks", "so so", "go away"], "ranks": [1, 1, 2, 3]}
        for i in range(24)
    ]
    data = tmp_path / "lists.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_data(tiny, data, tmp_path / "run", objective={"kind": "listwise"}, training={"max_steps": 12})
    summary = train(parse_run(run), console=Console(quiet=True))
    assert summary.folder.read_json("manifest.json")["layout"] == "tree"
    assert summary.before["rewards/accuracies"] == 0.5
    assert summary.after["rewards/accuracies"] > 0.9
    assert summary.after["loss"] < summary.before["loss"]


def test_logged_rewards_are_those_of_the_divergence(start):
    """β f'(u) of Jensen-Shannon is below β log 2 however large log u is; β log u is not."""
    summary = start(training={"max_steps": 16, "learning_rate": 0.02})
    assert 0 < summary.after["rewards/chosen"] < 0.5 * 0.6932
    assert summary.after["logratios/chosen"] > 0.7 or summary.after["logratios/rejected"] < -0.7


def test_every_trainable_tensor_moves_and_no_other(start, tiny):
    summary = start()
    trained = load_adapter(load_model(tiny), summary.folder.adapter, trainable=False)
    weights = {name: weight for name, weight in trained.named_parameters() if "lora_B" in name}
    assert weights
    assert all(weight.abs().max() > 0 for weight in weights.values())


def test_the_run_file_in_the_folder_repeats_the_run_bit_for_bit(start):
    first = start("first")
    again = first.folder.read_run_file()
    again["output_dir"] = str(first.folder.path.with_name("again"))
    second = train(parse_run(again), console=Console(quiet=True))
    assert losses(second.folder) == losses(first.folder)
    assert second.after == first.after


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(start, monkeypatch):
    whole = start("whole", training={"save_steps": 3})
    from falign.training.trainer import AlignmentTrainer

    original, calls = AlignmentTrainer.compute_loss, 0

    def dies(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AlignmentTrainer, "compute_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            start("broken", training={"save_steps": 3})
    resumed = start("broken", resume=True, training={"save_steps": 3})
    assert losses(resumed.folder) == losses(whole.folder)
    assert resumed.after == whole.after
    assert resumed.before == whole.before


def test_layouts_take_the_same_steps_and_the_manifest_says_which(start):
    tree, padded = (start(layout, training={"layout": layout}) for layout in ("tree", "padded"))
    assert losses(tree.folder) == pytest.approx(losses(padded.folder), abs=1e-5)
    assert tree.after == pytest.approx(padded.after, abs=1e-4)
    assert tree.folder.read_json("manifest.json")["layout"] == "tree"
    assert start("auto").folder.read_json("manifest.json")["layout"] == "tree"


def test_a_model_that_cannot_read_trees_gets_padded_rows_or_an_error_if_trees_are_asked_for(start, monkeypatch):
    monkeypatch.setattr("falign.scoring.layout_choice.why_not_trees", lambda model: "it sees in chunks")
    with pytest.raises(ConfigError, match=r"training.layout='tree' is not possible .*: it sees in chunks.*'padded'"):
        start(training={"layout": "tree"})
    assert start().folder.read_json("manifest.json")["layout"] == "padded"


def test_batches_by_tokens_resume_bit_for_bit(start, monkeypatch):
    from falign.training.trainer import AlignmentTrainer

    training = {"tokens_per_batch": 120, "save_steps": 4, "max_steps": 11}
    sizes, original = [], AlignmentTrainer.compute_loss

    def counts(self, model, inputs, *args, **kwargs):
        sizes.append((inputs["input_ids"].numel(), len(inputs["completion_ids"])))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AlignmentTrainer, "compute_loss", counts)
    whole = start("whole", training=training)
    assert max(tokens for tokens, _ in sizes) <= 120
    assert len({completions for _, completions in sizes}) > 1  # as many pairs as fit, not a fixed number

    def dies(self, *args, **kwargs):
        if self.state.global_step == 9:
            assert self.state.epoch > 1  # the last checkpoint is in the midst of the second epoch's order
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AlignmentTrainer, "compute_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        start("broken", training=training)
    monkeypatch.setattr(AlignmentTrainer, "compute_loss", original)
    resumed = start("broken", resume=True, training=training)
    assert losses(resumed.folder) == losses(whole.folder)
    assert resumed.after == whole.after


def test_a_tree_beyond_the_token_budget_is_refused_before_training(start, tmp_path):
    with pytest.raises(ConfigError, match=r"training.tokens_per_batch=5.*pairs.jsonl:\d+.*raise it"):
        start(training={"tokens_per_batch": 5})
    assert not (tmp_path / "run").exists()


def test_a_cache_is_not_used_where_whole_distributions_are_needed(start, tmp_path):
    summary = start(objective={"kind": "token_pairwise"}, reference={"cache": str(tmp_path / "cache")})
    assert summary.folder.read_json("manifest.json")["reference"]["kind"] == "adapter_off"
    assert not (tmp_path / "cache").exists()


def test_checkpoints_hold_trainable_weights_only(start):
    summary = start(training={"save_steps": 4, "save_total_limit": 1})
    (checkpoint,) = summary.folder.path.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-8"
    adapter = (summary.folder.adapter / "adapter_model.safetensors").stat().st_size
    weights = [file for file in checkpoint.iterdir() if file.suffix == ".safetensors"]
    assert [file.name for file in weights] == ["adapter_model.safetensors"]
    assert weights[0].stat().st_size <= 1.2 * adapter
    assert not list(checkpoint.glob("*.bin")) or {f.name for f in checkpoint.glob("*.bin")} == {"training_args.bin"}


@pytest.mark.parametrize("kind", ["frozen", "adapter_off"])
def test_cached_log_probabilities_change_nothing(start, kind, tmp_path):
    live = start("live", reference={"kind": kind})
    cached = start("cached", reference={"kind": kind, "cache": str(tmp_path / "cache")})
    assert losses(cached.folder) == pytest.approx(losses(live.folder), abs=1e-6)
    assert cached.folder.read_json("manifest.json")["reference"]["kind"] == "cached"


def test_full_fine_tuning_with_a_frozen_reference(start, tiny):
    summary = start(adapter=None, training={"learning_rate": 1e-3})
    assert summary.after["loss"] < summary.before["loss"]
    assert summary.folder.read_json("manifest.json")["reference"]["kind"] == "frozen_model"
    trained, base = load_model(summary.folder.weights).state_dict(), load_model(tiny).state_dict()
    moved = [name for name in base if not torch.equal(base[name], trained[name])]
    assert len(moved) >= 0.9 * len(base)


def test_gradient_checkpointing_changes_nothing(start):
    plain = start("plain")
    saving = start("saving", training={"gradient_checkpointing": True})
    assert losses(saving.folder) == pytest.approx(losses(plain.folder), abs=1e-6)


def test_an_occupied_folder_is_refused_and_left_alone(start, tmp_path):
    start()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ConfigError, match=r"holds another run.*--resume"):
        start()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        start("other")


def test_resuming_needs_the_same_run(start, tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        start("nowhere", resume=True)
    start()
    with pytest.raises(ConfigError, match=r"objective.beta \(0.5 when it began, 0.7 now\)"):
        start(resume=True, objective={"beta": 0.7})
    with pytest.raises(TrainingError, match="is finished and has no checkpoint"):
        start(resume=True)


def test_a_failed_start_leaves_no_folder(start, tmp_path):
    with pytest.raises(FalignError):
        start(data={"max_length": 4})
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_no_half_written_checkpoint(start, tmp_path, monkeypatch):
    from transformers import Trainer

    saved = Trainer._save_rng_state

    def full(self, output_dir):
        if self.state.global_step == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return saved(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_rng_state", full)
    with pytest.raises(ModelError, match="the disk is full"):
        start(training={"save_steps": 3})
    folder = RunFolder.open(tmp_path / "run")
    assert folder.last_checkpoint().name == "checkpoint-3"
    assert [path.name for path in folder.path.iterdir() if "checkpoint" in path.name] == ["checkpoint-3"]
    monkeypatch.undo()
    summary = start(resume=True, training={"save_steps": 3})
    assert max(losses(summary.folder)) == 8


def test_the_evaluation_before_training_is_called_so(tiny, tmp_path, capsys):
    data = write_pairs(tmp_path / "pairs.jsonl")
    train(parse_run(run_data(tiny, data, tmp_path / "run", training={"max_steps": 1})), console=Console(width=200))
    lines = capsys.readouterr().out.splitlines()
    assert "before training  held-out acc 0.5" in lines
    assert not any("/0" in line for line in lines)
    assert any(line.startswith("step 1/1  ") for line in lines)


def test_metrics_are_one_json_object_a_line(start):
    summary = start()
    lines = summary.folder.metrics_file.read_text(encoding="utf-8").splitlines()
    logs = [json.loads(line) for line in lines]
    assert {"loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"} <= set(logs[1])
    assert {"logps/chosen", "logratios/rejected", "entropy", "grad_norm", "learning_rate", "epoch"} <= set(logs[1])
    assert [log["step"] for log in logs if "loss" in log] == list(range(1, 9))


def test_the_first_step_starts_at_the_reference(start):
    summary = start()
    first = next(log for log in summary.folder.metrics() if log["step"] == 1)
    assert first["logratios/chosen"] == first["logratios/rejected"] == 0.0
    assert first["rewards/accuracies"] == 0.5


def test_resuming_a_finished_run_trains_no_further(start):
    settings = {"save_steps": 4, "lr_scheduler_type": "constant"}
    whole = start(training=settings)
    weights = (whole.folder.adapter / "adapter_model.safetensors").read_bytes()
    again = start(resume=True, training=settings)
    assert max(losses(again.folder)) == 8
    assert again.after == whole.after
    assert (again.folder.adapter / "adapter_model.safetensors").read_bytes() == weights


def test_half_a_last_line_of_metrics_does_not_block_resuming(start):
    settings = {"save_steps": 4, "lr_scheduler_type": "constant"}
    whole = start(training=settings)
    before = losses(whole.folder)
    with whole.folder.metrics_file.open("a") as file:
        file.write('{"step": 8, "lo')
    assert losses(start(resume=True, training=settings).folder) == before


def test_a_link_to_itself_leads_nowhere_and_one_outside_is_refused(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "samples.json").symlink_to("samples.json")
    RunFolder(folder).refuse_links()
    (folder / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"metrics.jsonl is a link that leads out"):
        RunFolder(folder).refuse_links()


@pytest.mark.parametrize("content", ["[]", "{}", '{"base_weights": "x", "reference": 3}', "{"])
def test_a_damaged_record_of_a_run_is_named(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match=r"manifest.json is damaged"):
        RunFolder(tmp_path).read_manifest()


def test_a_damaged_line_within_the_metrics_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics.jsonl:2 is damaged"):
        RunFolder(tmp_path).metrics()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"lr_scheduler_type": "cosin"}}, "training.lr_scheduler_type='cosin' is unknown.* mean 'cosine'"),
        ({"training": {"optim": "adamw"}}, "training.optim='adamw' is unknown; choose one of .*; did you mean"),
        ({"training": {"report_to": ["nowhere"]}}, "'nowhere' is unknown: choose from .*wandb"),
        (
            {"training": {"report_to": "comet_ml"}},
            r"it needs comet-ml. Install .*\(pip install comet-ml\)",
        ),
        ({"training": {"report_to": "dagshub"}}, "it needs dagshub and mlflow"),
        ({"training": {"report_to": "kubeflow"}}, "KUBEFLOW_TRAINER_SERVER_URL is not set"),
        (
            {"training": {"optim": "galore_adamw"}},
            "training.optim='galore_adamw' is not supported: it trains only chosen",
        ),
        ({"training": {"lr_scheduler_type": "greedy"}}, "'greedy' is not supported: it follows a metric"),
        ({"training": {"lr_scheduler_type": "cosine_with_min_lr"}}, "does not work: ValueError: .*min_lr"),
        ({"training": {"max_steps": 0}}, "training.max_steps=0: a run takes at least one optimizer step; leave it out"),
        ({"training": {"report_to": ["none", "wandb"]}}, "none excludes other trackers"),
        ({"data": {"max_length": 4096}}, "2048 positions"),
        ({"adapter": None, "model": {"dtype": "float16"}}, "model.dtype=bfloat16 and training.master_weights=float32"),
        ({"training": {"master_weights": "float32"}}, "master_weights=float32 with an adapter has no effect"),
        ({"adapter": None, "training": {"master_weights": "float32"}}, "has no effect on float32 weights"),
    ],
)
def test_what_cannot_start_leaves_no_folder_behind(start, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        start(**changes)
    assert not (tmp_path / "run").exists()


def test_rows_without_preference_are_refused_with_their_place(start, tmp_path):
    rows = [{"prompt": f"p{i} ", "completion": "c", "label": True} for i in range(8)]
    (tmp_path / "unpaired.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(FalignError, match=r"unpaired.jsonl:\d+: no completion is preferred"):
        start(data={"train": [{"path": str(tmp_path / "unpaired.jsonl"), "chat": False}], "eval_size": 1})


def test_a_prompt_of_one_token_is_enough(start, tmp_path):
    rows = [{"prompt": "a", "chosen": f" yes{i}", "rejected": f" no{i}"} for i in range(8)]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = start(data={"train": [{"path": str(tmp_path / "short.jsonl"), "chat": False}], "eval_size": 0})
    assert max(losses(summary.folder)) == 8


def test_dropout_of_the_base_model_is_no_noise_in_the_ratio(tmp_path):
    model = save_tiny(tmp_path / "gpt2", kind="gpt2")  # trained with dropout 0.1 in attention, residuals, embeddings
    data = write_pairs(tmp_path / "pairs.jsonl")
    config = parse_run(run_data(model, data, tmp_path / "run", training={"max_steps": 1}))
    summary = train(config, console=Console(quiet=True))
    (first,) = (log for log in summary.folder.metrics() if log["step"] == 1 and "loss" in log)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert first["logratios/chosen"] == 0.0


def test_held_out_prompts_that_are_trained_on_are_reported(start, tmp_path, capsys):
    config = parse_run(
        run_data(
            tmp_path / "tiny",
            tmp_path / "pairs.jsonl",
            tmp_path / "run",
            data={"eval": [{"path": str(tmp_path / "pairs.jsonl"), "chat": False}], "eval_size": 0},
            training={"max_steps": 1},
        )
    )
    train(config, console=Console(width=200))
    assert "24 held-out prompts also occur in training" in capsys.readouterr().out


def test_a_run_is_used_from_another_folder(tiny, tmp_path, monkeypatch):
    write_pairs(tmp_path / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    summary = train(parse_run(run_data("tiny", "pairs.jsonl", "run")), console=Console(quiet=True))
    monkeypatch.chdir("/")
    run = RunFolder.open(tmp_path / "run").read_run_file()
    assert run["model"]["path"] == str(tiny)
    assert run["data"]["train"][0]["path"] == str(tmp_path / "pairs.jsonl")
    recorded = json.loads((tmp_path / summary.folder.adapter / "adapter_config.json").read_text())
    assert recorded["base_model_name_or_path"] == str(tiny)

"""A run goes on only where all that decides its next step is as it was; what decides no step may change."""

import copy
import io
import json
import shutil
from datetime import datetime

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from falign.errors import ConfigError, ModelError, TrainingError
from falign.evaluation.loading import load_run
from falign.models.tokenizers import fix_date
from falign.report.runs import read_runs
from falign.runfile import TrainingConfig, load_run_file, parse_run
from falign.runfile.optimization import same_learning_rates
from falign.runfile.prompts_config import CriticConfig
from falign.runs import RunFolder
from falign.runs.inputs import prompt_digest
from falign.runs.loading import load_trained
from falign.training import train
from falign.training.parts import load_language
from tests.models.tiny import save_tiny, swap_tokens, tiny_tokenizer
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

TRAINING = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant", "logging_steps": 1}


def stopped(run, **changes):
    """Begin a run and stop it before its third step begins."""

    def move(*args, step, **kwargs):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("falign.training.trainer.AlignmentTrainer.move_references", move)
        with pytest.raises(KeyboardInterrupt):
            train(parse_run(run), console=Console(quiet=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a frozen reference, data, and a stopped run of each kind."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "model")
    save_tiny(folder / "reference", seed=3)
    run = run_data(
        folder / "model",
        write_pairs(folder / "pairs.jsonl"),
        folder / "offline",
        reference={"kind": "frozen", "path": str(folder / "reference")},
        training=TRAINING,
    )
    stopped(run)
    online = online_data(folder / "model", write_prompts(folder / "prompts.jsonl"), folder / "online", "short")
    online["training"] |= TRAINING
    stopped(online)
    return {"folder": folder, "offline": run, "online": online}


def resume(run, **changes):
    return train(parse_run({**run, **changes}), console=Console(quiet=True), resume=True)


def lines(file):
    return file.read_text().splitlines(keepends=True)


def one_row_more(folder):
    rows = lines(folder / "pairs.jsonl")
    (folder / "pairs.jsonl").write_text("".join([*rows, rows[0].replace("question 0", "question 99")]))


def another_order(folder):
    rows = lines(folder / "pairs.jsonl")
    (folder / "pairs.jsonl").write_text("".join([*rows[:-2], rows[-1], rows[-2]]))


def another_answer(folder):
    (folder / "pairs.jsonl").write_text((folder / "pairs.jsonl").read_text().replace("gladly!", "gladly?", 1))


def swapped_ids(folder):
    file = folder / "model" / "tokenizer.json"
    stored = json.loads(file.read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary["Z"], vocabulary["Y"] = vocabulary["Y"], vocabulary["Z"]  # which no row has
    file.write_text(json.dumps(stored))


def another_template(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template + "\n"
    tokenizer.save_pretrained(folder / "model")


def another_stop(folder):
    file = folder / "model" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [1]}))


def another_rope(folder):
    file = folder / "model" / "config.json"
    stored = json.loads(file.read_text())
    stored["rope_parameters"] = {**stored["rope_parameters"], "rope_theta": 500.0}
    file.write_text(json.dumps(stored))


def other_weights(folder, model="model"):
    file = folder / model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, file, {"format": "pt"})


def other_reference(folder):
    other_weights(folder, "reference")


def another_reference_config(folder):
    file = folder / "reference" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 0.1}))


OFFLINE = {
    one_row_more: r"data\.train.* had 18 rows when the run began, and has 19 now",
    another_order: r"row \d+ of data\.train",
    another_answer: r"row \d+ of data\.(train|eval)",
    swapped_ids: "tokenizer",
    another_template: "chat template",
    another_stop: "stop tokens",
    another_rope: r"config\.json",
    other_weights: "weights of model.path",
    other_reference: "reference",
    another_reference_config: "reference",
}


def an_answer_column(folder):
    rows = lines(folder / "prompts.jsonl")
    (folder / "prompts.jsonl").write_text("".join(row.replace('"answer": 3', '"answer": 4') for row in rows))


ONLINE = {an_answer_column: r"row \d+ of prompts\.(train|eval)", other_weights: "weights of model.path"}


def refused(place, kind, change, message):
    folder = place["folder"]
    kept = folder.with_name(f"{folder.name}-kept")
    names = ("model", "reference", "pairs.jsonl", "prompts.jsonl")
    kept.mkdir()
    for name in names:
        source = folder / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, kept / name)
    before = {file: file.read_bytes() for file in sorted((folder / kind).rglob("*")) if file.is_file()}
    try:
        change(folder)
        with pytest.raises(ConfigError, match=message) as raised:
            resume(place[kind])
    finally:
        for name in names:
            source = kept / name
            if source.is_dir():
                shutil.copytree(source, folder / name, dirs_exist_ok=True)
            else:
                shutil.copy(source, folder / name)
        shutil.rmtree(kept)
    after = {file: file.read_bytes() for file in sorted((folder / kind).rglob("*")) if file.is_file()}
    assert after == before
    return str(raised.value)


@pytest.mark.parametrize("change", OFFLINE, ids=lambda change: change.__name__)
def test_an_offline_run_is_not_resumed_with_another(place, change):
    refused(place, "offline", change, OFFLINE[change])


@pytest.mark.parametrize("change", ONLINE, ids=lambda change: change.__name__)
def test_an_online_run_is_not_resumed_with_another(place, change):
    refused(place, "online", change, ONLINE[change])


def test_an_edited_run_file_in_the_run_folder_is_compared_with_what_the_run_began_with(place):
    folder = RunFolder(place["folder"] / "offline")
    kept = folder.run_file.read_text()
    try:
        folder.run_file.write_text(kept.replace("beta: 0.5", "beta: 0.25"))
        with pytest.raises(ConfigError, match=r"objective\.beta \(0\.5 when it began, 0\.25 now\)"):
            train(parse_run(folder.read_run_file()), console=Console(quiet=True), resume=True)
    finally:
        folder.run_file.write_text(kept)


def test_commands_that_read_a_run_refuse_a_run_file_that_was_edited(whole):
    kept = whole.run_file.read_text()
    try:
        whole.run_file.write_text(kept.replace("beta: 0.5", "beta: 0.25"))
        with pytest.raises(
            ConfigError, match=r"run\.yaml was edited .* objective\.beta \(0\.5 when it began, 0\.25 now"
        ):
            load_run(str(whole.path), max_length=None)
        with pytest.raises(ConfigError, match=r"run\.yaml was edited"):
            load_trained(whole)
        (reported,) = read_runs([whole.path])
        assert reported.run_file["objective"]["beta"] == 0.5
    finally:
        whole.run_file.write_text(kept)


def tokens_swapped(model):
    swap_tokens(model, "h", "e")


def another_template(model):
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}")


def another_stop(model):
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [1, 40]}))


@pytest.fixture(scope="module", params=["adapter", "full"])
def finished(request, place, whole):
    """A finished run, and the folder that has its tokenizer."""
    if request.param == "adapter":
        return whole, place["folder"] / "model"
    folder = place["folder"] / "full"
    run = {**place["offline"], "adapter": None, "output_dir": str(folder)}
    return train(parse_run(run), console=Console(quiet=True)).folder, folder / "model"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (tokens_swapped, "tokenizer now .* restore its tokenizer files"),
        (another_template, r"chat template now .* restore its chat_template\.jinja"),
        (another_stop, r"set of stop tokens now .* restore its generation_config\.json"),
    ],
)
def test_a_finished_run_is_used_with_the_tokens_that_it_was_trained_with(finished, change, named, tmp_path):
    run, model = finished
    shutil.copytree(model, tmp_path / "kept")
    load_trained(run)
    try:
        change(model)
        with pytest.raises(ModelError, match=f"{model} has another {named}"):
            load_trained(run)
    finally:
        shutil.copytree(tmp_path / "kept", model, dirs_exist_ok=True)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_what_was_trained_is_refused_where_it_is_damaged_or_of_another_run(finished, tmp_path):
    run, _ = finished
    kept = RunFolder(shutil.copytree(run.path, tmp_path / "copy"))
    trained, name = (
        (kept.adapter, "adapter_model.safetensors") if kept.adapter.is_dir() else (kept.weights, "model.safetensors")
    )
    load_trained(kept)
    load_trained(kept, checkpoint=2)
    shutil.copy(kept.path / "checkpoint-2" / name, trained / name)
    with pytest.raises(ModelError, match=rf"{name} is not what {kept.path} has trained"):
        load_trained(kept)
    shutil.rmtree(trained)
    train(load_run_file(kept.run_file), console=Console(quiet=True), resume=True)  # as the message says
    load_trained(kept)
    flip_a_bit(trained / name)
    with pytest.raises(ModelError, match=name):
        load_trained(kept)
    flip_a_bit(kept.path / "checkpoint-2" / name)
    with pytest.raises(ModelError, match=rf"checkpoint-2 is damaged \({name} has changed since"):
        load_trained(kept, checkpoint=2)


def test_what_a_path_names_may_move_as_long_as_its_content_is_the_same(place, whole, tmp_path):
    kept, folder = copied(place, "offline", tmp_path / "copy"), place["folder"]
    for name in ("model", "reference"):
        shutil.copytree(folder / name, tmp_path / "moved" / name)
    shutil.copy(folder / "pairs.jsonl", tmp_path / "moved" / "rows.jsonl")
    moved = copy.deepcopy({**place["offline"], "output_dir": str(kept.path)})
    moved["model"]["path"] = str(tmp_path / "moved" / "model")
    moved["reference"]["path"] = str(tmp_path / "moved" / "reference")
    moved["data"]["train"][0]["path"] = str(tmp_path / "moved" / "rows.jsonl")
    same_end(train(parse_run(moved), console=Console(quiet=True), resume=True).folder, whole)
    assert load_run(str(kept.path), max_length=None).rewarding

    kept = copied(place, "offline", tmp_path / "other")
    rows = tmp_path / "moved" / "rows.jsonl"
    rows.write_text(rows.read_text().replace("gladly!", "gladly?", 1))
    with pytest.raises(ConfigError, match=r"row \d+ of data\.(train|eval)"):
        train(parse_run({**moved, "output_dir": str(kept.path)}), console=Console(quiet=True), resume=True)


def test_other_versions_are_told_and_recorded(place, whole, tmp_path):
    kept, output = copied(place, "offline", tmp_path / "copy"), io.StringIO()
    manifest = kept.read_manifest()
    manifest["versions"]["torch"] = "1.0"
    kept.write_json("manifest.json", manifest)
    run = {**place["offline"], "output_dir": str(kept.path)}
    resumed = train(parse_run(run), console=Console(file=output, width=1000), resume=True).folder
    assert f"torch (1.0 then, {torch.__version__} now)" in output.getvalue()
    (change,) = resumed.read_inputs()["changes"]
    assert (change["after_step"], change["versions"]["torch"]) == (2, "1.0")
    assert resumed.read_manifest()["versions"]["torch"] == torch.__version__
    same_end(resumed, whole)


def copied(place, kind, target):
    shutil.copytree(place["folder"] / kind, target)
    return RunFolder(target)


def logs(folder):
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
    return [{name: value for name, value in log.items() if name not in timed} for log in folder.metrics()]


def same_end(folder, other):
    assert logs(folder) == logs(other)
    same_adapter(folder, other)


def same_adapter(folder, other):
    left, right = (load_file(each.adapter / "adapter_model.safetensors") for each in (folder, other))
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.fixture(scope="module")
def whole(place):
    """The offline run, never stopped."""
    run = {**place["offline"], "output_dir": str(place["folder"] / "whole")}
    return train(parse_run(run), console=Console(quiet=True)).folder


def contents(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_copied_run_folder_is_resumed_where_it_is_and_the_first_one_stays_as_it_is(place, whole, tmp_path):
    kept = copied(place, "offline", tmp_path / "copy")
    before = contents(place["folder"] / "offline")
    config = load_run_file(kept.run_file)
    assert config.output_dir == kept.path
    same_end(train(config, console=Console(quiet=True), resume=True).folder, whole)
    assert contents(place["folder"] / "offline") == before
    with pytest.raises(ConfigError, match=f"{kept.path} holds another run"):
        train(load_run_file(kept.run_file), console=Console(quiet=True))
    assert load_run_file(kept.run_file, [f"output_dir={tmp_path / 'again'}"]).output_dir == tmp_path / "again"


def test_settings_that_change_no_step_may_change(place, whole, tmp_path):
    kept = copied(place, "offline", tmp_path / "copy")
    training = {**TRAINING, "save_steps": 1, "save_total_limit": 1, "logging_steps": 2, "eval_steps": 1}
    run = {**place["offline"], "output_dir": str(kept.path), "training": {**place["offline"]["training"], **training}}
    resumed = train(parse_run(run), console=Console(quiet=True), resume=True).folder
    assert [path.name for path in resumed.path.glob("checkpoint-*")] == ["checkpoint-4"]
    same_adapter(resumed, whole)
    steps = [(log["step"], "eval_loss" in log) for log in resumed.metrics()]
    assert steps == [(0, True), (1, False), (2, False), (2, True), (3, True), (4, False), (4, True), (4, False)]
    assert resumed.read_inputs()["settings"]["training"]["save_steps"] == 1


def test_a_longer_run_ends_as_if_it_had_been_so_long_from_the_beginning(place, tmp_path, monkeypatch):
    long = {**place["offline"], "training": {**place["offline"]["training"], "max_steps": 6}}
    kept = copied(place, "offline", tmp_path / "copy")
    train(parse_run({**place["offline"], "output_dir": str(kept.path)}), console=Console(quiet=True), resume=True)
    assert (kept.path / "summary.json").is_file()
    ended = []
    with monkeypatch.context() as patch:
        patch.setattr(
            "falign.training.trainer.AlignmentTrainer.move_references",
            lambda *args, **kwargs: ended.append((kept.path / "summary.json").exists()),
        )
        resumed = train(parse_run({**long, "output_dir": str(kept.path)}), console=Console(quiet=True), resume=True)
    assert ended == [False, False]
    assert resumed.folder.metrics()[-1]["step"] == 6
    at_once = train(parse_run({**long, "output_dir": str(tmp_path / "long")}), console=Console(quiet=True))
    same_end(resumed.folder, at_once.folder)
    shorter = {**long, "training": {**long["training"], "max_steps": 5}, "output_dir": str(kept.path)}
    with pytest.raises(ConfigError, match=r"has taken 6 steps and would now end after 5: raise training\.max_steps"):
        train(parse_run(shorter), console=Console(quiet=True), resume=True)


@pytest.mark.parametrize(
    ("schedule", "warmup", "allowed"),
    [
        ("constant", 0, True),
        ("constant_with_warmup", 3, True),
        ("constant_with_warmup", 0.5, False),
        ("inverse_sqrt", 4, True),
        ("linear", 0, False),
        ("linear", 8, True),  # all steps taken were of the warmup
        ("cosine", 2, False),
        ("reduce_lr_on_plateau", 0, True),
    ],
)
def test_more_steps_are_allowed_where_the_schedule_gives_the_steps_taken_the_same_learning_rates(
    schedule, warmup, allowed, tmp_path
):
    config = TrainingConfig(lr_scheduler_type=schedule, warmup_steps=warmup, eval_steps=5)
    args = config.build(tmp_path, seed=0)
    assert same_learning_rates(args, 10, 20, until=6) is allowed


def test_lost_and_changed_lines_of_the_logs_come_back_or_are_told(place, whole, tmp_path):
    for number, damage in enumerate(
        (lambda text: "", lambda text: text[: len(text) // 2], lambda text: "x" + text[1:])
    ):
        kept, output = copied(place, "offline", tmp_path / str(number)), io.StringIO()
        kept.metrics_file.write_text(damage(kept.metrics_file.read_text()))
        run = {**place["offline"], "output_dir": str(kept.path)}
        resumed = train(parse_run(run), console=Console(file=output, width=1000), resume=True).folder
        assert "metrics.jsonl has lost or changed lines since checkpoint-2" in output.getvalue()
        same_end(resumed, whole)

    kept, output = copied(place, "online", tmp_path / "online"), io.StringIO()
    lines_there = kept.completions_file.read_text()
    run = {**place["online"], "output_dir": str(kept.path)}
    kept.completions_file.write_text(lines_there[:100])
    with pytest.raises(TrainingError, match=r"completions\.jsonl has lost or changed lines since checkpoint-2"):
        train(parse_run(run), console=Console(quiet=True), resume=True)
    assert kept.completions_file.read_text() == lines_there[:100]
    kept.completions_file.unlink()
    train(parse_run(run), console=Console(file=output, width=1000), resume=True)
    assert "completions.jsonl is missing: a new one begins at checkpoint-2" in output.getvalue()


def test_a_checkpoint_of_another_run_or_step_is_put_aside_and_told(place, whole, tmp_path):
    kept, output = copied(place, "offline", tmp_path / "copy"), io.StringIO()
    shutil.copytree(whole.path / "checkpoint-4", kept.path / "checkpoint-4")
    shutil.copytree(kept.path / "checkpoint-2", kept.path / "checkpoint-600")
    run = {**place["offline"], "output_dir": str(kept.path)}
    resumed = train(parse_run(run), console=Console(file=output, width=1000), resume=True).folder
    assert "checkpoint-4 is damaged (it belongs to another run)" in output.getvalue()
    assert "checkpoint-600 is damaged (it is the checkpoint of step 2)" in output.getvalue()
    same_end(resumed, whole)


def test_the_record_says_which_prompts_were_trained_on(place):
    folder = RunFolder(place["folder"] / "offline")
    trained = folder.read_rows().trained_prompts
    ids = [tuple(tiny_tokenizer()(f"question {i}: ")["input_ids"]) for i in range(24)]
    digests = [prompt_digest(prompt) for prompt in ids]
    assert sum(digest in trained for digest in digests) == len(trained) == 18
    folder = RunFolder(place["folder"] / "online")
    assert len(folder.read_rows().trained_prompts) == 8
    kept = (folder.path / "rows.txt").read_text()
    try:
        (folder.path / "rows.txt").write_text(kept.replace("prompts.train", "prompts.eval", 1))
        with pytest.raises(ConfigError, match=r"rows\.txt is missing or damaged"):
            folder.read_rows()
    finally:
        (folder.path / "rows.txt").write_text(kept)


@pytest.mark.parametrize(
    ("template", "begins"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "03 Feb 2001<s>"),
        ("\n {{- strftime_now('%-d.%-m.%y %H:%M 100%%d') }}", "3.2.01 04:05 100%d<s>"),
        ("\n{% set day = strftime_now %}\n {{ day('%A') }}", "\n Saturday<s>"),
        (
            "{% if strftime_now is defined %}{% macro m() %}{{ strftime_now('%j') }}{% endmacro %}{{ m() }}{% endif %}",
            "034<s>",
        ),
    ],
)
def test_a_template_that_writes_the_date_writes_that_which_was_fixed(template, begins):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template + tokenizer.chat_template
    turns = [{"role": "user", "content": "hello"}]
    fix_date(tokenizer, datetime(2001, 2, 3, 4, 5))
    for each in (tokenizer, copy.deepcopy(tokenizer)):
        assert each.apply_chat_template(turns, tokenize=False).startswith(begins)
    assert tokenizer.chat_template.startswith(template)


def test_fixing_the_date_changes_nothing_else():
    tokenizer, same = tiny_tokenizer(), tiny_tokenizer()
    fix_date(tokenizer, datetime(2001, 2, 3, 4, 5))
    turns = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(turns) == same.apply_chat_template(turns)


def test_the_tokens_of_a_run_are_those_of_its_first_day(place, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"q{i}"}], "chosen": "yes!", "rejected": "no way"} for i in range(8)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    template = "{{ strftime_now('%H:%M:%S') }}" + tiny_tokenizer().chat_template
    run = run_data(place["folder"] / "model", tmp_path / "chats.jsonl", tmp_path / "run", training=TRAINING)
    run["model"] = {**run["model"], "chat_template": template}
    run["data"] = {**run["data"], "eval_size": 2}
    stopped(run)
    folder = RunFolder(tmp_path / "run")
    began = folder.read_rows().text
    manifest = json.loads((folder.path / "manifest.json").read_text())
    resumed = train(parse_run(run), console=Console(quiet=True), resume=True).folder
    assert resumed.read_rows().text == began
    assert resumed.read_inputs()["date"] == manifest["inputs"]["date"]
    tokens = tiny_tokenizer()
    dated = resumed.read_date().strftime("%H:%M:%S") + "<s>userq"
    assert tokens.decode(
        load_language(parse_run(run), date=resumed.read_date()).tokenizer.apply_chat_template(
            [{"role": "user", "content": "q"}]
        )["input_ids"]
    ).startswith(dated)


def test_a_run_older_than_a_setting_goes_on_with_its_default_and_with_nothing_else(place):
    folder, config = RunFolder(place["folder"] / "online"), parse_run(place["online"])
    manifest = folder.read_manifest()
    inputs = manifest["inputs"]
    older = {name: value for name, value in inputs["settings"].items() if name != "critic"}
    assert len(older) < len(inputs["settings"])
    try:
        folder.write_json("manifest.json", {**manifest, "inputs": {**inputs, "settings": older}})
        folder.require_unedited(config)
        with pytest.raises(ConfigError, match=r"critic\.warm_up \(None when it began, 3 now\)"):
            folder.require_unedited(config.model_copy(update={"critic": CriticConfig(warm_up=3)}))
    finally:
        folder.write_json("manifest.json", manifest)

"""The functions of ``falign``: a run from objects of a program is the run of the same file, and is used from Python."""

import json
import shutil
from typing import ClassVar

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

import falign
from falign.errors import ConfigError, DataError, ModelError
from falign.evaluation.summaries import read_evaluations
from falign.models import load_model, model_identity
from falign.objectives import DivergenceTo, ObjectiveOutput, Term
from falign.references import AdapterOff, FrozenModel, MovingReference, PeriodicReset
from falign.runfile import load_run_file, parse_run
from falign.training import train as train_file
from tests.models.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.training.pairs import run_data, write_pairs

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
TRAINING = {"learning_rate": 0.01, "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1}
LORA = {"r": 4, "alpha": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("door")


@pytest.fixture(scope="module")
def model(folder):
    return save_tiny(folder / "tiny")


@pytest.fixture(scope="module")
def pairs(folder):
    return write_pairs(folder / "pairs.jsonl")


def rows(pairs):
    return [json.loads(line) for line in pairs.read_text().splitlines()]


def section(pairs, **fields):
    source = {"rows": Dataset.from_list(rows(pairs)), "chat": False}
    return {"train": source, "eval_size": 6, "max_length": 64, **fields}


def arguments(pairs, **changes):
    objective = falign.FDPO("jensen_shannon", beta=0.5)
    return {
        "data": section(pairs),
        "objective": objective,
        "adapter": falign.Lora(**LORA),
        "training": TRAINING,
        "seed": 1,
        **changes,
    }


@pytest.fixture(scope="module")
def run(model, pairs, folder):
    return falign.train(str(model), output_dir=folder / "run", **arguments(pairs))


def adapter(run):
    return {name: tensor for name, tensor in run.policy.state_dict().items() if "lora_" in name}


def test_a_run_from_objects_is_the_run_of_the_same_file(run, model, pairs, folder):
    content = run_data(model, pairs, folder / "of-file", training={"max_steps": 4}, sampling={"prompts": []})
    train_file(parse_run(content))
    other = falign.load(folder / "of-file")
    assert run.summary.after == other.summary.after
    assert run.config.objective.build() == other.config.objective.build(), "what a run file can say is recorded as such"
    for name, tensor in adapter(run).items():
        assert torch.equal(tensor, adapter(other)[name])


def test_a_loaded_model_is_left_as_it_is_and_gives_the_same_run(run, model, pairs, folder):
    loaded = load_model(str(model))
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    again = falign.train(loaded, output_dir=folder / "loaded", **arguments(pairs))
    assert again.summary.after == run.summary.after
    assert loaded.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    shared = again.policy.get_base_model().model.embed_tokens.weight
    assert shared.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert falign.load(folder / "loaded").policy is not None, "it is loaded from where it came from"


def test_a_model_that_was_changed_since_it_was_loaded_is_given_again(model, pairs, folder):
    changed = load_model(str(model))
    changed.model.embed_tokens.weight.data[3] += 1
    run = falign.train(changed, output_dir=folder / "changed", **arguments(pairs))
    with pytest.raises(ModelError, match="holds other weights now"):
        _ = falign.load(run.path).policy
    loaded = falign.load(run.path, model=changed)
    assert all(torch.equal(tensor, adapter(run)[name]) for name, tensor in adapter(loaded).items())


def test_all_weights_are_trained_on_a_copy(model, pairs, folder):
    loaded = load_model(str(model))
    before = loaded.model.embed_tokens.weight.clone()
    changes = arguments(pairs, adapter=None, training={**TRAINING, "max_steps": 1})
    run = falign.train(loaded, tokenizer=tiny_tokenizer(), output_dir=folder / "full", **changes)
    assert torch.equal(loaded.model.embed_tokens.weight, before)
    assert not torch.equal(run.policy.model.embed_tokens.weight, before)
    assert run.summary.before["rewards/margins"] == pytest.approx(0, abs=1e-6), "the reference is the model as it was"


AWAY = DivergenceTo(falign.divergences.get("jensen_shannon"))
OTHER = DivergenceTo(falign.divergences.get("forward_kl"))
NAMED = "divergence_to(jensen_shannon)"


class Counter(TrainerCallback):
    """Counts optimizer steps, and ends the run where it is told to."""

    def __init__(self, last=None):
        self.steps, self.last = 0, last

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if state.global_step == self.last:
            raise KeyboardInterrupt


def shouting(prompts, completions, **columns):
    return [float(text.count("!")) for text in completions]


def whispering(prompts, completions, **columns):
    return [-float(text.count("!")) for text in completions]


def online(reward, **changes):
    return {
        "prompts": {"train": [f"question {i}: " for i in range(8)], "eval_size": 2},
        "objective": {"kind": "policy_gradient", "divergence": "reverse_kl", "beta": 0.1},
        "rewards": reward,
        "rollout": {"prompts": 2, "completions": 2, "max_new_tokens": 4},
        "adapter": LORA,
        "training": {"learning_rate": 0.01, "max_steps": 3, "save_steps": 1},
        **changes,
    }


def test_an_online_run_with_a_function_goes_on_with_the_same_function_alone(model, folder):
    prompts = {"train": {"texts": [f"question {i}: " for i in range(8)], "chat": False}, "eval_size": 2}
    changes = online(shouting, prompts=prompts, callbacks=[Counter(last=2)])
    with pytest.raises(KeyboardInterrupt):
        falign.train(str(model), output_dir=folder / "online", **changes)
    changes = online([{"function": whispering, "name": "shouting"}], prompts=prompts, resume=True)
    with pytest.raises(ConfigError, match=r"reward shouting differs from when the run began|rewards.0.code"):
        falign.train(str(model), output_dir=folder / "online", **changes)
    counted = Counter()
    run = falign.train(
        str(model), output_dir=folder / "online", **online(shouting, prompts=prompts, callbacks=[counted], resume=True)
    )
    whole = falign.train(str(model), output_dir=folder / "whole", **online(shouting, prompts=prompts))
    assert counted.steps == 1 or counted.steps == 2
    assert run.summary.after == whole.summary.after
    assert run.config.objects == ["rewards.0"]


def test_a_run_of_objects_goes_on_with_the_same_rows_alone(model, pairs, folder):
    training = {**TRAINING, "save_steps": 2}
    changes = arguments(pairs, training=training, callbacks=[Counter(last=3)])
    with pytest.raises(KeyboardInterrupt):
        falign.train(str(model), output_dir=folder / "stopped", **changes)
    other = [{**row, "chosen": "thanks"} for row in rows(pairs)]
    data = section(pairs, train={"rows": Dataset.from_list(other), "chat": False})
    changes = arguments(pairs, data=data, training=training, resume=True)
    with pytest.raises(ConfigError, match=r"row 1 of data.train .* differs from when the run began"):
        falign.train(str(model), output_dir=folder / "stopped", **changes)
    with pytest.raises(DataError, match=r"python:Dataset was an object in a program"):
        train_file(load_run_file(folder / "stopped" / "run.yaml"), resume=True)
    falign.train(str(model), output_dir=folder / "stopped", **arguments(pairs, training=training, resume=True))


class Mine:
    """An objective of one's own: the rejected completion becomes less likely."""

    needs = frozenset({"preference"})
    measures: ClassVar = {}

    def __call__(self, batch):
        losses = (batch.logprobs.exp() * batch.completion_mask).sum(-1) * (batch.preference == 0)
        return ObjectiveOutput((Term(losses, torch.ones_like(losses)),), {})


def test_an_objective_of_ones_own_is_recorded_by_its_code(model, pairs, folder):
    run = falign.train(str(model), output_dir=folder / "mine", **arguments(pairs, objective=Mine()))
    assert run.config.objective.name == "Mine"
    assert len(run.config.objective.code) == 64
    with pytest.raises(ConfigError, match=r"objective was an object in a program \(Mine\)"):
        run.config.objective.build()


def frozen(model, **changes):
    loaded = load_model(str(model))
    return FrozenModel(loaded, **{**model_identity(loaded), "starts_as_policy": True, **changes})


def off(policy):
    return AdapterOff(starts_as_policy=True)


def off_unchecked(policy):
    return AdapterOff()


def test_a_reference_that_is_an_object_gives_the_run_of_its_section_and_goes_on_alone_with_itself(
    run, model, pairs, folder
):
    data, training = section(pairs, train={"path": str(pairs), "chat": False}), {**TRAINING, "save_steps": 2}
    changes = {
        "data": data,
        "training": training,
        "reference": frozen(model),
        "measures": {"js": AWAY, "also_js": NAMED},
    }
    with pytest.raises(KeyboardInterrupt):
        falign.train(str(model), output_dir=folder / "held", **arguments(pairs, **changes, callbacks=[Counter(last=3)]))
    for other, place in (
        ({"reference": frozen(model, weights="0")}, r"reference\.code"),
        ({"reference": off}, r"reference\.code"),
        (
            {"measures": {"js": OTHER, "also_js": NAMED}},
            r"measures\.js\.code",
        ),
    ):
        with pytest.raises(ConfigError, match=place):
            falign.train(
                str(model), output_dir=folder / "held", **arguments(pairs, **{**changes, **other}, resume=True)
            )
    with pytest.raises(ConfigError, match=r"measures\.js was an object in a program \(DivergenceTo\)"):
        train_file(load_run_file(folder / "held" / "run.yaml"), resume=True)
    again = {**changes, "reference": frozen(model)}
    held = falign.train(str(model), output_dir=folder / "held", **arguments(pairs, **again, resume=True))
    assert held.config.objects == ["reference", "measures.js"]
    for name, tensor in adapter(run).items():
        torch.testing.assert_close(adapter(held)[name], tensor)
    logs = [log for log in held.folder.metrics() if "measures/js" in log]
    assert logs[-1]["measures/js"] == logs[-1]["measures/also_js"] > 0
    recorded = held.folder.read_manifest()["reference"]
    assert recorded["weights"] == held.folder.read_manifest()["base_weights"]

    totals = held.score(pairs, folder / "held.jsonl")
    with pytest.raises(ConfigError, match=r"reference was an object in a program"):
        falign.load(held.path).score(pairs, folder / "held-again.jsonl")
    with pytest.raises(ConfigError, match="reference differs from the one"):
        falign.load(held.path, reference=off).score(pairs, folder / "held-again.jsonl")
    again = falign.load(held.path, reference=frozen(model)).score(pairs, folder / "held-again.jsonl")
    assert again.mean_log_ratio == totals.mean_log_ratio


def test_a_function_makes_the_references_of_a_policy_by_name(run, model, pairs, folder):
    measures = {"away": "divergence_to(jensen_shannon, teacher)"}
    references = {"reference": off, "teacher": frozen(model)}
    data = section(pairs, train={"path": str(pairs), "chat": False})
    made = falign.train(
        str(model),
        output_dir=folder / "by-name",
        **arguments(pairs, data=data, references=references, measures=measures),
    )
    assert made.config.objects == ["references.reference", "references.teacher"]
    assert all(torch.equal(tensor, adapter(run)[name]) for name, tensor in adapter(made).items())
    score = made.score(pairs, folder / "by-name.jsonl").mean_log_ratio
    loaded = falign.load(made.path, references=references)
    assert loaded.score(pairs, folder / "by-name-again.jsonl").mean_log_ratio == score
    with pytest.raises(ConfigError, match=r"references\.reference differs from the one"):
        falign.load(made.path, references={"reference": off_unchecked}).score(pairs, folder / "other-name.jsonl")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reference": 3}, "reference is a int: give a falign.references.Reference, a function"),
        ({"reference": lambda policy: policy}, "reference: <lambda> makes a PeftModelForCausalLM, not a falign"),
        ({"reference": lambda policy: FrozenModel(tiny_model("llama"))}, "the identity of the FrozenModel has no weig"),
        ({"measures": {"js": 3}}, "measures has a int: give a measure"),
        ({"measures": {"js": DivergenceTo(falign.divergences.get("reverse_kl"), "teacher")}}, "reads the reference 't"),
    ],
    ids=["number", "policy", "unrecorded", "measure", "unread"],
)
def test_a_wrong_reference_or_measure_is_named_with_its_remedy(model, pairs, folder, changes, said):
    with pytest.raises(ConfigError, match=said):
        falign.train(str(model), output_dir=folder / "refused", **arguments(pairs, **changes))


def test_a_moving_reference_is_given_as_the_function_that_makes_it(model, pairs, folder):
    moving = MovingReference(frozen(model), rule=PeriodicReset(every=2))
    with pytest.raises(ConfigError, match=r"MovingReference, which moves .* give a function f\(policy\)"):
        falign.train(str(model), output_dir=folder / "refused", **arguments(pairs, reference=moving))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"learning_rte": 1}}, "falign.train: unknown key 'training.learning_rte': did you mean"),
        ({"data": None}, "data is missing"),
        ({"tokenizer": "tiny"}, "tokenizer applies only to a loaded model"),
        ({"adapter": {"rank": 4}}, "unknown key 'adapter.rank'"),
        ({"objective": {"kind": "pairwize"}}, "did you mean pairwise"),
        ({"objective": "dpo"}, "objective is a str: give an objective, such as falign.FDPO"),
        ({"data": {"train": {"rows": [{"prompt": "a"}], "chta": False}}}, "data.train.0.chta"),
    ],
    ids=["training", "data", "tokenizer", "adapter", "objective", "text", "source"],
)
def test_a_wrong_argument_is_named_with_its_remedy(model, pairs, folder, changes, said):
    with pytest.raises(ConfigError, match=said):
        falign.train(str(model), output_dir=folder / "refused", **arguments(pairs, **changes))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.nn.Linear(2, 2), "model is a Linear: give a causal"),
        (tiny_model("llama"), "was not loaded from a folder"),
    ],
    ids=["linear", "made"],
)
def test_what_is_no_model_of_a_folder_is_refused(pairs, folder, given, said):
    with pytest.raises(ConfigError, match=said):
        falign.train(given, output_dir=folder / "refused", **arguments(pairs))


def test_a_run_is_sampled_in_memory_as_from_its_folder(run):
    prompts = ["question 1: ", "question 2: "]
    answers = run.sample(prompts, max_new_tokens=4)
    assert len(answers) == 2
    assert answers == falign.sample(run.path, prompts, max_new_tokens=4)
    assert run.sample("question 1: ", max_new_tokens=4) == answers[:1]
    with pytest.raises(ConfigError, match="prompts is empty"):
        run.sample([])


def test_rows_in_memory_are_scored_as_those_of_the_file(run, pairs, folder):
    totals = falign.score(run, {"rows": rows(pairs), "chat": False}, folder / "scores.jsonl")
    of_file = run.score(pairs, folder / "scores-of-file.jsonl")
    assert (totals.completions, totals.mean_log_ratio) == (48, of_file.mean_log_ratio)
    first = json.loads((folder / "scores.jsonl").read_text().splitlines()[0])
    assert first["place"] == "python:list row 1"
    with pytest.raises(ConfigError, match="overwrite=True"):
        run.score(pairs, folder / "scores-of-file.jsonl")
    with pytest.raises(ConfigError, match=r"data: chta: .* A source has rows or a path, and path, split"):
        run.score({"path": str(pairs), "chta": False}, folder / "other.jsonl")


def vowel(prompts, completions):
    return [float(any(letter in text for letter in "aeiou")) for text in completions]


def test_a_run_sorts_prompts_in_memory_as_from_its_folder(run, folder):
    prompts = [{"prompt": f"question {i}: "} for i in range(4)]
    options = {"verifier": vowel, "num_completions": 2, "threshold": 1, "max_new_tokens": 4}
    summary = falign.presample(run, prompts, folder / "sorted", **options)
    assert summary == falign.presample(run.path, prompts, folder / "sorted-of-path", **options, chat=False)
    assert summary.prompts == 4
    found, of_path = (
        json.loads((folder / name / "summary.json").read_text())["sampled_by"] for name in ("sorted", "sorted-of-path")
    )
    assert {"adapter", "weights", "tokenizer"} <= found.keys()
    assert (found["model"], found["verifier"]) == (str(run.path), "vowel")
    assert found["prompts"] == of_path["prompts"], "the run read its texts without the chat template"


def test_an_objective_of_ones_own_that_defines_no_reward_is_told_from_one_that_is_not_at_hand(model, pairs, folder):
    with pytest.raises(ConfigError, match=r"objective was an object in a program \(Mine\)"):
        falign.load(folder / "mine").score(pairs, folder / "mine.jsonl")
    with pytest.raises(ConfigError, match="defines no implicit reward"):
        falign.load(folder / "mine", objective=Mine()).score(pairs, folder / "mine.jsonl")
    with pytest.raises(ConfigError, match="objective differs from the one"):
        falign.load(folder / "mine", objective=Other()).score(pairs, folder / "mine.jsonl")
    exported = falign.load(folder / "mine").export("adapter")
    assert (exported.path / "adapter_model.safetensors").is_file()


class Other(Mine):
    """Another one."""


def test_an_export_is_proven_and_a_soup_is_recorded(run, folder):
    exported = run.export(out=folder / "merged")
    assert exported.path == folder / "merged"
    assert exported.proof.max_abs_logit_difference <= exported.proof.bound * exported.proof.max_abs_logit
    with pytest.raises(ConfigError, match="format='onnx' is unknown: choose adapter, merged, classifier or gguf"):
        run.export("onnx")
    with pytest.raises(ModelError, match="its tokenizer has no merges"):
        run.export("gguf", out=folder / "gguf")
    assert not (folder / "gguf").exists()
    record = falign.soup([run, shutil.copytree(run.path, folder / "twin")], folder / "soup", weights=[0.25, 0.75])
    assert [member.weight for member in record.members] == [0.25, 0.75]
    assert record.kind == "adapter"


def test_a_soup_refuses_an_adapter_that_is_not_the_one_that_was_trained(run, folder):
    damaged = shutil.copytree(run.path, folder / "damaged")
    file = damaged / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"is not what .* has trained"):
        falign.soup([run, damaged], folder / "other-soup")


def test_evaluations_are_typed_and_read_again(run, pairs, folder):
    rewards = falign.evaluate_rewards(run, "preferences", str(pairs), num_resamples=10)
    assert rewards.scorers["implicit_reward"].scores["accuracy"].value > 0.5
    samples = falign.evaluate_samples(
        run, rewards=str(run.path), num_completions=2, max_new_tokens=4, num_reference_completions=2
    )
    assert samples.num_prompts == 6
    assert {"reward", "divergence/reverse_kl"} <= samples.metrics.keys()
    assert read_evaluations(run.path) == (rewards, samples)
    short = {"num_completions": 2, "max_new_tokens": 4, "rewards": str(run.path)}
    asked = falign.evaluate_samples(run, [{"prompt": "question 1: "}], chat=False, name="asked", **short)
    assert (asked.num_prompts, asked.source) == (1, "python:list")
    shutil.rmtree(run.path / "evaluation" / "asked")
    frontier = falign.evaluate_frontier([run.path], folder / "frontier.json")
    assert [point.label for point in frontier.points] == ["run"]
    written = run.report()
    assert written.page.is_file()
    assert falign.report([run.path], folder / "pages").page.is_file()
    with pytest.raises(ConfigError, match="scorers='lenght' is unknown"):
        falign.evaluate_rewards(run, "preferences", str(pairs), name="again", scorers=["lenght"])


def test_functions_of_several_runs_take_runs_folders_or_a_single_one(run, folder):
    for given in (run, str(run.path), [run], [run.path]):
        assert [each.folder.path for each in falign.report(given, folder / "runs.html").runs] == [run.path]
        with pytest.raises(ConfigError, match=f"{run.path} has no finished evaluation of samples"):
            falign.evaluate_frontier(given, folder / "frontier.json", name="none")
        with pytest.raises(ConfigError, match="a soup of 1: give at least two"):
            falign.soup(given, folder / "soup-of-one")


def test_code_that_is_trusted_in_a_call_is_trusted_though_the_run_was_opened_without(model, pairs, folder, monkeypatch):
    (folder / "trusted_links.py").write_text("from falign.divergences import get\n\ndef js():\n    return get('js')\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    objective = {"divergence": "trusted_links:js", "beta": 0.5}
    out = folder / "own-code"
    falign.train(str(model), output_dir=out, **arguments(pairs, objective=objective))
    opened = falign.load(out)
    with pytest.raises(ConfigError, match="give trust_code=True"):
        falign.score(opened, pairs, out / "scores.jsonl")
    assert falign.score(opened, pairs, out / "scores.jsonl", trust_code=True).completions
    assert opened.trust_code is False


def test_prompts_to_sample_are_texts_and_conversations(run):
    conversation = [{"role": "user", "content": "ab"}]
    assert run.sample([conversation], max_new_tokens=2) == run.sample(["ab"], chat=True, max_new_tokens=2)


def test_options_of_models_by_name_are_refused_for_runs(run, folder):
    with pytest.raises(ConfigError, match=r"`dtype`: .* is a run, which has its own"):
        falign.sample(run, ["ab"], dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"`dtype`: .* is a run, which has its own"):
        falign.presample(run, [{"prompt": "ab"}], folder / "typed", verifier="number(answer='n')", dtype="bfloat16")
    with pytest.raises(ConfigError, match="tokenizer applies only to a loaded model: give `model` too"):
        falign.load(run.path, tokenizer=tiny_tokenizer())


def test_one_source_or_callback_or_reward_needs_no_list(model, pairs, folder):
    class Steps(TrainerCallback):
        seen = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.seen += 1

    steps = Steps()
    source = {"rows": rows(pairs), "chat": False}
    settings = arguments(pairs, data=source, training={"max_steps": 1, "per_device_train_batch_size": 4})
    one = falign.train(str(model), output_dir=folder / "one", callbacks=steps, **settings)
    assert steps.seen == 1
    listed = falign.train(str(model), output_dir=folder / "listed", **{**settings, "data": {"train": [source]}})
    assert all(torch.equal(tensor, adapter(listed)[name]) for name, tensor in adapter(one).items())
    with pytest.raises(ConfigError, match="rewards is a section of online runs"):
        falign.train(str(model), output_dir=folder / "refused", rewards={"kind": "math", "answer": "a"}, **settings)


def test_samples_are_judged_by_functions_and_by_runs(model, run, folder):
    def short(prompts, completions, **columns):
        return [-float(len(each)) for each in completions]

    prompts = [{"prompt": "ab"}, {"prompt": "c"}]
    found = falign.train(
        str(model),
        output_dir=folder / "judged",
        prompts={"train": {"rows": prompts, "chat": False}},
        rewards=short,
        objective={"kind": "policy_gradient"},
        training={"learning_rate": 0.01, "max_steps": 1},
        rollout={"prompts": 2, "completions": 2, "max_new_tokens": 3},
    )
    sampling = {"num_completions": 2, "max_new_tokens": 3, "overwrite": True}
    own = falign.evaluate_samples(found, prompts, **sampling)
    later = falign.load(found.path)
    with pytest.raises(ConfigError, match=r"rewards that were objects in a program \(short\).*: give `rewards`"):
        falign.evaluate_samples(later, prompts, **sampling)
    for rewards in (short, [short], [{"function": short}], found):
        judged = falign.evaluate_samples(later, prompts, rewards=rewards, **sampling)
        assert judged.metrics["reward"] == own.metrics["reward"]
    half = falign.evaluate_samples(later, prompts, rewards={"function": short, "weight": 0.5}, **sampling)
    assert half.metrics["reward"].value == 0.5 * own.metrics["reward"].value
    implicit = falign.evaluate_samples(found, prompts, rewards=run, divergence="jeffreys", **sampling)
    named = falign.evaluate_samples(found, prompts, rewards=str(run.path), divergence=["jeffreys"], **sampling)
    assert implicit.metrics == named.metrics

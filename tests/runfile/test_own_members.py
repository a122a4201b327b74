"""Members of a user's own in every family: whole runs with them, and their mistakes."""

import json
import re

import pytest
from rich.console import Console

from falign import divergences
from falign.errors import ConfigError
from falign.evaluation import benchmarks
from falign.objectives import TopK
from falign.runfile import parse_run
from falign.runs.named_code import named_code, own_code
from falign.training import train
from tests.runfile import own_members
from tests.runfile.own_members import CountingEngine
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

OWN = "tests.runfile.own_members"


@pytest.fixture
def offline(tiny, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl")
    slowly = {"learning_rate": 2e-3}
    return lambda objective: parse_run(
        run_data(tiny, data, tmp_path / "run", training=slowly) | {"objective": objective}
    )


@pytest.fixture
def online(tiny, tmp_path):
    data = write_prompts(tmp_path / "prompts.jsonl")

    def config(**changes):
        training = {"max_steps": 2, **changes.pop("training", {})}
        return parse_run(online_data(tiny, data, tmp_path / "run", training=training, **changes))

    return config


def run(config):
    return train(config, console=Console(quiet=True)).folder


def test_an_own_objective_trains_a_policy(offline):
    config = offline({"kind": f"{OWN}:Margin", "wanted": 2.0, "divergence": "alpha(0.3)"})
    assert config.check().divergence.name == "alpha(0.3)"
    folder = run(config)
    logs = [log["margin_loss"] for log in folder.metrics() if "margin_loss" in log]
    assert logs[0] == pytest.approx(4.0)
    assert logs[-1] < 3.0
    assert "wanted: 2.0" in folder.run_file.read_text()


def test_an_own_divergence_advantage_engine_and_reward_make_an_online_run(online, monkeypatch):
    made = []

    def close(engine):
        made.append(engine)

    monkeypatch.setattr(CountingEngine, "close", close)
    folder = run(
        online(
            objective={
                "kind": "policy_gradient",
                "divergence": f"{OWN}:skewed(0.25)",
                "beta": 0.1,
                "advantage": f"{OWN}:centred",
            },
            rollout={"engine": {"kind": f"{OWN}:CountingEngine", "colder": 2.0}},
            rewards=[{"kind": f"{OWN}:Length", "wanted": 6, "weight": 2.0}],
        )
    )
    assert any("reward/Length" in log for log in folder.metrics())
    assert [log for log in folder.metrics() if "loss" in log]
    assert made[0].calls >= 2
    assert made[0].colder == 2.0
    assert set(folder.read_inputs()["hashes"]["objective_code"]) == {
        f"{OWN}:skewed",
        f"{OWN}:centred",
        f"{OWN}:CountingEngine",
    }


def test_an_own_target_is_matched(online):
    objective = {"kind": "distribution_matching", "target": {"kind": f"{OWN}:Tilted", "strength": 0.5}}
    assert [log for log in run(online(objective=objective)).metrics() if "loss" in log]


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"kind": f"{OWN}:Margin", "wantd": 1.0}, r"unknown key 'objective.wantd'; did you mean wanted\? The settings"),
        ({"kind": f"{OWN}:Margin"}, rf"objective\.wanted is required by {OWN}:Margin"),
        ({"kind": f"{OWN}:Margin", "wanted": "much"}, r"objective\.wanted='much': Input should be a valid number"),
        ({"kind": f"{OWN}:Margin", "wanted": -1.0}, r"objective\.kind=.*: wanted=-1.0 must be positive"),
        ({"kind": f"{OWN}:Margin", "wanted": 1.0, "divergence": "jss"}, r"divergence='jss' is unknown.*'js'"),
        ({"kind": f"{OWN}:Margn", "wanted": 1.0}, r"objective\.kind='.*Margn': module .* has no attribute 'Margn'"),
        (
            {"kind": f"{OWN}:nothing"},
            r"makes a dict, which is not a falign Objective: it needs __call__, meas",
        ),
        ({"kind": f"{OWN}:Bare"}, r"makes a Bare, which is not a falign Objective: it needs __call__, meas"),
        ({"kind": "pairwise", "divergence": f"{OWN}:centred"}, r"objective\.divergence=.*: .*takes 0|missing|needs"),
        ({"kind": "pairwse"}, r"objective\.kind='pairwse' is unknown: did you mean pairwise\?.*module:Name"),
    ],
)
def test_a_mistake_in_the_section_of_an_own_member_is_named(offline, objective, message):
    with pytest.raises(ConfigError, match=message):
        offline(objective).check()


def test_an_engine_that_only_one_process_can_have_says_so(online):
    engine = online(rollout={"engine": {"kind": f"{OWN}:Alone"}}).rollout.engine
    engine.check_processes(1)
    with pytest.raises(ConfigError, match=r"rollout\.engine\.kind=.*:Alone with 2 processes"):
        engine.check_processes(2)
    with pytest.raises(ConfigError, match=r"not a subclass of falign.rollouts.Engine"):
        online(rollout={"engine": {"kind": f"{OWN}:Margin"}}).rollout.engine.check_processes(1)


def test_code_is_found_in_every_field_that_names_a_member(online, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_module.py").write_text("x = 1\n")
    config = online(
        objective={"kind": "own_module:Objective", "inner": {"loss": "own_module:loss"}, "text": "a: b"},
        rollout={"engine": {"kind": "own_module:Engine"}},
        rewards=[{"kind": "own_module:Reward"}, {"function": "own_module:f"}],
    )
    assert named_code(config) == {
        "rollout.engine.kind": "own_module:Engine",
        "rewards.0.kind": "own_module:Reward",
        "rewards.1.function": "own_module:f",
        "objective.kind": "own_module:Objective",
        "objective.inner.loss": "own_module:loss",
    }
    before = own_code(config)
    assert before.keys() == {"own_module:Engine", "own_module:Objective", "own_module:loss"}
    (tmp_path / "own_module.py").write_text("x = 2\n")
    assert all(before[name] != hashes for name, hashes in own_code(config).items())


def test_a_divergence_within_a_measure_is_code_too(tiny, tmp_path):
    value = f"divergence_to({OWN}:skewed)"
    config = parse_run(run_data(tiny, tmp_path / "pairs.jsonl", tmp_path / "run") | {"measures": {"gap": value}})
    assert named_code(config) == {"measures.gap": value}
    assert own_code(config)[f"{OWN}:skewed"].keys() == {OWN}
    elsewhere = config.model_copy(update={"measures": {"gap": "divergence_to(no_such_module:f)"}})
    elsewhere.check()  # a command that does not log measures imports none
    with pytest.raises(ConfigError, match="No module named 'no_such_module'"):
        elsewhere.build_measures()
    with pytest.raises(ConfigError, match=r"^measures\.gap='divergence_to\(no_such_module:f\)': .*No module named"):
        train(elsewhere, console=Console(quiet=True))  # before it looks for the data, which are not there


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("divergence_to(jensen_shannon, reference, cold)", "temperature=cold must be a number"),
        ("top_k(forward_kl, five, reference)", "k=five must be a whole number"),
        ("top_k(forward_kl, 5, refrence=reference)", "unknown argument 'refrence'; did you mean reference"),
        ("top_k(forward_kl, 5", "a parenthesis is missing"),
        ("divergence_to(jensen_shannon, reference, 0)", "temperature=0.0 must be positive and finite"),
        ("divergence_to(jensen)", "divergence 'jensen' is unknown"),
        ("entropy(3)", "positional argument.*; write it as in"),
    ],
)
def test_a_measure_with_wrong_arguments_is_named_by_its_field(tiny, tmp_path, value, reason):
    config = parse_run(run_data(tiny, tmp_path / "pairs.jsonl", tmp_path / "run") | {"measures": {"gap": value}})
    for build in (config.check, config.build_measures):
        with pytest.raises(ConfigError, match=rf"^measures\.gap='{re.escape(value)}': .*(?:{reason})"):
            build()


def test_an_own_measure_with_parentheses_is_told_to_be_a_section(tiny, tmp_path):
    content = run_data(tiny, tmp_path / "pairs.jsonl", tmp_path / "run")
    config = parse_run(content | {"measures": {"gap": f"{OWN}:MassOn([3])"}})
    with pytest.raises(ConfigError, match=rf"^measures\.gap='.*has its settings in a section: write {{kind: '{OWN}:M"):
        config.build_measures()


def test_a_measure_with_settings_is_a_section(tiny, tmp_path):
    sections = {
        "mass": {"kind": f"{OWN}:MassOn", "ids": [3, 5], "factor": 2},
        "skewed": {"kind": "divergence_to", "divergence": f"{OWN}:skewed", "temperature": 2},
        "drift": {"kind": "top_k", "divergence": "jensen_shannon", "k": 8},
        "entropy": {"kind": "entropy"},
        "named": "top_k(jensen_shannon, 8)",
    }
    content = run_data(tiny, tmp_path / "pairs.jsonl", tmp_path / "run") | {"measures": sections}
    config = parse_run(content)
    measures = config.build_measures()
    assert measures["mass"] == own_members.MassOn([3, 5], 2.0)
    assert measures["drift"] == measures["named"] == TopK(divergences.get("jensen_shannon"), 8)
    assert measures["skewed"].temperature == 2
    assert parse_run(json.loads(config.model_dump_json())).build_measures()["mass"] == measures["mass"]
    assert named_code(config) == {
        "measures.mass.kind": f"{OWN}:MassOn",
        "measures.skewed.divergence": f"{OWN}:skewed",
    }


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"kind": f"{OWN}:MassOn", "ids": [3], "factr": 2},
            r"unknown key 'measures\.mine\.factr'; did you mean factor",
        ),
        ({"kind": f"{OWN}:MassOn"}, r"measures\.mine\.ids is required by .*MassOn"),
        (
            {"kind": f"{OWN}:Bare"},
            r"measures\.mine\.kind=.*makes a Bare, which is not a falign Measure: it needs __call__",
        ),
        ({"kind": "top_k", "divergence": "jensen_shannon", "k": 0}, r"^measures\.mine: k=0 must be at least 1"),
        ({"kind": "top_k", "divergence": "jensen", "k": 3}, r"^measures\.mine\.divergence='jensen' is unknown"),
        ({"kind": "top_q"}, r"measures\.mine\.kind='top_q' is unknown: did you mean top_k\?"),
        ({"kind": "top_k", "k": 3}, r"measures\.mine\.divergence is required"),
        ({"kind": "top_k", "divergence": "le_cam", "k": 3, "tails": "none"}, r"measures\.mine\.tails'.*did you mean"),
        (3, r"measures\.mine=3: this is a section"),
    ],
)
def test_a_wrong_section_of_a_measure_is_refused_by_its_path(tiny, tmp_path, section, message):
    content = run_data(tiny, tmp_path / "pairs.jsonl", tmp_path / "run") | {"measures": {"mine": section}}
    with pytest.raises(ConfigError, match=message):
        parse_run(content).build_measures()


def test_a_divergence_within_another_is_code_too(offline):
    config = offline({"divergence": f"standardized({OWN}:skewed(0.25))"})
    assert named_code(config) == {"objective.divergence": f"standardized({OWN}:skewed(0.25))"}
    assert own_code(config)[f"{OWN}:skewed"].keys() == {OWN}


def test_an_own_benchmark_scores_a_model(falign, tiny, tmp_path):
    rows = [{"question": "Say a word: ", "good": "gladly", "bad": "no"}] * 3
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--out", tmp_path / "out", "--scorers", "length", "--reference-free")
    status, _, err = falign("evaluate", "rewards", tiny, f"{OWN}:TwoWords", tmp_path / "words.jsonl", *options)
    assert status == 0, err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["benchmark"] == "two_words"
    assert len((tmp_path / "out" / "items.jsonl").read_text().splitlines()) == 3
    with pytest.raises(
        ConfigError, match=r"benchmark=.* makes a list, not a falign Benchmark: it needs hub_name, name, outcome, "
    ):
        benchmarks.get("builtins:list")
    with pytest.raises(
        ConfigError, match=r"not a benchmark class: its instances need hub_name, .*, splits, subsets, summ"
    ):
        benchmarks.get("builtins:len")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"kind": f"{OWN}:Length", "wantd": 6}, r"unknown key 'rewards.wantd'; did you mean wanted\?"),
        ({"kind": "tests.training.prompts:vowels"}, "is a reward itself: write function: tests.training.prompts:vowel"),
        ({"kind": f"{OWN}:nothing"}, "makes a dict, which is not a falign Reward: it needs __call__"),
    ],
)
def test_a_mistake_in_the_section_of_an_own_reward_is_named(online, reward, message):
    with pytest.raises(ConfigError, match=message):
        online(rewards=[reward]).rewards[0].build()


def test_names_of_members_survive_the_resolved_run_file(online):
    config = online(rollout={"engine": {"kind": f"{OWN}:CountingEngine", "colder": 2.0}})
    again = parse_run(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config
    assert again.rollout.engine.model_extra == {"colder": 2.0}

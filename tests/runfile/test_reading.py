import pytest
import yaml

from falign.divergences import get
from falign.errors import ConfigError
from falign.objectives import Listwise, Pairwise, TokenPairwise, hinge
from falign.runfile import ListwiseConfig, PairwiseConfig, TokenPairwiseConfig, load_run_file, parse_run
from falign.runfile.reading import valid_paths

LEAST = {"output_dir": "run", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}}


def with_(section, **fields):
    return {**LEAST, section: {**LEAST.get(section, {}), **fields}}


@pytest.fixture
def run_file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults_and_nesting(run_file):
    config = load_run_file(run_file("output_dir: r\nmodel: {path: m}\ndata: {train: [{path: d}]}\n"))
    assert config.objective.beta == 0.1
    assert config.adapter is not None
    assert config.adapter.r == 16
    assert config.model.dtype == "auto"


def test_overrides_win_and_are_yaml(run_file):
    path = run_file("output_dir: r\nmodel: {path: m}\ndata: {train: [{path: d}]}\nobjective: {beta: 0.5}\n")
    config = load_run_file(
        path,
        ["objective.beta=0.3", "training.learning_rate=1e-4", "adapter=null", "data.train.0.limit=7", "seed=3"],
    )
    assert config.objective.beta == 0.3
    assert config.training.learning_rate == 1e-4
    assert config.adapter is None
    assert config.data.train[0].limit == 7
    assert config.seed == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            with_("training", learning_rat=1.0),
            "unknown key 'training.learning_rat': did you mean training.learning_rate",
        ),
        ({**LEAST, "learning_rate": 1.0}, "unknown key 'learning_rate': did you mean training.learning_rate"),
        (with_("objective", f_divergence_type="js"), "here it is objective.divergence"),
        (with_("objective", f_alpha_divergence_coef=0.5), r"alpha\(1 - coefficient\)"),
        (with_("data", max_prompt_length=5), "data.max_completion_length"),
        ({**LEAST, "data": {"train": [{"path": "d", "fromat": "hh"}]}}, "did you mean data.train.0.format?"),
        (with_("training", max_steps="many"), "training.max_steps='many'"),
        (with_("objective", beta=-1), "objective.beta=-1"),
        ({"output_dir": "r", "model": {}, "data": LEAST["data"]}, "model.path is required"),
        ({**LEAST, "zzz": 1}, "the keys there are output_dir, seed"),
        (with_("objective", betta=1.0), "unknown key 'objective.betta': did you mean objective.beta\\?"),
        (with_("objective", kind="listwise", beta=-1), "run: objective.beta=-1: Input should be greater"),
        (
            with_("objective", kind="token_pairwise", alfa=0.3),
            r"unknown key 'objective.alfa': did you mean objective.alpha\?",
        ),
        (
            with_("objective", alfa=0.3),
            r"did you mean objective.alpha, which kind=token_pairwise or kind=sequence_match has\?",
        ),
        (
            with_("objective", kind="listwise", margin_loss="hinge"),
            "'objective.margin_loss': objective.kind=listwise has no such field, kind=pairwise or "
            "kind=reward_model has. Its fields are kind, divergence, beta, length_norm.",
        ),
        (
            with_("objective", alpha=0.3),
            "'objective.alpha': objective.kind=pairwise has no such field, kind=token_pairwise or kind=sequence_match "
            "has. "
            "Its fields are kind, divergence, beta, margin_loss, length_norm, weighting, entropy_weight.",
        ),
        (with_("objective", kind="token_pairwise", length_norm="token"), "kind=pairwise or kind=listwise has"),
        (with_("objective", kind="listwise", zzz=1), "the keys there are kind, divergence, beta, length_norm"),
        (with_("objective", kind="token_pairwise", variant=3), "objective.variant=3: Input should be 1 or 2"),
        (
            with_("objective", kind="listwize"),
            r"objective.kind='listwize' is unknown: did you mean listwise\? Choose one of pairwise, anchored, l",
        ),
        (with_("objective", kind=None), "objective.kind=None is unknown: choose one of pairwise, anchored, listwise"),
        (
            {**LEAST, "data": {"train": [{"path": "d", "ignore": [True]}]}},
            "ignore.0=True: Input should be a valid string; .* as true or false, as it does yes, no, .* in quotes",
        ),
        (
            {**LEAST, "data": {"train": [{"path": "d", "ignore": [2024]}]}},
            r"ignore.0=2024: Input should be a valid string; YAML reads this as a number: put it in quotes\.",
        ),
        (
            {**LEAST, "data": {"train": [{"path": "d", "ignore": "history"}]}},
            r"data.train.0.ignore='history': Input should be a valid list; write \[history\]\.",
        ),
        (
            {**LEAST, "adapter": {"target_modules": ["q_proj", 1]}},
            r"run: adapter.target_modules.1=1: Input should be a valid string; YAML reads this as a number: .*s\.$",
        ),
        (
            with_("objective", beta={"from": 1, "too": 2, "steps": 3}),
            r"objective.beta.too is unknown \(did you mean to\?",
        ),
        (
            {**LEAST, "measures": {"e": {"kind": "entropy", "tempreture": 1}}},
            r"unknown key 'measures.e.tempreture': did you mean measures.e.temperature, which kind=divergence_to or",
        ),
        ({**LEAST, "objective": 3}, r"run: objective=3: this is a section, as in `objective: \{kind: ...\}`\."),
    ],
)
def test_a_mistake_is_named_with_its_remedy(data, message):
    with pytest.raises(ConfigError, match=message):
        parse_run(data)


@pytest.mark.parametrize(
    ("advantage", "message"),
    [
        (["group_normalised", {"kind": "ace", "alfa": 1}], "unknown key '{}.1.alfa': did you mean {}.1.alpha?"),
        (["group_normalised", {"kind": "ace", "alpha": "x"}], "{}.1.alpha='x': Input should be a valid number, "),
        (["group_normalized"], "{}.0.kind='group_normalized' is unknown: did you mean group_normalised? Choose one of"),
        (["none", {"alpha": 1}], "{}.1.kind is required: choose one of none, batch_mean, leave_one_out"),
        (3, "{}=3: Input should be a name or a list; write [3]."),
        ({"kind": "ace"}, "{}={'kind': 'ace'}: Input should be a name or a list."),
    ],
)
@pytest.mark.parametrize("kind", ["policy_gradient", "hybrid", "sum"])
def test_a_mistake_in_a_list_of_advantages_is_named_once_with_its_place(kind, advantage, message):
    objective = {"kind": kind, "advantage": advantage}
    place = "objective.advantage"
    if kind == "sum":
        objective = {"kind": "sum", "terms": {"pg": {"kind": "policy_gradient", "advantage": advantage}}}
        place = "objective.terms.pg.advantage"
    with pytest.raises(ConfigError) as caught:
        parse_run({**LEAST, "objective": objective})
    assert str(caught.value).startswith(f"run: {message.replace('{}', place)}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("samples", "message"), [(3, "Input should be a valid string; YAML reads this as a number: put it in quotes.")]
)
def test_a_value_that_may_be_a_path_or_a_text_is_named_once(samples, message):
    transform = {"kind": "calibrated", "samples": samples}
    with pytest.raises(ConfigError) as caught:
        parse_run({**LEAST, "rewards": [{"kind": "regex", "pattern": "a", "transform": transform}]})
    assert str(caught.value) == f"run: rewards.0.transform.samples={samples}: {message}"


@pytest.mark.parametrize("kind", ["pairwise", "listwise", "token_pairwise"])
def test_no_message_has_a_path_that_nobody_wrote(kind):
    fields = {"kind": kind, "beta": "much", "betta": 1, "zzz": 2, "divergence": 3}
    with pytest.raises(ConfigError) as caught:
        parse_run({**LEAST, "objective": fields})
    assert f"objective.{kind}" not in str(caught.value)
    for key in fields.keys() - {"kind"}:
        assert f"objective.{key}" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "config", "objective"),
    [
        ({}, PairwiseConfig, Pairwise(get("reverse_kl"))),
        (
            {"kind": "pairwise", "divergence": "js", "beta": 0.2, "margin_loss": "hinge", "length_norm": "token"},
            PairwiseConfig,
            Pairwise(get("js"), hinge, 0.2, "token"),
        ),
        ({"kind": "listwise"}, ListwiseConfig, Listwise(get("reverse_kl"))),
        (
            {"kind": "listwise", "divergence": "chi2_kl", "beta": 0.3, "length_norm": "token"},
            ListwiseConfig,
            Listwise(get("chi2_kl"), 0.3, "token"),
        ),
        ({"kind": "token_pairwise"}, TokenPairwiseConfig, TokenPairwise(get("forward_kl"), 0.1, 0.5, 2, "none")),
        (
            {"kind": "token_pairwise", "divergence": "pearson_chi2", "beta": 0.3, "alpha": 0.2},
            TokenPairwiseConfig,
            TokenPairwise(get("pearson_chi2"), 0.3, 0.2),
        ),
        (
            {"kind": "token_pairwise", "variant": 1, "weighting": "activations"},
            TokenPairwiseConfig,
            TokenPairwise(get("forward_kl"), variant=1, weighting="activations"),
        ),
    ],
)
def test_every_kind_of_objective_is_built_with_all_of_its_fields(fields, config, objective):
    run = parse_run({**LEAST, "objective": fields})
    assert isinstance(run.objective, config)
    assert run.check() == objective
    written = run.model_dump(mode="json")["objective"]
    assert written == run.objective.model_dump()
    assert written.keys() == set(config.model_fields)
    assert parse_run({**LEAST, "objective": written}).objective == run.objective


def test_an_override_changes_the_kind(run_file):
    path = run_file("output_dir: r\nmodel: {path: m}\ndata: {train: [{path: d}]}\nobjective: {beta: 0.5}\n")
    config = load_run_file(path, ["objective.kind=token_pairwise", "objective.alpha=0.2"])
    assert config.check() == TokenPairwise(get("forward_kl"), 0.5, 0.2)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("training.beta=0.1", "objective.beta?"),
        ("training.seed=1", "seed?"),
        ("training.output_dir=x", "output_dir?"),
        ("training.max_length=9", "data.max_length or prompts.max_length?"),
        ("training.format=hh", "data.train.0.format or data.eval.0.format?"),
        ("training.alpha=9", "adapter.alpha or reference.alpha or objective.alpha?"),
        ("data.beta=0.1", "objective.beta?"),
        ("model.adapter.r=8", "adapter.r?"),
        ("model.adapter={r: 8, alpha: 9}", "adapter?"),
        ("training.objective.beta=1", "objective.beta?"),
        ("data.train.0.fromat=hh", "data.train.0.format?"),
        ("modle.path=x", "model.path?"),
        ("modle={path: x, dtype: auto}", "model?"),
        ("traning.seeds=3", "seed?"),
    ],
)
def test_a_key_in_the_wrong_place_is_pointed_to_the_right_one(run_file, override, meant):
    with pytest.raises(ConfigError) as caught:
        load_run_file(run_file(yaml.safe_dump(LEAST)), [override])
    assert str(caught.value).endswith(f"did you mean {meant}")


@pytest.mark.parametrize(
    ("override", "here"),
    [
        ("training.lr=1", "training.learning_rate"),
        ("lr=1", "training.learning_rate"),
        ("training.bf16=true", "model.dtype"),
        ("batch_size=4", "training.per_device_train_batch_size"),
        ("training.train_batch_size=4", "training.per_device_train_batch_size"),
    ],
)
def test_other_names_of_a_field_are_known(run_file, override, here):
    with pytest.raises(ConfigError, match=f"(here it is|did you mean) {here}"):
        load_run_file(run_file(yaml.safe_dump(LEAST)), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.train.0=pairs.jsonl",
            "data.train.0='pairs.jsonl': this is a section, as in `data.train.0: {path: ...}`.",
        ),
        ("adapter=false", "adapter=False: this is a section, as in `adapter: {r: ...}`, or null."),
        ("model=gpt2", "model='gpt2': this is a section, as in `model: {path: ...}`."),
        ("data.train.train=x", "data.train.train: data.train is a list; did you mean data.train.0.train?"),
        ("data.train.path=x", "data.train.path: data.train is a list; did you mean data.train.0.path?"),
    ],
)
def test_a_value_in_place_of_a_section_says_what_a_section_looks_like(run_file, override, message):
    with pytest.raises(ConfigError) as caught:
        load_run_file(run_file(yaml.safe_dump(LEAST)), [override])
    assert message in str(caught.value)
    assert "Config" not in str(caught.value)


@pytest.mark.parametrize("path", ["objective.beta", "training.learning_rate", "adapter.alpha", "training.warmup_steps"])
@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_no_number_may_be_infinite_or_nan(run_file, path, value):
    with pytest.raises(ConfigError, match=rf"{path}={value[1:]}: Input should be a finite number"):
        load_run_file(run_file(yaml.safe_dump(LEAST)), [f"{path}={value}"])


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ConfigError, match=r"(?s)beta.*learning_rat|learning_rat.*beta"):
        parse_run({**with_("training", learning_rat=1.0), "objective": {"beta": 0}})


@pytest.mark.parametrize(
    ("text", "message"),
    [("model: [unclosed\nx: y\n", r"run.yaml:\d+ is not YAML"), ("- a\n", "holds list"), ("", "holds NoneType")],
)
def test_a_file_that_is_no_run_file(run_file, text, message):
    with pytest.raises(ConfigError, match=message):
        load_run_file(run_file(text))


def test_a_missing_file_names_the_nearest(run_file):
    path = run_file("x: 1\n")
    with pytest.raises(ConfigError, match=r"Did you mean .*run.yaml"):
        load_run_file(path.with_name("runn.yaml"))


@pytest.mark.parametrize(
    "override", ["objective.beta", "=3", "output_dir.x=1", "data.train.4.path=x", "objective.beta=["]
)
def test_a_bad_override_is_quoted(run_file, override):
    with pytest.raises(ConfigError, match=r"section.field=value|not a section|is a value|items 0 to 0|not YAML"):
        load_run_file(run_file("output_dir: r\nmodel: {path: m}\ndata: {train: [{path: d}]}\n"), [override])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_("objective", divergence="pearson_chi2"), "no closed form under pearson_chi2"),
        (with_("objective", divergence="kl"), "does not say which"),
        (with_("objective", kind="listwise", divergence="le_cam"), "no closed form under le_cam"),
        (with_("objective", kind="token_pairwise", variant=1, alpha=0.5), "objective: alpha=0.5 with variant=1"),
        (
            with_("objective", kind="token_pairwise", divergence="chi"),
            "'chi' is unknown; did you mean 'chi2'",
        ),
        (with_("objective", divergence="zzz"), "objective.divergence='zzz' is unknown; choose one of"),
        (with_("objective", margin_loss="zzz"), "margin_loss 'zzz' is unknown; choose one of"),
        (with_("objective", margin_loss="robust(.)"), r"margin_loss 'robust\(.\)': '.' is not a number; write robust"),
        (with_("objective", margin_loss="robust(much)"), r"'much' is not a number; write robust\(0.1\)"),
        (with_("objective", margin_loss="robust()"), r"'' is not a number; write robust\(0.1\)"),
        (with_("objective", divergence="nowhere:f"), "importable module:Name"),
        (with_("objective", divergence="math:pi"), "is a float, not a falign Divergence"),
        (
            {**with_("model", quantization="nf4"), "adapter": None},
            "quantized weights do not train",
        ),
        ({**LEAST, "adapter": None, "reference": {"kind": "adapter_off"}}, "set reference.kind=frozen"),
        (with_("training", eval_steps=5), "needs data.eval"),
    ],
)
def test_a_combination_that_cannot_work_is_refused_before_anything_is_loaded(data, message):
    with pytest.raises(ConfigError, match=message):
        parse_run(data).check()


def test_every_config_of_the_repository_is_valid():
    from pathlib import Path

    files = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert len(files) >= 6
    for file in files:
        config = load_run_file(file)
        config.check()
        for source in () if config.prompts is None else config.prompts.train:
            if source.path == "demo:polite-preference":  # a third of its rows has a part of the prompt in this column
                assert "{input}" in (source.template or "")


def test_valid_paths_reach_into_lists_and_optional_sections():
    paths = list(valid_paths())
    assert {"adapter.r", "data.train.0.format", "objective.beta", "seed"} <= set(paths)
    assert {"objective.margin_loss", "objective.alpha", "objective.kind"} <= set(paths)
    assert len(paths) == len(set(paths))


def test_a_divergence_of_ones_own_by_import_path(monkeypatch, tmp_path):
    (tmp_path / "my_divergences.py").write_text(
        "from falign.divergences import from_generator\nmine = from_generator(lambda u: u * u.log(), name='mine')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    objective = parse_run(with_("objective", divergence="my_divergences:mine")).check()
    assert objective.divergence.name == "mine"


@pytest.mark.parametrize("index", ["²", "٣", "9" * 5000])
def test_an_index_that_is_none_is_refused(tmp_path, index):
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: x\nmodel: {path: x}\ndata: {train: [{path: x}]}\n")
    with pytest.raises(ConfigError, match=r"data\.train is a list|is not one of the items 0 to 0"):
        load_run_file(file, [f"data.train.{index}.path=y"])


def test_a_value_is_shown_short(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path") as caught:
        parse_run({"output_dir": "x", "model": {"path": list(range(10**5))}})
    assert len(str(caught.value)) < 300


def test_of_many_mistakes_the_first_are_told_and_the_others_counted():
    with pytest.raises(ConfigError, match=r"rewards\.19=0: .*\n  and 280 more\.$") as caught:
        parse_run({"output_dir": "x", "model": {"path": "x"}, "rewards": [0] * 300})
    assert len(str(caught.value).splitlines()) == 21

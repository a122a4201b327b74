import pytest

from falign.errors import ConfigError
from falign.training import load_run_file, parse_run
from falign.training.run_file import valid_paths

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
        ({**LEAST, "data": {"train": [{"path": "d", "fromat": "hh"}]}}, "did you mean data.train.format"),
        (with_("training", max_steps="many"), "training.max_steps='many'"),
        (with_("objective", beta=-1), "objective.beta=-1"),
        ({"output_dir": "r", "model": {}, "data": LEAST["data"]}, "model.path is required"),
        ({**LEAST, "zzz": 1}, "the keys there are output_dir, seed"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(data, message):
    with pytest.raises(ConfigError, match=message):
        parse_run(data)


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
        (with_("objective", divergence="nowhere:f"), "importable module:attribute"),
        (with_("objective", divergence="math:pi"), "is a float, not a falign Divergence"),
        ({**with_("model", quantization="nf4"), "adapter": None}, "4-bit weights do not train"),
        ({**LEAST, "adapter": None, "reference": {"kind": "adapter_off"}}, "set reference.kind=frozen"),
        (with_("reference", path="x"), "reference.kind=frozen only"),
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
        load_run_file(file).check()


def test_valid_paths_reach_into_lists_and_optional_sections():
    assert {"adapter.r", "data.train.format", "objective.beta", "seed"} <= set(valid_paths())


def test_a_divergence_of_ones_own_by_import_path(monkeypatch, tmp_path):
    (tmp_path / "my_divergences.py").write_text(
        "from falign.divergences import from_generator\nmine = from_generator(lambda u: u * u.log(), name='mine')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    objective = parse_run(with_("objective", divergence="my_divergences:mine")).check()
    assert objective.divergence.name == "mine"

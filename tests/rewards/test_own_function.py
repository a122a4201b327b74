import re

import pytest

from falign.errors import ConfigError, RewardError
from falign.rewards import ChildPool, OwnFunction, TimedFunction, reward_identity
from falign.runfile.base_config import named_divergence

FUNCTIONS = "tests.rewards.functions"
CHAT = [[{"role": "user", "content": "q"}]] * 2


@pytest.fixture(scope="module")
def pool():
    pool = ChildPool(num_workers=1, memory_bytes=None)
    yield pool
    pool.close()


@pytest.fixture(params=["in this process", "in a process of its own"])
def make(request, pool):
    """Return what makes a reward of a function's name."""

    def made(name, form="falign"):
        if request.param == "in this process":
            return OwnFunction(f"{FUNCTIONS}:{name}", form)
        return TimedFunction(f"{FUNCTIONS}:{name}", form=form, pool=pool)

    return made


def test_a_function_for_trl_gets_the_messages_of_conversations(make):
    assert make("of_trl", "trl")(CHAT, ["a", "b"], answer=["a", "x"]) == [1.0, 0.0]
    assert make("of_trl_in_lists", "trl")(CHAT, ["a", "bcd"]) == [1.0, 3.0]


def test_a_function_for_verl_is_called_for_each_completion(make):
    columns = {"data_source": ["a", "b"], "ground_truth": ["x", "y"]}
    assert make("compute_score", "verl")(["p", "p"], ["x", "x"], **columns) == [1.0, 10.0]
    extra = {"extra_info": [{"bonus": 0.5}, None]}
    assert make("compute_score", "verl")(["p", "p"], ["x", "x"], **columns, **extra) == [1.5, 10.0]
    nested = {
        "reward_model": [{"style": "rule", "ground_truth": "x"}, {"ground_truth": "y"}],
        "data_source": ["a", "a"],
    }
    assert make("compute_score", "verl")(["p", "p"], ["x", "x"], **nested) == [1.0, 0.0]
    assert make("compute_score_with_details", "verl")(["p", "p"], ["x", "x"], **columns) == [1.0, 0.0]


def test_async_functions_are_awaited(make):
    assert make("judged")(["p", "p"], ["a", "b"], answer=["a", "x"]) == [1.0, 0.0]
    columns = {"data_source": ["a", "b"], "ground_truth": ["x", "y"]}
    assert make("compute_score_of_a_judge", "verl")(["p", "p"], ["x", "x"], **columns) == [1.0, 0.0]


def test_all_batches_share_one_event_loop_so_that_clients_stay_usable(make):
    reward = make("loop_of")
    assert reward(["p"], ["a"]) == reward(["p"], ["b"])


def test_what_trl_gives_besides_is_named_unless_it_has_a_default(make):
    assert make("with_trainer_state_or_none")(["p"], ["a"]) == [1.0]
    with pytest.raises(RewardError, match=r"'trainer_state' is given by TRL's trainer alone; give it a default value"):
        make("with_trainer_state", "trl").row_errors(["p"], answer=["a"])


def test_a_function_of_another_form_is_told_which(make):
    with pytest.raises(RewardError, match=r"written for TRL's conversations: set form: trl") as caught:
        make("of_trl")(CHAT, ["a", "b"], answer=["a", "b"])
    assert "errors: count" not in str(caught.value)
    with pytest.raises(RewardError, match=r"The prompts are texts.* set prompts.train.0.chat: true"):
        make("of_trl", "trl")(["p", "p"], ["a", "b"], answer=["a", "b"])
    with pytest.raises(ConfigError, match="has a parameter 'solution_str', so it is written for verl: set form: verl"):
        make("compute_score")
    with pytest.raises(ConfigError, match="has no parameter 'solution_str', which form: verl gives it"):
        make("judged", "verl")


def test_a_parameter_that_is_no_column_is_named_before_anything_is_judged(make):
    with pytest.raises(
        RewardError, match=r"'answr' is neither a column of the data, which has \['answer', 'level'\]"
    ) as e:
        make("with_a_typo").row_errors(["p"], answer=["a"], level=[1], place=["r:1"], prompt_ids=[[1]])
    assert "Did you mean 'answer'?" in str(e.value)
    assert make("judged").row_errors(["p", "q"], answer=["a", "b"]) == [None, None]
    with pytest.raises(RewardError, match="'ground_truth' is neither"):
        make("compute_score", "verl").row_errors(["p"], data_source=["a"])
    with pytest.raises(ConfigError, match="'completions' has no name for callers"):
        make("unnamed")


def test_an_exception_has_the_lines_of_the_users_file_and_the_completion(make):
    with pytest.raises(RewardError) as caught:
        make("parses")(["p"] * 3, ["12", "thirteen", "14"], answer=[12, 13, 14], place=["r:1", "r:2", "r:3"])
    message = str(caught.value)
    assert message.startswith(f"reward {FUNCTIONS}:parses, r:2: ValueError: invalid literal for int()")
    assert re.search(r'functions.py", line \d+, in _number\n    return int\(text\)', message)
    assert re.search(r'functions.py", line \d+, in (parses|<listcomp>)\n', message)
    assert "falign/rewards" not in message
    assert "completion: 'thirteen'" in message


def test_an_exception_of_all_completions_names_them_all_and_shows_no_escape_sequence():
    with pytest.raises(RewardError) as caught:
        OwnFunction(f"{FUNCTIONS}:at_once")(["p"] * 2, ["a", "b"], place=["r:1", "r:2"])
    message = str(caught.value)
    assert f"{FUNCTIONS}:at_once, completions of r:1 to r:2: RuntimeError: 2 completions\\x1b[31m at once" in message
    assert "\x1b" not in message


@pytest.mark.parametrize(("name", "told"), [("leaves", "SystemExit: 0"), ("leaves_later", "SystemExit: no judge")])
def test_a_function_that_ends_the_program_is_an_error_with_its_line(make, name, told):
    with pytest.raises(RewardError) as caught:
        make(name)(["p"], ["a"], place=["r:1"])
    assert f"{FUNCTIONS}:{name}, r:1: {told}" in str(caught.value)
    assert re.search(rf'functions.py", line \d+, in {name}\n    raise SystemExit', str(caught.value))


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("1 / 0", r"ZeroDivisionError: division by zero\n.*own_module_0\.py\", line 2, in <module>\n    1 / 0"),
        ("raise SystemExit(0)", r"SystemExit: 0\n.*own_module_1\.py\", line 2.*if __name__ == '__main__'"),
        (
            "import nowhere_to_be_found",
            r"ModuleNotFoundError: No module named 'nowhere_to_be_found'\n.*own_module_2\.py\", line 2",
        ),
        ("def f(:", r"invalid syntax \(own_module_3\.py, line 2\)"),
    ],
)
def test_a_module_that_fails_when_it_is_imported_is_told_with_its_line(tmp_path, monkeypatch, code, told):
    module = f"own_module_{['1 /', 'rai', 'imp', 'def'].index(code[:3])}"
    (tmp_path / f"{module}.py").write_text(f"# mine\n{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"(?s)reward '{module}:f': {told}"):
        OwnFunction(f"{module}:f")
    with pytest.raises(ConfigError, match=rf"(?s)objective.divergence='{module}:f': {told}"):
        named_divergence(f"{module}:f")


def test_a_message_holds_no_secret_of_the_environment(make, monkeypatch, pool):
    monkeypatch.setenv("MY_API_KEY", "sk-thirteen")
    with pytest.raises(RewardError) as caught:
        make("parses")(["p"], ["sk-thirteen https://me:pass@host"], answer=[13])
    assert "thirteen" not in str(caught.value)
    assert "pass" not in str(caught.value).replace("parses", "")


def test_the_form_is_part_of_the_identity():
    names = [OwnFunction(f"{FUNCTIONS}:of_trl", form) for form in ("falign", "trl")]
    names += [TimedFunction(f"{FUNCTIONS}:of_trl", form=form) for form in ("falign", "trl")]
    assert len({reward_identity(reward) for reward in names}) == 4

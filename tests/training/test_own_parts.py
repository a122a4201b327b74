"""Exceptions in a user's own parts of an objective name the part and the step."""

import pytest
import torch
from rich.console import Console

from falign import divergences
from falign.errors import ConfigError, MemberError, TrainingError
from falign.objectives import CompletionBatch, Pairwise, PolicyGradient, Schedule, Scheduled, Sum
from falign.runfile import parse_run
from falign.training import train
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

CODE = """
from falign.objectives import Controller

class Part:
    needs, measures, references = frozenset(), {}, frozenset()

class Measure(Part):
    def __call__(self, at): return at.logprobs[:, 10**6]

class Weight(Part):
    def __call__(self, batch): return {}["weight"]

class Transform(Part):
    def transform(self, advantages, batch): return 1 / 0

def advantage(rewards): return rewards

class Objective(Part):
    def __init__(self, divergence=None, beta=None): pass
    def __call__(self, batch): return batch.logprobs.no_such_method()

class Raises(Controller):
    def __init__(self, start, metric='rewards/margins'): self.start, self.metric = start, metric
    def start_state(self): return {'value': self.start}
    def value(self, state): return state['value']
    def after(self, state, measured): return {'value': state['valeu']}

class KeepsTensor(Raises):
    def after(self, state, measured):
        import torch
        return {'value': self.start, 'seen': torch.tensor(measured)}

class BeginsWithTuple(Raises):
    def start_state(self): return {'value': self.start, 'seen': (1.0, 2.0)}
"""


@pytest.fixture
def start(tiny, tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    pairs, prompts = write_pairs(tmp_path / "pairs.jsonl"), write_prompts(tmp_path / "prompts.jsonl")

    def run(online=False, **changes):
        make, data = (online_data, prompts) if online else (run_data, pairs)
        data = make(tiny, data, tmp_path / "run", **{"training": {"max_steps": 3}, **changes})
        return train(parse_run(data), console=Console(quiet=True))

    return run


def gradient(**fields):
    return {"objective": {"kind": "policy_gradient", "divergence": "reverse_kl", "beta": 0.1, **fields}}


@pytest.mark.parametrize(
    ("online", "changes", "message", "cause"),
    [
        (
            False,
            {"measures": {"mine": "own_parts:Measure"}},
            "Evaluation at step 0: measure 'mine': Measure",
            IndexError,
        ),
        (
            False,
            {"objective": {"kind": "own_parts:Objective"}},
            "Evaluation at step 0: objective Object",
            AttributeError,
        ),
        (True, gradient(weights=["own_parts:Weight"]), "Step 1: token weight Weight", KeyError),
        (True, gradient(advantage=["none", "own_parts:Transform"]), "Step 1: advantage Transf", ZeroDivisionError),
        (True, gradient(advantage="own_parts:advantage"), "Step 1: advantage advantage", TypeError),
        (
            False,
            {"objective": {"beta": {"controller": "own_parts:Raises", "start": 0.1}}},
            "beta: controller Raises",
            KeyError,
        ),
    ],
    ids=["measure", "objective", "weight", "transform", "advantage", "controller"],
)
def test_a_part_that_raises_is_named_with_the_step_and_its_line(start, online, changes, message, cause):
    with pytest.raises(
        TrainingError, match=rf"^(Step \d: )?{message}.*: {cause.__name__}: (.|\n)*Correct its code"
    ) as info:
        start(online, **changes)
    assert isinstance(info.value.__cause__, cause)
    assert cause is TypeError or "own_parts.py" in str(info.value)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "KeepsTensor",
            TrainingError,
            r"Step 2: beta: controller KeepsTensor: its state is .*tensor.*JSON serializable",
        ),
        (
            "BeginsWithTuple",
            ConfigError,
            r"objective: beta: .*BeginsWithTuple.*give back .*\[1.0, 2.0\].*plain numbers",
        ),
    ],
)
def test_a_state_that_a_checkpoint_cannot_hold_is_refused_at_once(start, name, error, message):
    beta = {"controller": f"own_parts:{name}", "start": 0.1}
    with pytest.raises(error, match=message):
        start(objective={"beta": beta}, training={"max_steps": 3, "save_steps": 3})


class Falls(Schedule):
    knots = (0, 10)

    def __call__(self, step):
        return 1 / (step - 3)


def test_a_schedule_that_raises_is_named_with_its_coefficient_and_the_step():
    annealed = Scheduled(Pairwise(divergences.get("reverse_kl")), {"beta": _Positive()})
    with pytest.raises(MemberError, match="beta, step 3: schedule _Positive: ZeroDivisionError"):
        annealed.at(3)


class _Positive(Falls):
    def __call__(self, step):
        return abs(super().__call__(step))


def test_mistakes_in_the_use_of_faligns_own_parts_stay_as_they_are():
    batch = CompletionBatch(
        logprobs=torch.zeros(2, 1),
        completion_mask=torch.ones(2, 1, dtype=torch.bool),
        prompt_index=torch.tensor([0, 0]),
    )
    both = Sum({"pg": PolicyGradient(advantage=["leave_one_out", "stcr"])})
    with pytest.raises(ValueError, match="rewards") as info:
        both.prepare(batch)
    assert not isinstance(info.value, MemberError)

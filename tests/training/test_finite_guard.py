import io
import json
import math

import pytest
import torch
from rich.console import Console

from falign import divergences
from falign.errors import NonFiniteRewardError, TrainingError
from falign.objectives import CompletionBatch, Hybrid, Pairwise, PolicyGradient, Rehearsal
from falign.runfile import parse_run
from falign.runs.checkpoints import newest_undamaged
from falign.training import train
from falign.training.finite_guard import FiniteGuard, describe_loss
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, vowels, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

CALLS = {"reward": 0}


def bad_in_the_second_rollout(prompts, completions, **columns):
    """Vowels, of which one is infinite in the second call of training."""
    values = vowels(prompts, completions)
    CALLS["reward"] += 1
    if CALLS["reward"] == 2:
        values[1] = math.inf
    return values


@pytest.fixture
def start(tiny, tmp_path):
    def run(name="run", resume=False, console=None, **training):
        data = run_data(tiny, write_pairs(tmp_path / "pairs.jsonl"), tmp_path / name)
        data["data"]["eval_size"] = 0
        data["training"] |= {"max_steps": 4, "save_steps": 1, "save_total_limit": 9, **training}
        del data["sampling"]
        return train(parse_run(data), console=console or Console(quiet=True), resume=resume)

    return run


@pytest.fixture
def breaking(monkeypatch):
    """Return a function that makes the loss or the gradient of some steps NaN."""

    def at(*steps, what):
        original = Pairwise.__call__
        count = 0

        def breaks(self, batch):
            nonlocal count
            output = original(self, batch)
            if not batch.logprobs.requires_grad:
                return output
            count += 1
            losses = output.terms[0].losses
            if count in steps and what == "gradient":
                losses.register_hook(lambda gradient: gradient * math.nan)
            elif count in steps:
                losses = losses * math.inf
            return output._replace(terms=(output.terms[0]._replace(losses=losses),))

        monkeypatch.setattr(Pairwise, "__call__", breaks)

    return at


@pytest.mark.parametrize(
    ("what", "named"), [("loss", "the loss is inf on"), ("gradient", "the gradient's norm is nan")]
)
def test_the_first_loss_or_gradient_that_is_no_number_stops_with_step_rows_and_term(
    start, breaking, tmp_path, what, named
):
    breaking(3, what=what)
    with pytest.raises(
        TrainingError, match=rf"Step 3: {named}.*pairs.jsonl:\d+.*\(term pairwise.*training\.skip_bad=true"
    ):
        start()
    assert newest_undamaged(tmp_path / "run", tell=print).name == "checkpoint-2"


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_skipped_changes_no_weight_and_is_counted_and_said(start, breaking, what):
    breaking(3, what=what)
    output = io.StringIO()
    folder = start(skip_bad=True, lr_scheduler_type="constant", console=Console(file=output, width=999)).folder
    weights = [(folder.path / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes() for step in (1, 2, 3, 4)]
    assert weights[1] == weights[2]
    assert len(set(weights)) == 3
    moments = [torch.load(folder.path / f"checkpoint-{step}" / "optimizer.pt")["state"][0] for step in (2, 3)]
    assert torch.equal(moments[0]["exp_avg"], moments[1]["exp_avg"])
    logs = [log for log in folder.metrics() if "learning_rate" in log]
    assert [log["skipped_steps"] for log in logs] == [0, 0, 1, 1]
    assert ["loss" in log for log in logs] == [True, True, False, True]
    assert all(math.isfinite(value) for log in logs for value in log.values())
    assert "Skipped (training.skip_bad); 1 so far." in output.getvalue()


def test_a_run_that_stopped_goes_on_with_skip_bad_as_one_that_had_it_from_the_start(start, breaking):
    breaking(3, what="loss")
    with pytest.raises(TrainingError):
        start("stopped")
    breaking(1, what="loss")  # the same step, the first after the resume
    resumed = start("stopped", resume=True, skip_bad=True)
    assert resumed.folder.read_run_file()["training"]["skip_bad"] is True
    logs = [log for log in resumed.folder.metrics() if "learning_rate" in log]
    assert [log.get("skipped_steps") for log in logs] == [None, None, 1, 1]


def test_the_mean_loss_is_that_of_the_steps_that_were_taken(start, breaking):
    breaking(2, what="loss")
    logs = start("by-one", skip_bad=True, max_steps=3).folder.metrics()
    taken = [log["loss"] for log in logs if "loss" in log]
    breaking(2, what="loss")
    (log,) = (
        log for log in start("by-three", skip_bad=True, max_steps=3, logging_steps=3).folder.metrics() if "loss" in log
    )
    assert log["loss"] == pytest.approx(sum(taken) / 2, rel=1e-5)
    assert log["skipped_steps"] == 1


def run_online(tiny, tmp_path, console, **training):
    data = online_data(tiny, write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "run")
    data["prompts"]["eval_size"] = 0
    data["rewards"] = [{"kind": "function", "function": f"{__name__}:bad_in_the_second_rollout"}]
    data["training"] |= {"max_steps": 3, "save_steps": 1, **training}
    CALLS["reward"] = 0
    return train(parse_run(data), console=console)


def test_a_reward_that_is_no_number_stops_with_step_row_and_reward(tiny, tmp_path):
    with pytest.raises(
        NonFiniteRewardError, match=r"Step 2: reward .*prompts.jsonl:\d+: the value is inf.*training\.skip_bad=true"
    ):
        run_online(tiny, tmp_path, Console(quiet=True))
    assert newest_undamaged(tmp_path / "run", tell=print).name == "checkpoint-1"


def test_a_rollout_with_such_a_reward_is_left_out_and_counted_with_skip_bad(tiny, tmp_path):
    output = io.StringIO()
    summary = run_online(tiny, tmp_path, Console(file=output, width=999), skip_bad=True)
    logs = [log for log in summary.folder.metrics() if "loss" in log]
    assert [log["skipped_steps"] for log in logs] == [0, 1, 1]
    assert "the value is inf" in output.getvalue()
    lines = summary.folder.completions_file.read_text(encoding="utf-8").splitlines()
    assert all(math.isfinite(json.loads(line)["reward"]) for line in lines)
    assert len(lines) == 3 * 16


def test_too_many_in_a_row_stop_whatever_was_asked_for():
    guard = FiniteGuard(skip=True, tell=lambda text: None)

    def bad_step(step):
        guard.begin_step()
        assert not guard.check_gradient(math.nan, step=step, terms=("Pairwise",))

    for step in range(10):
        bad_step(step)
    guard.begin_step()
    assert guard.check_gradient(1.0, step=10, terms=("Pairwise",))
    for step in range(11, 21):
        bad_step(step)
    with pytest.raises(TrainingError, match="11th step in a row"):
        bad_step(21)
    assert guard.skipped == 21


def hybrid_batch(**changes):
    logprobs = torch.full((4, 2), -1.0, requires_grad=True)
    return CompletionBatch(
        **{
            "logprobs": logprobs,
            "completion_mask": torch.ones(4, 2, dtype=torch.bool),
            "prompt_index": torch.tensor([0, 0, 1, 2]),
            "old_logprobs": logprobs.detach(),
            "reference_logprobs": torch.full((4, 2), -1.5),
            "rewards": torch.tensor([1.0, 0.0, 0.0, 0.0]),
            "from_reference": torch.tensor([False, False, True, True]),
            **changes,
        }
    )


def test_the_term_and_the_rows_of_it_and_the_cause_are_named():
    hybrid = Hybrid(PolicyGradient(), Rehearsal(divergences.get("jensen_shannon")), coefficient=0.1)
    reference = torch.full((4, 2), -1.5)
    reference[3, 1] = math.nan
    batch = hybrid_batch(reference_logprobs=reference)
    message = describe_loss(hybrid, batch, hybrid(batch), ["a:1", "a:1", "b:1", "b:2"])
    assert message == "the loss is nan on b:2 (term rehearsal; NaN or infinite in the input: reference_logprobs)."

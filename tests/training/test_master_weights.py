"""bfloat16 weights with float32 copies take the steps of float32 weights; without copies small ones are lost."""

import io

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from falign.models import load_model
from falign.runfile import parse_run
from falign.training import train
from falign.training.master_weights import MasterWeights, share_below_rounding
from falign.training.trainer import AlignmentTrainer
from tests.models.tiny import save_tiny
from tests.training.pairs import run_data, write_pairs

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

RATE = 1e-6


def stepped(weight, gradients, *, masters=False):
    """Weights after Adam's steps at a learning rate of 1e-6."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter], lr=RATE, weight_decay=0.0)
    if masters:
        MasterWeights(optimizer)
    for gradient in gradients:
        parameter.grad = gradient.to(weight.dtype)
        optimizer.step()
        optimizer.zero_grad()
        parameter.grad = None
    return parameter.detach()


def test_small_updates_are_added_up_as_in_float32_and_lost_without_copies():
    draw = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(20_000, generator=draw)).bfloat16()  # the scale of a language model's weights
    direction = torch.randn(20_000, generator=draw)
    gradients = [(direction + 0.3 * torch.randn(20_000, generator=draw)).bfloat16() for _ in range(300)]
    exact = stepped(weight.float(), gradients)
    with_masters, without = stepped(weight, gradients, masters=True), stepped(weight, gradients)
    assert torch.equal(with_masters, exact.bfloat16())
    shares = [float((each != weight).float().mean()) for each in (exact.bfloat16(), with_masters, without)]
    assert shares[0] == shares[1] > 0.9
    assert shares[2] < 0.05
    assert share_below_rounding([weight], RATE) == pytest.approx(1 - shares[2], abs=0.02)
    assert share_below_rounding([weight], 1.0) == 0


def test_a_step_without_gradient_moves_neither_copy_nor_weight():
    weight, other = (torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = torch.optim.SGD([weight, other], lr=0.001)
    MasterWeights(optimizer)
    weight.grad = torch.ones(3, dtype=torch.bfloat16)
    optimizer.step()
    assert weight.tolist() == other.tolist() == [1, 1, 1]
    copies = optimizer.state_dict()["master_weights"]
    assert copies[0].tolist() == pytest.approx([0.999] * 3)
    assert copies[1].tolist() == [1, 1, 1]
    weight.grad = None
    optimizer.step()
    assert torch.equal(optimizer.state_dict()["master_weights"][0], copies[0])


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.first = {name: each.grad.float() for name, each in model.named_parameters()}


@pytest.fixture
def start(tmp_path):
    models = {name: save_tiny(tmp_path / name, dtype=getattr(torch, name)) for name in ("float32", "bfloat16")}
    data, told = write_pairs(tmp_path / "pairs.jsonl"), io.StringIO()

    def run(name, *, model="bfloat16", dtype="bfloat16", resume=False, **training):
        training = {"learning_rate": RATE, "max_steps": 4, "gradient_accumulation_steps": 2, **training}
        changes = {"adapter": None, "model": {"dtype": dtype}, "training": training}
        seen = Gradients()
        config = parse_run(run_data(models[model], data, tmp_path / name, **changes))
        console = Console(file=told, width=500)
        return train(config, console=console, resume=resume, callbacks=[seen]), seen

    run.told, run.models = told, models
    return run


def test_a_run_with_copies_takes_the_steps_of_float32_resumes_and_keeps_its_dtype(start, monkeypatch):
    setting = {"master_weights": "float32", "save_steps": 2}
    whole, seen = start("whole", **setting)
    exact, seen_exact = start("exact", dtype="float32", save_steps=2)
    assert "lost to rounding" not in start.told.getvalue()
    first, exact_first = (torch.cat([g.flatten() for g in each.first.values()]) for each in (seen, seen_exact))
    assert (first - exact_first).norm() < 0.03 * exact_first.norm()  # a bfloat16 forward and backward pass

    def copies(summary):
        return torch.load(summary.folder.path / "checkpoint-4" / "optimizer.pt", weights_only=True)["master_weights"]

    base = load_model(start.models["bfloat16"], dtype="float32").state_dict()
    trained, moved = load_model(whole.folder.weights), load_model(exact.folder.weights)
    assert trained.dtype == torch.bfloat16
    assert moved.dtype == torch.float32, "what was trained, not the checkpoint's dtype, which would round it away"
    steps = torch.cat([(moved.state_dict()[name] - base[name]).flatten() for name in base])
    # Groups of the optimizer order the parameters differently, so that only sums over all can be compared.
    masters = torch.cat([each.flatten() for each in copies(whole)]).sort().values
    exact_weights = torch.cat([each.flatten() for each in moved.state_dict().values()]).sort().values
    assert float((masters - exact_weights).abs().max()) < 4 * RATE
    assert float((steps != 0).float().mean()) > 0.8  # all but the embeddings of tokens that do not occur

    original = AlignmentTrainer.compute_loss

    def dies(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AlignmentTrainer, "compute_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            start("broken", **setting)
    resumed, _ = start("broken", resume=True, **setting)
    assert all(torch.equal(one, other) for one, other in zip(copies(resumed), copies(whole), strict=True))
    assert resumed.after == whole.after


def test_without_copies_the_run_says_how_many_weights_a_step_leaves_as_they_are(start):
    run, _ = start("plain", max_steps=1)
    base, trained = load_model(start.models["bfloat16"]).state_dict(), load_model(run.folder.weights).state_dict()
    still = sum(int((base[name] == trained[name]).sum()) for name in base) / sum(each.numel() for each in base.values())
    assert f"is lost to rounding in {share_below_rounding(base.values(), RATE):.1%} of the weights" in (
        start.told.getvalue()
    )
    assert still > 0.97
    assert "Set training.master_weights=float32" in start.told.getvalue()

"""Every reference is the untrained policy at the first step, and a cached one trains as the live one does."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from falign.errors import DataError
from falign.methods import FDPO
from falign.objectives import TokenWeighting
from falign.references import AdapterOff, Cached, CacheKey, FrozenModel, Reference
from falign.scoring import CompletionStates, Scorer, TokenBatch
from tests.equivalence.runs import CHUNK, PAD, alignment_trainer, lora_policy, run, trees
from tests.scoring.models import tiny_model

KEY = CacheKey(weights="base", config="c", vocabulary=260, tokenizer="none", dtype="float32", attention="sdpa")
BATCHES = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}
ZERO_AT_START = (
    *("rewards/chosen", "rewards/rejected", "rewards/margins"),
    *("logratios/chosen", "logratios/rejected"),
)


@dataclass
class Counted(Reference):
    """A reference that counts how often it is asked."""

    inner: Reference
    calls: int = 0

    @override
    def identity(self) -> dict[str, Any]:
        return self.inner.identity()

    @override
    def logprobs(self, policy_model: nn.Module, batch: TokenBatch) -> Tensor:
        self.calls += 1
        return self.inner.logprobs(policy_model, batch)

    @override
    def states(
        self, policy_model: nn.Module, batch: TokenBatch, *, weighting: TokenWeighting = "none"
    ) -> CompletionStates:
        return self.inner.states(policy_model, batch, weighting=weighting)


def build(kind: str, folder, **overrides) -> Reference:
    live = AdapterOff(chunk_tokens=CHUNK)
    if kind == "frozen_model":
        return FrozenModel(tiny_model("llama", **overrides), chunk_tokens=CHUNK)
    return Cached(live, directory=folder / "cache", key=KEY) if kind == "cached" else live


def assert_starts_at_zero(log, prefix=""):
    assert {name: log[prefix + name] for name in ZERO_AT_START} == dict.fromkeys(ZERO_AT_START, 0.0)
    assert log[prefix + "rewards/accuracies"] == 0.5


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("kind", ["adapter_off", "frozen_model", "cached"])
def test_the_first_step_starts_exactly_at_the_reference(tmp_path, kind, divergence):
    # Dropout of the adapter meets B = 0, so not even the training step sees it yet.
    policy, reference = lora_policy(dropout=0.5), build(kind, tmp_path)
    result = run(tmp_path, policy, reference, FDPO(divergence, 0.3), train=trees(9), **BATCHES)
    first, _, last = result.logs
    assert_starts_at_zero(first)
    assert first["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-7)
    assert abs(last["logratios/chosen"]) > 1e-3


@pytest.mark.parametrize("kind", ["adapter_off", "frozen_model", "cached"])
def test_dropout_acts_on_the_policy_in_training_alone(tmp_path, kind):
    # In the base too, where B = 0 does not hide it; the held-out rows are the first training batch.
    policy, reference = lora_policy(dropout=0.5, attention_dropout=0.5), build(kind, tmp_path, attention_dropout=0.5)
    rows = trees(9)
    trainer = alignment_trainer(
        tmp_path,
        policy,
        reference,
        FDPO(beta=0.3),
        train=rows,
        held_out=rows[:3],
        layout="padded",  # for attention that has dropout
        **BATCHES,
        per_device_eval_batch_size=3,
    )
    at_rest = trainer.evaluate()
    assert_starts_at_zero(at_rest, "eval_")
    trainer.train()
    first = next(log for log in trainer.state.log_history if "loss" in log)
    for side in ("chosen", "rejected"):
        assert abs(first[f"logratios/{side}"]) > 1e-2
        of_reference = first[f"logps/{side}"] - first[f"logratios/{side}"]
        assert of_reference == pytest.approx(at_rest[f"eval_logps/{side}"], rel=1e-6)
    assert trainer.evaluate() == trainer.evaluate()


def test_a_cached_run_is_the_live_run_bit_for_bit(tmp_path):
    def outcome(name, reference):
        return run(
            tmp_path / name,
            lora_policy(dropout=0.3),
            reference,
            FDPO("jensen_shannon", 0.3),
            train=trees(9),
            num_train_epochs=2,
            optim="adamw_torch",
            learning_rate=1e-2,
            **BATCHES,
        )

    live = outcome("live", AdapterOff(chunk_tokens=CHUNK))
    counted = Counted(AdapterOff(chunk_tokens=CHUNK))
    filling = outcome("filling", Cached(counted, directory=tmp_path / "cache", key=KEY))
    assert counted.calls == 3  # once per batch of the first epoch, none in the second
    reading = outcome("reading", Cached(None, directory=tmp_path / "cache", key=KEY))
    assert len(live.logs) == 6
    for cached in (filling, reading):
        assert cached.logs == live.logs
        assert all(torch.equal(cached.weights[name], weight) for name, weight in live.weights.items())


def test_a_cache_filled_in_other_batches_gives_the_live_run_to_rounding(tmp_path):
    rows, policy, live = trees(9), lora_policy(), AdapterOff(chunk_tokens=CHUNK)
    cache = Cached(live, directory=tmp_path / "cache", key=KEY)
    cache.precompute(policy, rows, scorer=Scorer(pad_token_id=PAD), batch_size=4)
    runs = [
        run(tmp_path / str(n), copy.deepcopy(policy), reference, FDPO(beta=0.3), train=rows, **BATCHES)
        for n, reference in enumerate((live, Cached(None, directory=tmp_path / "cache", key=KEY)))
    ]
    for expected, log in zip(runs[0].logs, runs[1].logs, strict=True):
        # At the first step rounding decides whether a margin of 0 counts as right, wrong or half.
        for name in expected.keys() - ({"rewards/accuracies"} if expected["step"] == 1 else set()):
            assert log[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


def test_a_row_that_the_cache_lacks_stops_the_run(tmp_path):
    reference = Cached(None, directory=tmp_path / "cache", key=KEY)
    with pytest.raises(DataError, match="pair 0"):
        run(tmp_path, lora_policy(), reference, FDPO(), train=trees(3), **BATCHES)

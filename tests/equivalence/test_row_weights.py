"""A row of weight 2 counts like the row taken twice, however the step is cut into micro-batches."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from falign.divergences import get
from falign.errors import ConfigError
from falign.methods import FDPO, KTO, TDPO
from falign.objectives import (
    Anchored,
    CompletionBatch,
    Distillation,
    Listwise,
    Measure,
    ObjectiveOutput,
    Selected,
    Sum,
    Supervised,
    Term,
)
from falign.references import AdapterOff
from falign.runfile import parse_run
from falign.runs.inputs import RunRows
from falign.training.offline import read_data
from falign.training.parts import load_language
from tests.equivalence.runs import difference, lora_policy, run, trees
from tests.models.tiny import save_tiny
from tests.training.pairs import run_data

JS = get("jensen_shannon")


@dataclass(frozen=True)
class OfMyOwn:
    """A user's own objective that reads the weights of rows."""

    needs = frozenset({"preference", "row_weights"})
    measures: ClassVar[dict[str, Measure]] = {}

    def __call__(self, batch: CompletionBatch) -> ObjectiveOutput:
        nll = -batch.sequence_sum(batch.logprobs) * batch.require("preference")
        return ObjectiveOutput((Term(nll, batch.require("row_weights")),), {})


OBJECTIVES = {
    "f-DPO": FDPO("jensen_shannon", 0.5),
    "list": Listwise(JS, 0.5),
    "TDPO": TDPO("reverse_kl", 0.3),
    "labels": KTO("jensen_shannon", 0.5, reference_point="zero"),
    "demonstrations": Supervised(),
    "distillation": Distillation(JS, reference="reference", level="vocabulary"),
    "sum": Sum({"pairs": (FDPO("reverse_kl", 0.3), 1.0), "anchor": (Selected(Anchored(JS, 0.3), "chosen"), 0.5)}),
    "own": OfMyOwn(),
}
WEIGHTS = (1, 4, 2, 1, 4, 4)  # powers of two, also in sum: the chunked pass rounds the gradient of a token to float32


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_of_weight_n_has_the_gradient_and_loss_of_n_rows(tmp_path, name):
    rows = trees(len(WEIGHTS))
    repeated = [row for row, weight in zip(rows, WEIGHTS, strict=True) for _ in range(weight)]
    # Scaled, because only the ratios count.
    weighted = [replace(row, weight=0.25 * weight) for row, weight in zip(rows, WEIGHTS, strict=True)]

    def step(train, size, accumulate):
        policy = lora_policy(trained=True).to(torch.float64)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
        return run(tmp_path / str(len(train)), policy, AdapterOff(), OBJECTIVES[name], train=train, **settings)

    expected, found = step(repeated, len(repeated), 1), step(weighted, 4, 2)
    assert len(found.gradients) == len(expected.gradients) == 1
    assert difference(found.gradients[0], expected.gradients[0]) <= 1e-12
    assert found.logs[0]["loss"] == pytest.approx(expected.logs[0]["loss"], rel=1e-6)
    plain = step(rows, len(rows), 1)
    assert difference(plain.gradients[0], expected.gradients[0]) > 1e-3  # the weights matter


@dataclass(frozen=True)
class Unaware(OfMyOwn):
    needs = frozenset({"preference"})


def test_a_run_reports_weights_and_refuses_an_objective_that_leaves_them_out(tmp_path):
    rows = [{"prompt": f"q {i}: ", "chosen": "a", "rejected": "b", "weight": 0.5 + i} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_data(save_tiny(tmp_path / "model"), tmp_path / "rows.jsonl", tmp_path / "run", data={"eval_size": 1})
    config = parse_run(run)
    language, told = load_language(config), []
    data = read_data(config, language, config.check(), tell=told.append)
    assert any("weights from 0.5 to 3.5" in notice.text for notice in told)
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: the row has the weight 0.5, which Unaware does not read"):
        read_data(config, language, Unaware(), tell=told.append)
    # A resumed run with other weights is another run.
    other = [replace(data.train[0], weight=9.0), *data.train[1:]]
    assert RunRows.of({"data.train": other}).digest != RunRows.of({"data.train": data.train}).digest

"""References of a user's own, as a run file names them: ``kind: tests.references.own:Shifted``."""

import json
from typing import Any

from falign.models import weights_hash
from falign.references import AdapterOff, Reference
from falign.runfile import BuildContext


class Shifted(Reference):
    """The base, with each token's log-probability less by a constant."""

    def __init__(self, context: BuildContext, shift: float = 0.0) -> None:
        self.base = AdapterOff(weights=weights_hash(context.policy))
        self.shift, self.starts_as_policy = shift, shift == 0

    def identity(self) -> dict[str, Any]:
        return {"kind": "shifted", "weights": f"{self.base.weights}-{self.shift}"}

    def logprobs(self, policy_model, batch):
        logprobs = self.base.logprobs(policy_model, batch)
        return (logprobs - self.shift).masked_fill(~batch.completion_mask, 0.0)

    def states(self, policy_model, batch, *, weighting="none"):
        return self.base.states(policy_model, batch, weighting=weighting)


class Following(Shifted):
    """The same, with a constant that grows with each move."""

    moves = True

    def __init__(self, context: BuildContext, every: int | None = None) -> None:
        super().__init__(context)
        self.every, self.starts_as_policy = every, False

    def identity(self) -> dict[str, Any]:
        return {"kind": "following", "weights": self.base.weights}

    def move(self, policy_model, step, optimizer):
        if step and step % (self.every or 1) == 0:
            self.shift += 0.25

    def metrics(self):
        return {"shift": self.shift}

    def save(self, folder, policy_model):
        (folder / "shift.json").write_text(json.dumps(self.shift))

    def load(self, folder, policy_model):
        self.shift = json.loads((folder / "shift.json").read_text())

"""Callbacks that a run file of a test names."""

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class Count(TrainerCallback, ExportableState):
    """Counts logged losses, and ends the run once there are more than a limit."""

    def __init__(self, limit: float = 1e9):
        self.limit, self.logs = limit, 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs += "loss" in (logs or {})
        if self.logs > self.limit:
            control.should_training_stop = True

    def state(self):
        return {"args": {"limit": self.limit}, "attributes": {"logs": self.logs}}


class Halves(TrainerCallback):
    """Changes what is trained: each step's gradient is halved before the optimizer's step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= 0.0 if state.global_step == 3 else 0.5


class Asks(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = True


class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise LookupError("no such step")


class HasTensor(TrainerCallback, ExportableState):
    def state(self):
        return {"args": {}, "attributes": {"values": {1, 2}}}


class Plain:
    pass

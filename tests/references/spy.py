"""Counting real forward passes."""

from torch import nn

from falign.scoring import read_backbone


class ForwardSpy:
    """The shapes of all inputs that the model's backbone saw, hooked on the real module."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        read_backbone(model).register_forward_hook(self._record, with_kwargs=True)

    def _record(self, module, args, kwargs, output) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def __len__(self) -> int:
        return len(self.shapes)

"""The recorded base of an adapter, compared with the model that the adapter is loaded over."""

import warnings
from pathlib import Path
from typing import NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel

from falign.errors import ModelError
from falign.models.base_weights import base_storage
from falign.models.identity import weights_hash
from falign.models.structure import base_of

__all__ = ["RecordedBase", "check_recorded_base", "record_base"]


class RecordedBase(NamedTuple):
    """The base that an adapter was made for.

    Attributes:
        name: A folder or hub name; None if it is not recorded.
        revision: Its revision on the hub.
        weights: Content hash of its weights; None for adapters that falign did not write.
        storage: The dtypes in which those weights were hashed; the same base in other dtypes has another hash.
    """

    name: str | None = None
    revision: str | None = None
    weights: str | None = None
    storage: str | None = None

    def difference(self, other: "RecordedBase") -> str | None:
        """Describe how two records contradict each other, by content if possible, else by name."""
        if None not in (self.weights, other.weights) and self.storage == other.storage:
            return None if self.weights == other.weights else f"base weights {self.weights} and {other.weights}"
        if None in (self.name, other.name) or str(self) == str(other):
            return None
        return f"base {self} and {other}"

    def __str__(self) -> str:
        return f"{self.name}{f' at {self.revision}' if self.revision else ''}"


def record_base(model: PreTrainedModel | PeftModel) -> RecordedBase:
    """Return the record of a model's base; its weights are read for the hash."""
    return RecordedBase(base_of(model).name_or_path or None, None, weights_hash(model), base_storage(model))


def check_recorded_base(
    recorded: RecordedBase, model: PreTrainedModel | PeftModel, folder: Path, *, weights: str | None = None
) -> None:
    """Raise if an adapter was made for other weights than a model has, and warn if only the names differ.

    Args:
        recorded: The base that the adapter was made for.
        model: The model that the adapter is to be loaded over.
        folder: The folder of the adapter, for messages.
        weights: Content hash of the model's base, if it is known already.

    Raises:
        ModelError: The contents differ.
    """
    name = base_of(model).name_or_path or None
    if recorded.weights is not None and recorded.storage == base_storage(model):
        found = weights_hash(model) if weights is None else weights
        if found != recorded.weights:
            raise ModelError(
                f"{folder} was made for {recorded} with the weights {recorded.weights[:12]}, and {name} has "
                f"{found[:12]}: an adapter fits only its own base. Give that base."
            )
    elif None not in (name, recorded.name) and _place(str(name)) != _place(str(recorded.name)):
        warnings.warn(
            f"{folder} was made for {recorded} according to its adapter_config.json, and is loaded over {name}. Only "
            "the names can be compared: make sure that both have the same weights.",
            stacklevel=3,
        )


def _place(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name

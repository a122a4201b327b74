import pickle

import pytest
import torch

from falign.errors import ConfigError, ModelError
from falign.models.staging import reading


def broken(error):
    with reading(lambda cause: ModelError(f"file x is damaged ({cause})")):
        raise error


@pytest.mark.parametrize("error", [TypeError("t"), pickle.UnpicklingError("u"), Exception("e"), RecursionError("r")])
def test_an_error_of_any_type_is_explained_and_stays_the_cause(error):
    with pytest.raises(ModelError, match="file x is damaged") as caught:
        broken(error)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [ConfigError("ours"), torch.OutOfMemoryError("m"), MemoryError(), OSError(28, "full")]
)
def test_what_is_not_the_files_fault_goes_through(error):
    with pytest.raises(type(error)) as caught:
        broken(error)
    assert caught.value is error

import pytest
import torch

from falign.errors import ConfigError
from falign.models import load_model
from falign.models.devices import named_device


def test_a_device_is_named_or_chosen():
    assert named_device("cpu") == torch.device("cpu")
    assert named_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["nowhere", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(name, tiny):
    with pytest.raises(ConfigError, match=f"device='{name}' is"):
        load_model(tiny, device=name)

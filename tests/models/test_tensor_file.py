import torch
from safetensors import safe_open

from falign.models.staging import save_tensors

METADATA = {"format": "pt", "zebra": 'ä \u2028 \\ " \n', "apple": '{"nested": ["x"]}', "empty": ""}


def test_equal_contents_are_equal_bytes_and_are_read_as_written(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]
    for file in files:
        save_tensors(tensors, file, metadata=METADATA)
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], framework="pt") as read:
        assert read.metadata() == METADATA
        assert all(torch.equal(read.get_tensor(name), tensor) for name, tensor in tensors.items())

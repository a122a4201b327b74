import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from falign.errors import ConfigError, DataError
from falign.references import CacheKey, LogprobStore, entry_digest

KEY = CacheKey(weights="w1", config="c", vocabulary=260, tokenizer="t1", dtype="float32", attention="sdpa")
ONE, TWO, THREE = (entry_digest((1,), (n,)) for n in range(3))


def test_what_was_appended_is_read_back_in_any_order_also_after_reopening(tmp_path):
    store = LogprobStore(tmp_path / "new" / "folder", key=KEY)
    store.append({ONE: torch.tensor([-1.0, -2.0]), TWO: torch.tensor([-3.0])})
    store.append({THREE: torch.tensor([-4.0, -5.0, -6.0], dtype=torch.bfloat16)})
    for reader in (store, LogprobStore(tmp_path / "new" / "folder", key=KEY)):
        assert len(reader) == 3
        assert [v.tolist() for v in reader.read([THREE, ONE, TWO, ONE])] == [
            [-4, -5, -6],
            [-1, -2],
            [-3],
            [-1, -2],
        ]
        assert {v.dtype for v in reader.read([ONE, THREE])} == {torch.float32}


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [((1, 2, 3), (4, 6)), ((1, 2, 7), (4, 5)), ((2, 3), (4, 5)), ((1, 2), (3, 4, 5)), ((1, 2, 3), (4, 5, 2))],
)
def test_any_change_of_ids_truncation_or_boundary_is_another_entry(prompt, completion):
    assert entry_digest(prompt, completion) != entry_digest((1, 2, 3), (4, 5))
    assert entry_digest((1, 2, 3), (4, 5)) == entry_digest([1, 2, 3], [4, 5])


@pytest.mark.parametrize("field", ["weights", "config", "tokenizer", "dtype", "attention"])
def test_a_store_of_another_key_is_refused_naming_the_field(tmp_path, field):
    LogprobStore(tmp_path, key=KEY)
    other = replace(KEY, **{field: "else"})
    assert other.digest != KEY.digest
    with pytest.raises(ConfigError, match=f"stale: computed with {field} '{getattr(KEY, field)}' instead of 'else'"):
        LogprobStore(tmp_path, key=other)
    LogprobStore(tmp_path, key=KEY)


def test_a_store_of_another_format_and_shards_without_index_are_refused(tmp_path):
    LogprobStore(tmp_path, key=KEY).append({ONE: torch.tensor([-1.0])})
    index = tmp_path / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 0}))
    with pytest.raises(ConfigError, match="format 0 instead of 2"):
        LogprobStore(tmp_path, key=KEY)
    index.unlink()
    with pytest.raises(ConfigError, match=r"no index\.json"):
        LogprobStore(tmp_path, key=KEY)


@pytest.mark.parametrize("fails_at", ["replace", "write"])
def test_a_write_that_is_killed_leaves_a_valid_store(tmp_path, monkeypatch, fails_at):
    LogprobStore(tmp_path, key=KEY).append({ONE: torch.tensor([-1.0])})

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if fails_at == "replace":
            patch.setattr(Path, "replace", killed)
        else:
            patch.setattr("falign.durable.os.fsync", killed)
        store = LogprobStore(tmp_path, key=KEY)
        with pytest.raises(KeyboardInterrupt):
            store.append({TWO: torch.tensor([-2.0])})
        assert TWO not in store
    reopened = LogprobStore(tmp_path, key=KEY)
    assert ONE in reopened
    assert TWO not in reopened
    reopened.append({TWO: torch.tensor([-3.0])})
    assert LogprobStore(tmp_path, key=KEY).read([ONE, TWO]) == [torch.tensor([-1.0]), torch.tensor([-3.0])]


def test_a_damaged_shard_is_an_error_that_names_it(tmp_path):
    LogprobStore(tmp_path, key=KEY).append({ONE: torch.tensor([-1.0])})
    (shard,) = tmp_path.glob("shard-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(DataError, match=f"{shard.name} is not a shard.*delete this file"):
        LogprobStore(tmp_path, key=KEY)


@pytest.mark.parametrize(
    "changes",
    [
        {"digests": torch.zeros(1, 31, dtype=torch.uint8)},
        {"digests": torch.zeros(2, 32, dtype=torch.uint8)},
        {"lengths": torch.tensor([2])},
        {"lengths": torch.tensor([-1])},
        {"lengths": torch.tensor([1.0])},
        {"logprobs": torch.zeros(1, dtype=torch.float16)},
        {"logprobs": torch.zeros(1, 1)},
        {"logprobs": None},
        {"checksums": None},
        {"checksums": torch.zeros(1, 7, dtype=torch.uint8)},
    ],
)
def test_a_shard_whose_parts_do_not_fit_is_refused(tmp_path, changes):
    LogprobStore(tmp_path, key=KEY).append({ONE: torch.tensor([-1.0])})
    (shard,) = tmp_path.glob("shard-*.safetensors")
    tensors = {name: tensor for name, tensor in (load_file(shard) | changes).items() if tensor is not None}
    save_file(tensors, shard)
    with pytest.raises(DataError, match=f"{shard.name} is not a shard.*delete this file"):
        LogprobStore(tmp_path, key=KEY)


def test_a_flipped_bit_anywhere_is_seen_or_changes_no_value(tmp_path):
    written = {ONE: torch.tensor([-1.0, -2.0]), TWO: torch.tensor([-3.0]), THREE: torch.tensor([-4.0, -5.0, -6.0])}
    LogprobStore(tmp_path, key=KEY).append(written)
    (shard,) = tmp_path.glob("shard-*.safetensors")
    whole = shard.read_bytes()
    seen = 0
    for bit in range(0, 8 * len(whole), 11):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(damaged)
        try:
            store = LogprobStore(tmp_path, key=KEY)
            there = [digest for digest in written if digest in store]
            values = store.read(there)
        except DataError:
            seen += 1
        else:
            assert all(torch.equal(each, written[digest]) for digest, each in zip(there, values, strict=True))
    assert seen > 50
    low = whole.index(torch.tensor([-1.0, -2.0]).numpy().tobytes())  # the lowest bits of -1.0
    shard.write_bytes(whole[:low] + bytes([whole[low] ^ 1]) + whole[low + 1 :])
    with pytest.raises(DataError, match="differ from their checksum"):
        LogprobStore(tmp_path, key=KEY).read([ONE])


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"3"])
def test_a_damaged_index_is_refused(tmp_path, content):
    LogprobStore(tmp_path, key=KEY).append({ONE: torch.tensor([-1.0])})
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"index.json is damaged .*: delete the folder"):
        LogprobStore(tmp_path, key=KEY)


def test_writers_side_by_side_lose_nothing(tmp_path):
    digests = [entry_digest((n,), (n,)) for n in range(40)]

    def write(part):
        store = LogprobStore(tmp_path, key=KEY)
        for digest in part:
            store.append({digest: torch.tensor([-float(digests.index(digest))])})

    threads = [threading.Thread(target=write, args=(digests[n::4] + digests[:2],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    values = LogprobStore(tmp_path, key=KEY).read(digests)
    assert torch.cat(values).tolist() == [-float(n) for n in range(40)]

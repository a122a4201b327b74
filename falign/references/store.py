"""Per-token log-probabilities on disk, looked up by a hash of the inputs that they were computed from."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from falign.durable import write_whole
from falign.errors import ConfigError, DataError

__all__ = ["CacheKey", "LogprobStore", "entry_digest"]

_FORMAT = 2  # in the index; a store of another format is refused
_CHECKSUM_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """The inputs that all values of a store depend on. Token ids, and thus truncation, belong to its entries.

    Attributes:
        weights: Content hash of the reference's weights, without the trained adapter.
        config: Hash of the part of its configuration that affects logits.
        vocabulary: Number of ids in its distributions.
        tokenizer: Fingerprint of the tokenizer and its chat template.
        dtype: The type that the reference computes in, quantization included.
        attention: Attention implementation.
        top_k: Number of most likely tokens that are stored at each position; 0 for none.
    """

    weights: str
    config: str
    vocabulary: int
    tokenizer: str
    dtype: str
    attention: str
    top_k: int = 0

    @property
    def record(self) -> dict[str, str | int]:
        """The inputs by name, without ``top_k`` if it is 0."""
        return {name: value for name, value in asdict(self).items() if name != "top_k" or value}

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits, to name a folder per key."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()[:16]


def entry_digest(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], counted: Sequence[bool] | None = None
) -> bytes:
    """Return the name of a completion in a store: SHA-256 over the prompt's length, all token ids and which count."""
    ids = (len(prompt_ids), *prompt_ids, *completion_ids, *(() if counted is None else map(int, (-1, *counted))))
    return hashlib.sha256(struct.pack(f"<{len(ids)}q", *ids)).digest()


class _Span(NamedTuple):
    shard: Path
    start: int
    stop: int
    checksum: bytes


class LogprobStore:
    """A folder with ``index.json``, which holds the key, and self-contained shards.

    Each entry has a checksum over its name and values, which is checked on every read.

    A shard is written under a temporary name, synced and renamed. A reader, also in another process, thus sees all of
    it or nothing, and a killed write leaves only a file that nobody reads.

    Args:
        directory: The folder; created if needed.
        key: The inputs that the values depend on.

    Raises:
        ConfigError: If the folder was written under another key, or contains a link to a file outside.
        DataError: If a shard cannot be read.
    """

    def __init__(self, directory: Path, *, key: CacheKey) -> None:
        self.directory = directory
        self.key = key
        self._spans: dict[bytes, _Span] = {}
        for path in (directory, *directory.glob("shard-*.safetensors"), directory / "index.json"):
            if path.is_symlink():
                raise ConfigError(f"{path} is a link, but a cache keeps its files in its own folder: remove the link.")
        self._check_index()
        for shard in sorted(directory.glob("shard-*.safetensors")):
            self._register(shard)

    def __len__(self) -> int:
        return len(self._spans)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._spans

    def read(self, digests: Sequence[bytes]) -> list[Float[Tensor, " _"]]:
        """Return the values of entries in the store, in float32 and in the requested order."""
        by_shard: dict[Path, list[bytes]] = defaultdict(list)  # so that each file is opened once
        for digest in digests:
            by_shard[self._spans[digest].shard].append(digest)
        values: dict[bytes, Tensor] = {}
        for shard, members in by_shard.items():
            with _reading(shard), safe_open(shard, framework="pt") as file:
                logprobs = file.get_slice("logprobs")
                for digest in members:
                    span = self._spans[digest]
                    values[digest] = logprobs[span.start : span.stop]
                    if _checksum(digest, values[digest]) != span.checksum:
                        raise ValueError(f"the values of entry {digest.hex()[:16]} differ from their checksum")
        return [values[digest] for digest in digests]

    def append(self, entries: Mapping[bytes, Float[Tensor, " _"]]) -> None:
        """Add entries as one shard, which is on disk when this returns."""
        digests = b"".join(entries)
        rows = {digest: values.detach().float().cpu() for digest, values in entries.items()}
        checksums = [list(_checksum(digest, values)) for digest, values in rows.items()]
        tensors = {
            "digests": torch.tensor([list(digest) for digest in entries], dtype=torch.uint8),
            "lengths": torch.tensor([len(values) for values in entries.values()]),
            "checksums": torch.tensor(checksums, dtype=torch.uint8),
            "logprobs": torch.cat([*rows.values()]),
        }
        # Named by its entries: the same entries, written again or by another process, replace the same file.
        shard = self.directory / f"shard-{hashlib.sha256(digests).hexdigest()[:24]}.safetensors"
        write_whole(shard, save(tensors))
        self._register(shard)

    def _check_index(self) -> None:
        path = self.directory / "index.json"
        wanted = {"format": _FORMAT, **self.key.record}
        # The order matters: another process writes the index before its first shard.
        has_shards = any(self.directory.glob("shard-*.safetensors"))
        if not path.exists():
            if has_shards:
                raise ConfigError(f"{self.directory} has shards but no index.json: delete it or use another folder.")
            self.directory.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(wanted, indent=1))
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{path} is damaged ({error}): delete the folder; its values will be computed again."
            ) from error
        differing = [name for name in wanted if found.get(name) != wanted[name]]
        if differing:
            stale = ", ".join(f"{name} {found.get(name)!r} instead of {wanted[name]!r}" for name in differing)
            raise ConfigError(
                f"The reference log-probabilities in {self.directory} are stale: computed with {stale}. "
                "Delete the folder or use another."
            )

    def _register(self, shard: Path) -> None:
        with _reading(shard), safe_open(shard, framework="pt") as file:
            digests, lengths = file.get_tensor("digests"), file.get_tensor("lengths")
            checksums = file.get_tensor("checksums")
            stops = lengths.cumsum(dim=0)
            values, rows = file.get_slice("logprobs"), [digests.shape, lengths.dtype, lengths.shape]
            if rows != [(len(lengths), 32), torch.int64, (len(lengths),)] or digests.dtype != torch.uint8:
                raise ValueError(f"its entries have an unexpected format, {rows}")
            if checksums.shape != (len(lengths), _CHECKSUM_BYTES) or checksums.dtype != torch.uint8:
                raise ValueError(f"its checksums have an unexpected format, {checksums.dtype} {tuple(checksums.shape)}")
            if (lengths < 0).any() or [int(lengths.sum())] != values.get_shape() or values.get_dtype() != "F32":
                raise ValueError("its number of values does not match its entries")
        spans = zip(digests.numpy(), [0, *stops.tolist()], stops.tolist(), checksums.numpy(), strict=False)
        for row, start, stop, checksum in spans:
            self._spans[row.tobytes()] = _Span(shard, start, stop, checksum.tobytes())


def _checksum(digest: bytes, values: Float[Tensor, " _"]) -> bytes:
    return hashlib.blake2b(digest + values.contiguous().numpy().tobytes(), digest_size=_CHECKSUM_BYTES).digest()


@contextmanager
def _reading(shard: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, IndexError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{shard} is not a shard of reference log-probabilities, or is damaged ({error}): delete this file; "
            "its entries will be computed again."
        ) from error

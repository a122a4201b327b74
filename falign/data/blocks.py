"""Tokenization of rows in blocks: in several processes, and from a cache on disk. Neither changes a result."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from falign.data.chat_template import Tokenizer, template_source
from falign.data.examples import Example
from falign.data.tokenization import Tokenized, tokenize
from falign.data.windows import Window
from falign.deadlines import end_with_parent
from falign.durable import write_whole
from falign.errors import ConfigError, DataError
from falign.scoring.batch import PromptTree

__all__ = ["BLOCK", "Blocks", "Processing", "tokenizer_identity"]

BLOCK = 512
"""Rows of a block, which is one file of a cache."""

Result = Tokenized | DataError
"""A row in tokens, or why it cannot be used."""


@dataclass(frozen=True)
class Processing:
    """How rows are tokenized.

    Attributes:
        num_proc: Number of processes.
        cache: A folder for token ids, which is made if it is missing; None for no cache.
    """

    num_proc: int = 1
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.num_proc < 1:
            raise ConfigError(f"num_proc={self.num_proc} must be at least 1.")
        if self.num_proc > 1 and "fork" not in multiprocessing.get_all_start_methods():
            raise ConfigError(f"num_proc={self.num_proc}: this system cannot fork processes; set 1.")

    @property
    def plain(self) -> bool:
        """True if rows are tokenized one by one in this process."""
        return self.num_proc == 1 and self.cache is None


class Blocks:
    """Tokenize blocks of rows.

    Args:
        tokenizer: The model's tokenizer.
        stop_token_ids: As for :func:`falign.data.tokenize`.
        window: As for :func:`falign.data.tokenize`.
        processing: Number of processes, and the cache.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stop_token_ids: Collection[int], window: Window, processing: Processing
    ) -> None:
        self._work = _Work(tokenizer, frozenset(stop_token_ids), window)
        self._processing = processing
        self._executor: Executor | None = None
        self._stack = ExitStack()
        self.hits = 0
        """Blocks found in the cache so far."""

    @contextmanager
    def open(self) -> Iterator[Blocks]:
        """End the processes on exit."""
        with self._stack:
            yield self

    def tokenized(self, examples: Sequence[Example]) -> list[Result]:
        """Return the results of rows in their order.

        Raises:
            ConfigError: A required chat template or stop token is missing, or the cache cannot be used.
            DataError: A file of the cache is damaged.
        """
        if self._processing.cache is None:
            return self._computed(examples)
        folder = Path(self._processing.cache)
        file = folder / f"{_key(self._identity, examples)}.json.z"
        if file.is_file():
            self.hits += 1
            return _read(file, examples)
        found = self._computed(examples)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, _written(found, examples))
        except OSError as error:
            raise ConfigError(f"cache={folder} cannot be written ({error}): give another folder, or none.") from error
        return found

    @cached_property
    def _identity(self) -> str:
        work = self._work
        stops = sorted(work.stops)
        parts = [_code_identity(), tokenizer_identity(work.tokenizer), stops, asdict(work.window)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _computed(self, examples: Sequence[Example]) -> list[Result]:
        bare = [replace(example, columns={}) for example in examples]
        if self._processing.num_proc == 1 or not bare:
            return [self._work(example) for example in bare]
        # The first row is tokenized here, so that a template is tried once and not in each process.
        first = [self._work(bare[0])] if self._executor is None else []
        size = max(1, len(bare) // (8 * self._processing.num_proc))
        return [*first, *self._processes().map(_in_process, bare[len(first) :], chunksize=size)]

    def _processes(self) -> Executor:
        if self._executor is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads; these do not use locks
                self._executor = self._stack.enter_context(
                    ProcessPoolExecutor(
                        self._processing.num_proc,
                        mp_context=multiprocessing.get_context("fork"),
                        initializer=_begin,
                        initargs=(self._work, os.getpid()),
                    )
                )
        return self._executor


@dataclass(frozen=True)
class _Work:
    tokenizer: Tokenizer
    stops: frozenset[int]
    window: Window

    def __call__(self, example: Example) -> Result:
        try:
            return tokenize(example, self.tokenizer, stop_token_ids=self.stops, window=self.window)
        except DataError as error:
            return error  # the caller raises or counts it, in the order of the rows


_work: list[Callable[[Example], Result]] = []
"""In a process of the pool: what it does."""


def _begin(work: _Work, parent: int) -> None:
    end_with_parent(parent)
    _work[:] = [work]


def _in_process(example: Example) -> Result:
    return _work[0](example)


def tokenizer_identity(tokenizer: Tokenizer) -> list[Any]:
    """Return everything in a tokenizer that decides the tokens of a row, the date that its template writes included.

    Args:
        tokenizer: A tokenizer; its template may have a fixed date and options (``vars`` of it).
    """
    backend = vars(tokenizer).get("_tokenizer")
    rules = tokenizer.get_vocab() if backend is None else backend.to_str()
    template = template_source(tokenizer)
    date = vars(tokenizer).get("template_date") or datetime.now()
    codes = sorted({*re.findall(r"%-?[A-Za-z]", template)}) if "strftime_now" in template else []
    written = [date.strftime(code) for code in codes]
    options = vars(tokenizer).get("template_options")
    return [rules, tokenizer.special_tokens_map, template, written, options]


@lru_cache(maxsize=1)
def _code_identity() -> list[str]:
    """Return a hash of the code of this package, and the versions of what it calls."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return [digest.hexdigest(), *(version(name) for name in ("tokenizers", "transformers", "jinja2"))]


def _key(identity: str, examples: Sequence[Example]) -> str:
    digest = hashlib.sha256(identity.encode())
    for each in examples:
        inputs = [list(each.inputs.tools), each.inputs.options]
        row = [each.prompt, each.completions, each.preference, each.weights, each.shared, inputs]
        digest.update(json.dumps(row, default=str).encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


_PLACE = "\0"
"""Stands for the place of the row in stored messages."""


def _written(results: Sequence[Result], examples: Sequence[Example]) -> bytes:
    rows = [_as_plain(result, example) for result, example in zip(results, examples, strict=True)]
    return zlib.compress(json.dumps(rows, separators=(",", ":")).encode("utf-8", "surrogatepass"), level=1)


def _as_plain(result: Result, example: Example) -> dict[str, Any]:
    if isinstance(result, DataError):
        return {"error": str(result).replace(example.place, _PLACE)}
    tree = result.tree
    if tree is None:
        return {**vars(result), "tree": None}
    own = {"prompt": tree.prompt_ids, "completions": tree.completion_ids}
    return {**vars(result), "tree": {**own, "token_weights": tree.token_weights, "counted": tree.counted}}


def _read(file: Path, examples: Sequence[Example]) -> list[Result]:
    try:
        rows = json.loads(zlib.decompress(file.read_bytes()))
        return [_from_plain(row, example) for row, example in zip(rows, examples, strict=True)]
    except (zlib.error, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file}: this file of the cache is damaged ({error}); remove it.") from error


def _from_plain(row: dict[str, Any], example: Example) -> Result:
    if "error" in row:
        return DataError(row["error"].replace(_PLACE, example.place))
    own = row["tree"]
    if own is None:
        return Tokenized(**row)
    tree = PromptTree(
        tuple(own["prompt"]),
        tuple(map(tuple, own["completions"])),
        example.preference,
        example.place,
        token_weights=None if own["token_weights"] is None else tuple(map(tuple, own["token_weights"])),
        weight=example.weight,
        counted=None if own["counted"] is None else tuple(map(tuple, own["counted"])),
    )
    return Tokenized(**{**row, "tree": tree})

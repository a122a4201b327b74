"""The identity of a reward: a hash of its code and settings; rewards with equal identities give equal values."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from falign.code_identity import Kept, plain_code, reads_docstrings

if TYPE_CHECKING:
    from falign.rewards.combination import RewardSum

__all__ = ["Identified", "Identity", "reward_identities", "reward_identity", "source_hashes"]


class Identity(NamedTuple):
    """Code and settings that decide a reward's values.

    Attributes:
        module: Name of the module that holds the code.
        settings: Everything else that changes a value, as JSON represents it.
    """

    module: str
    settings: Mapping[str, Any]


@runtime_checkable
class Identified(Protocol):
    """A reward with settings besides its code."""

    def identity(self) -> Identity:
        """Return the module whose source decides the values, and the settings."""
        ...


def reward_identities(rewards: RewardSum) -> dict[str, str]:
    """Return the identity of each reward of a sum by its name, with its transform; weights are not part of it.

    Args:
        rewards: Named rewards.
    """
    found = {part.name: reward_identity(part.reward) for part in rewards.rewards}
    for part in rewards.rewards:
        if part.transform is not None:
            both = f"{found[part.name]} {reward_identity(part.transform)}"
            found[part.name] = hashlib.sha256(both.encode()).hexdigest()
    return found


def reward_identity(reward: Any) -> str:
    """Return the SHA-256 of a reward's code and settings.

    The code is that of the reward's module and of the modules beside it that it imports, as far as import statements
    tell: those in the same folder or package. Comments and docstrings do not count (see
    :func:`falign.code_identity.plain_code`); in modules of which one reads ``__doc__``, docstrings do. Installed
    libraries and data files that a function reads are not covered. Neither the order in which rewards are asked nor the
    place of the files changes the hash.

    Args:
        reward: A function, any object of :class:`falign.rewards.Reward`, or a transform.
    """
    identity = reward.identity() if isinstance(reward, Identified) else _of_callable(reward)
    parts = {"settings": dict(identity.settings), "module": identity.module, "code": source_hashes(identity.module)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _of_callable(reward: Any) -> Identity:
    settings: dict[str, Any] = {}
    while isinstance(reward, functools.partial):
        settings = {"arguments": repr((reward.args, reward.keywords)), "of": settings}
        reward = reward.func
    reward = inspect.unwrap(reward)
    named = reward if inspect.isroutine(reward) or inspect.isclass(reward) else type(reward)
    return Identity(named.__module__, {**settings, "name": named.__qualname__})


def source_hashes(module: str) -> dict[str, str]:
    """Return the hashes of a module's code and of the modules that it imports from the same author, by module name."""
    begin = _spec(module)
    if begin is None or _file(begin) is None:
        return {}
    is_beside = _beside(begin)
    found: dict[str, tuple[ModuleSpec, bytes]] = {}
    waiting = {begin.name: begin}
    while waiting:
        name, spec = waiting.popitem()
        content = Path(spec.origin or "").read_bytes().replace(b"\r\n", b"\n")
        found[name] = spec, content
        for imported in _imported(content, spec):
            if imported in found or imported in waiting:
                continue
            other = _spec(imported)
            if other is not None and is_beside(other):
                waiting[imported] = other
    # None of falign's rewards reads its docstrings.
    docstrings: Kept = "none" if begin.name.partition(".")[0] == __name__.partition(".")[0] else "read"
    if docstrings == "read" and reads_docstrings(content.decode("utf-8", "replace") for _, content in found.values()):
        docstrings = "all"
    return {name: _hash(content, spec, docstrings) for name, (spec, content) in found.items()}


def _hash(content: bytes, spec: ModuleSpec, docstrings: Kept) -> str:
    if (spec.origin or "").endswith(".py"):
        # What is not Python, or nested too deeply to be written anew, is hashed as it is.
        with suppress(SyntaxError, RecursionError):
            content = plain_code(content, docstrings=docstrings).encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).hexdigest()


def _beside(spec: ModuleSpec) -> Callable[[ModuleSpec], bool]:
    """Return whether a module has the same author as this one: it is in its package or its folder."""
    file, depth = Path(spec.origin or "").resolve(), spec.name.count(".")
    top = file.parents[depth + 1 if file.stem == "__init__" else depth]  # holds the outermost package
    outermost, falign = spec.name.partition(".")[0], __name__.partition(".")[0]
    if outermost == falign:
        root = file.parent  # values do not depend on falign's other packages
    elif top in _INSTALLED:
        root = top / outermost
    else:
        root = top

    def is_beside(other: ModuleSpec) -> bool:
        path = _file(other)
        if path is None or not path.is_relative_to(root):
            return False
        if other.name.partition(".")[0] == falign:
            return outermost == falign
        # An environment may lie in the folder of the project.
        return not any(path.is_relative_to(place) and not root.is_relative_to(place) for place in _INSTALLED)

    return is_beside


_INSTALLED = frozenset(
    Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


def _file(spec: ModuleSpec) -> Path | None:
    return Path(spec.origin).resolve() if spec.origin is not None and Path(spec.origin).is_file() else None


def _spec(name: str) -> ModuleSpec | None:
    """Find a module without importing anything; None where there is none."""
    loaded = sys.modules.get(name)
    if loaded is not None:
        return loaded.__spec__ or ModuleSpec(name, None, origin=vars(loaded).get("__file__"))
    places: list[str] | None = None
    spec = None
    for depth in range(1, name.count(".") + 2):
        if depth > 1 and not places:
            return None  # a name inside a module
        spec = PathFinder.find_spec(".".join(name.split(".")[:depth]), places)
        places = None if spec is None else list(spec.submodule_search_locations or ())
    return spec


def _imported(content: bytes, spec: ModuleSpec) -> Iterator[str]:
    """Yield the modules that a source imports, and the names imported from them, which may be modules, too."""
    if not (spec.origin or "").endswith(".py"):
        return
    package = spec.name if spec.submodule_search_locations is not None else spec.parent or ""
    try:
        tree = ast.parse(content)
    except SyntaxError:
        return  # such a module cannot be imported either
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)

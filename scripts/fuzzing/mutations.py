"""What is done to a valid input to make it a malformed one."""

from __future__ import annotations

import copy
import datetime
import pickle
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

JSON_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 10**12, 10**30, -(10**30)),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf")),
    *("", " ", "\n", "x", "0", "nan", "²", "1e400", "a" * 5000, "\x00", "a\x00b", "\ud800", "\U0001d518", "\u202e"),
    *("{", "{0}", "{prompt.__class__}", "[red]", "[/]", "%s", "../..", ".", "module:attribute", "json:dumps"),
    *(":", "a:", ":b", "/", "auto"),
    *([], {}, [None], [[]], [{}], {"": 1}, {"kind": "none"}, {"kind": None}, {"kind": []}, {"a": {"b": {"c": []}}}),
    [0] * 300,
)
YAML_TOKENS = (
    *(b"&a [*a]", b"*a", b"!!python/object:os.system x", b"!!binary x", b"!!set {a}", b"!!float x", b"2001-99-99"),
    *(b"? [a]", b"<<: 1", b"---\n", b"\xff\xfe", b"\x00", b"\xed\xa0\x80", b"\t", b": ", b"- ", b"{", b"[", b"}", b"]"),
    *(b'"', b"'", b"|", b"9" * 5000, b"[" * 3000, b"{a: " * 2000, b"- " * 3000, b"!!int _", b"0x", b".inf", b"0b"),
    *(b"1:60", b"%YAML 9", b"!<x>"),
)


def nested(depth: int) -> list[Any]:
    """Return a list in a list in a list ..."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def value(random: Random, *, yaml: bool = False) -> Any:
    """Return a value that is probably not meant."""
    more: tuple[Any, ...] = (nested(60), nested(150))
    if yaml:
        more += (datetime.date(2001, 1, 1), b"\xff", {1: 2}, {None: 1}, {(1, 2): 3}, {"a", "b"})
    return copy.deepcopy(random.choice((*JSON_VALUES, *more)))


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container inside plain values with each of its keys."""
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys):
        yield tree, key
        yield from places(tree[key])


def tree(random: Random, original: Any, *, yaml: bool = False) -> Any:
    """Return plain values with one to three changes."""
    changed = {"": copy.deepcopy(original)}
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if not changed:  # all of it is gone
            break
        container, key = random.choice(list(places(changed)))
        _change(random, container, key, yaml=yaml)
    return changed.get("", value(random, yaml=yaml))


def _change(random: Random, container: Any, key: Any, *, yaml: bool) -> None:
    old, kind = (
        container[key],
        random.choice(("value", "value", "value", "delete", "rename", "add", "wrap", "near", "swap")),
    )
    if kind == "delete":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[random.choice((f"{key}s", str(key)[:-1], str(key).upper(), "", " ", "²", "0", "lr"))] = container.pop(
            key
        )
    elif kind == "add":
        into = old if isinstance(old, dict) else container
        if isinstance(into, dict):
            into[random.choice(("unknown", "kind", "path", "beta", "0", "", "prompt", "\ud800"))] = value(
                random, yaml=yaml
            )
        else:
            into.append(value(random, yaml=yaml))
    elif kind == "wrap":
        container[key] = random.choice(([old], {"value": old}, [old] * 3, str(old), {key: old}))
    elif kind == "near" and isinstance(old, bool | int | float):
        container[key] = random.choice((-old, old + 1, old - 1, old * 1e9, old / 3, str(old), not old, [old]))
    elif kind == "near" and isinstance(old, str):
        cut = random.randrange(len(old) + 1)
        container[key] = (
            old[:cut] + random.choice(("", "x", "\x00", "\ud800", ":", "/", " ", "({", "²", "\n\n")) + old[cut:]
        )
    elif kind == "swap" and isinstance(container, dict):
        other = random.choice(list(container))
        container[key], container[other] = container[other], old
    else:
        container[key] = value(random, yaml=yaml)


def content(random: Random, original: bytes) -> bytes:
    """Return a file's bytes, cut, spoilt or with something in between."""
    data = bytearray(original)
    for _ in range(random.choice((1, 1, 2, 8))):
        start = random.randrange(len(data) + 1)
        stop = min(len(data), start + random.choice((1, 4, 40, 4000)))
        match random.choice(("cut", "spoil", "insert", "remove", "repeat", "token", "head", "nothing")):
            case "cut":
                del data[start:]
            case "spoil":
                data[start:stop] = random.randbytes(stop - start)
            case "insert":
                data[start:start] = random.randbytes(random.choice((1, 3, 30)))
            case "remove":
                del data[start:stop]
            case "repeat":
                data[start:start] = data[start:stop]
            case "token":
                data[start:start] = random.choice(YAML_TOKENS)
            case "head":  # lengths and magic numbers stand there
                for i in range(min(8, len(data))):
                    data[i] = random.choice((0, 1, 127, 255, data[i]))
            case _:
                data = data if random.random() < 0.9 else bytearray()
    return bytes(data)


def path(random: Random, file: Path, changed: bytes) -> None:
    """Put spoilt content where a file was; or nothing, a folder, a pickle, or a link to itself."""
    file.unlink()
    match random.choice(("content",) * 8 + ("missing", "folder", "pickle", "loop", "empty")):
        case "content":
            file.write_bytes(changed)
        case "folder":
            file.mkdir()
        case "pickle":
            file.write_bytes(pickle.dumps({"state": [changed[:20]]}))
        case "loop":
            file.symlink_to(file.name)
        case "empty":
            file.touch()
        case _:
            return

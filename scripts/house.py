"""The form of the package in figures: its files, import circles, `isinstance` on concrete kinds, and docstrings.

    python scripts/house.py
    python scripts/house.py --list

Reads the source and imports none of it. A *concrete kind* is a class of the package that a run or a user chooses among
others: a reference, an objective, an engine, a reward, a divergence, a benchmark, a trainer, a section of a run file.
Protocols, abstract classes and exceptions are no kinds. `isinstance`, `issubclass`, `type(x) is` and class patterns are
counted, one for each place. Two imports at module level make a circle if each leads to the other; imports inside of
functions and under TYPE_CHECKING make none. `--list` names the places.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALL = 60
TARGETS = {"files": 285, f"files under {SMALL} lines": 60, "import circles": 0, "isinstance on concrete kinds": 10}
FAMILIES = ("references", "objectives", "rollouts", "rewards", "divergences", "evaluation.benchmarks")
"""Packages whose classes are kinds; sections of a run file and trainers are kinds wherever they are."""
SECTION, TRAINER = "FrozenModel", "AlignmentTrainer"
ABSTRACT, RECORDS = {"Protocol", "ABC"}, {"NamedTuple", "TypedDict", "Enum", "StrEnum"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=ROOT / "falign")
    parser.add_argument("--list", action="store_true", help="also the places")
    args = parser.parse_args()
    print(House(args.package).report(listed=args.list))


@dataclass(frozen=True)
class Found:
    """A class of the package, and where it is."""

    module: str
    node: ast.ClassDef


@dataclass
class Module:
    """One file of the package."""

    path: Path
    name: str
    is_package: bool
    tree: ast.Module = field(repr=False)
    lines: int

    def source(self, node: ast.ImportFrom) -> str:
        """Return the module from which names are imported."""
        if not node.level:
            return node.module or ""
        here = self.name.split(".")
        above = here[: len(here) - node.level + self.is_package]
        return ".".join([*above, *filter(None, [node.module])])

    @cached_property
    def imported(self) -> dict[str, tuple[str, str | None]]:
        """Module and name behind each imported name, wherever the import stands."""
        found: dict[str, tuple[str, str | None]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                found |= {alias.asname or alias.name: (self.source(node), alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.asname or alias.name.split(".")[0]: (alias.name, None) for alias in node.names}
        return found

    @cached_property
    def top(self) -> dict[str, ast.ClassDef | ast.expr]:
        """Classes and values that the module defines."""
        found: dict[str, ast.ClassDef | ast.expr] = {}
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = node.value
        return found


class House:
    """The modules of a package, and what is counted of them."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self.modules: dict[str, Module] = {}
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            text = path.read_text(encoding="utf-8")
            self.modules[name] = Module(path, name, is_package, ast.parse(text), len(text.splitlines()))

    def report(self, *, listed: bool = False) -> str:
        """Return the table, and where asked for the places behind its figures."""
        rooms = [module for module in self.modules.values() if not module.is_package]
        small = [module for module in rooms if module.lines < SMALL]
        circles, kinds, what = self.circles(), self.isinstance_on_kinds(), self.docstrings_with_what()
        figures = {
            "files": len(self.modules),
            "files outside __init__": len(rooms),
            f"files under {SMALL} lines": len(small),
            "median lines": statistics.median(module.lines for module in rooms),
            "import circles": len(circles),
            "isinstance on concrete kinds": len(kinds),
            'docstrings that begin with "What"': len(what),
        }
        lines = [f"{'':36} {'now':>6} {'target':>7}"]
        lines += [f"{name:36} {figure:6} {TARGETS.get(name, ''):>7}" for name, figure in figures.items()]
        if listed:
            places = {
                f"files under {SMALL} lines": [f"{module.lines:3} {self.place(module)}" for module in small],
                "import circles": [" <-> ".join(circle) for circle in circles],
                "isinstance on concrete kinds": kinds,
                'docstrings that begin with "What"': what,
            }
            for name, found in places.items():
                lines += ["", name, *(f"  {each}" for each in found)]
        return "\n".join(lines)

    def place(self, module: Module, line: int | None = None) -> str:
        file = module.path.relative_to(self.package.parent)
        return str(file) if line is None else f"{file}:{line}"

    # Classes

    def resolve(self, module: Module, node: ast.expr | None) -> list[Found]:
        """Return the classes of the package that an expression names: a name, an attribute, a tuple or a union."""
        match node:
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return [found for part in parts for found in self.resolve(module, part)]
            case ast.BinOp(left=left, right=right):
                return [*self.resolve(module, left), *self.resolve(module, right)]
            case ast.Subscript(value=value):
                return self.resolve(module, value)
            case ast.Name(id=name):
                return self.named(module, name)
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in module.imported:
                source, inner = module.imported[name]
                target = f"{source}.{inner}" if inner else source
                return self.named(self.modules[target], attribute) if target in self.modules else []
        return []

    def named(self, module: Module, name: str) -> list[Found]:
        defined = module.top.get(name)
        if isinstance(defined, ast.ClassDef):
            return [Found(module.name, defined)]
        if defined is not None:
            return self.resolve(module, defined)
        source, inner = module.imported.get(name, ("", None))
        return self.named(self.modules[source], inner) if inner and source in self.modules else []

    def ancestors(self, found: Found) -> Iterator[str]:
        """Yield the names of all base classes, also of those that other packages define."""
        module = self.modules[found.module]
        for base in found.node.bases:
            yield ast.unparse(base).split("[")[0].rpartition(".")[2]
            for above in self.resolve(module, base):
                yield from self.ancestors(above)

    def is_kind(self, found: Found) -> bool:
        direct = {ast.unparse(base).split("[")[0].rpartition(".")[2] for base in found.node.bases}
        above = {found.node.name, *self.ancestors(found)}
        if direct & ABSTRACT or above & RECORDS or any(name.endswith(("Error", "Exception")) for name in above):
            return False
        inside = found.module.partition(".")[2]
        in_family = any(inside == family or inside.startswith(f"{family}.") for family in FAMILIES)
        return in_family or bool(above & {SECTION, TRAINER})

    def isinstance_on_kinds(self) -> list[str]:
        """Return each place that asks a value for its concrete kind, with the kinds."""
        places = []
        for module in self.modules.values():
            for line, asked in sorted(type_questions(module.tree), key=lambda question: question[0]):
                kinds = [found.node.name for found in self.resolve(module, asked) if self.is_kind(found)]
                if kinds:
                    places.append(f"{self.place(module, line)}  {' | '.join(kinds)}")
        return places

    # Imports

    def circles(self) -> list[list[str]]:
        """Return the groups of modules that lead to one another by imports at module level."""
        graph = {name: sorted(self.leads_to(module)) for name, module in self.modules.items()}
        below = {name: reached(graph, name) for name in graph}
        groups = {tuple(sorted(each for each in below[name] if name in below[each])) for name in graph}
        return [list(group) for group in sorted(groups) if len(group) > 1]

    def leads_to(self, module: Module) -> set[str]:
        found = set()
        for node in at_module_level(module.tree.body):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                source = module.source(node)
                inner = [f"{source}.{alias.name}" for alias in node.names]
                names = [name if name in self.modules else source for name in inner]
            found |= {name for name in names if name in self.modules}
        return found - {module.name}

    # Docstrings

    def docstrings_with_what(self) -> list[str]:
        """Return the places of docstrings, those of attributes included, whose first word is "What"."""
        return [
            f"{self.place(module, node.lineno)}  {node.value.value.split(chr(10))[0][:70]}"
            for module in self.modules.values()
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
            and node.value.value.lstrip().startswith(("What ", "What's "))
        ]


def type_questions(tree: ast.Module) -> Iterator[tuple[int, ast.expr]]:
    """Yield the line and the classes of each question for a type."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, asked]):
                yield node.lineno, asked
            case ast.Compare(left=ast.Call(func=ast.Name(id="type")), comparators=[asked]):
                yield node.lineno, asked
            case ast.MatchClass(cls=asked):
                yield node.lineno, asked


def at_module_level(body: Iterable[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that run when a module is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_module_level(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.ExceptHandler)]
            yield from at_module_level(inner)  # pyright: ignore[reportArgumentType]


def reached(graph: dict[str, list[str]], start: str) -> set[str]:
    """Return all nodes to which a node leads, in one step or more."""
    found: set[str] = set()
    waiting = [*graph[start]]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += graph[node]
    return found


if __name__ == "__main__":
    main()

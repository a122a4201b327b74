"""Dependencies point one way, and the mathematics imports nothing heavier than torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import falign

PACKAGE = Path(falign.__file__).parent
BELOW_RUNS = ("divergences", "objectives", "scoring", "data", "models", "references", "rollouts", "judges", "rewards")
# Packages of falign that each package may import, besides itself and the modules of SHARED.
ALLOWED = {
    "divergences": set(),
    "objectives": {"divergences"},
    "methods": {"divergences", "objectives"},
    "audit": {"divergences", "objectives"},
    "scoring": {"divergences", "objectives"},
    "data": {"scoring"},
    "models": {"scoring"},
    "references": {"objectives", "scoring", "models", "rollouts"},  # the client of a server
    "rollouts": {"objectives", "scoring", "data", "models"},
    "judges": set(),
    "rewards": {"judges", "divergences", "objectives", "scoring", "data", "models", "references"},
    "metrics": {"divergences", "objectives", "rewards"},
    "foreign": set(),
    "runfile": {*BELOW_RUNS, "foreign"},
    "imports": {"foreign", "runfile"},
    "runs": {*BELOW_RUNS, "runfile"},
    "testing": {"audit", *BELOW_RUNS, "training"},
    "training": {*BELOW_RUNS, "metrics", "runfile", "runs"},
    "evaluation": {*BELOW_RUNS, "methods", "metrics", "runfile", "runs", "training"},
    "integrations": {*BELOW_RUNS, "methods", "metrics", "runs", "training"},
    "report": {*BELOW_RUNS, "metrics", "runfile", "runs", "training", "evaluation"},
    "cli": {
        *BELOW_RUNS,
        "audit",
        "metrics",
        "runfile",
        "runs",
        "training",
        "evaluation",
        "report",
        "api",
        "foreign",
        "imports",
    },
}
SHARED = {
    *(
        "choices",
        "code_identity",
        "deadlines",
        "durable",
        "errors",
        "full_disk",
        "json_lines",
        "lazy",
        "numeric_fields",
        "passwords",
        "plain_yaml",
        "raised",
        "registry",
        "seeds",
    ),
    "templates",
    "terminal",
}
LIGHT = {"divergences", "objectives", "methods", "scoring"}
HEAVY = ("transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate", "numpy", "pydantic", "vllm")


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_every_package_has_its_place():
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert packages == set(ALLOWED)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    allowed = ALLOWED[package] | {package} | SHARED
    for file in (PACKAGE / package).rglob("*.py"):
        for name in imports_of(file):
            if name.startswith("falign."):
                inner = name.split(".")[1]
                assert inner in allowed, f"{file.relative_to(PACKAGE)} imports falign.{inner}"


@pytest.mark.parametrize("package", sorted(LIGHT))
def test_the_mathematics_imports_torch_and_nothing_heavier(package):
    for file in (PACKAGE / package).rglob("*.py"):
        roots = {name.split(".")[0] for name in imports_of(file)}
        assert not roots & set(HEAVY), f"{file.relative_to(PACKAGE)} imports {roots & set(HEAVY)}"


def test_trl_is_only_inside_its_integration_and_where_its_losses_are_audited():
    integration = set((PACKAGE / "integrations" / "trl").rglob("*.py"))
    for file in set(PACKAGE.rglob("*.py")) - integration - {PACKAGE / "audit" / "trl_losses.py"}:
        assert not any(name.split(".")[0] == "trl" for name in imports_of(file)), file


def test_import_falign_loads_torch_and_nothing_heavier():
    code = (
        "import torch, sys; before = set(sys.modules); import falign, falign.scoring, falign.integrations.trl; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    # jaxtyping brings numpy, which torch brings too as soon as an array is asked for.
    assert not [name for name in HEAVY if name != "numpy" and f"'{name}'" in loaded], loaded


def test_no_module_is_named_for_nothing():
    assert not [f for f in PACKAGE.rglob("*.py") if f.stem in {"utils", "common", "misc", "helpers"}]

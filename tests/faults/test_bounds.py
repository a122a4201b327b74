"""The bounds of pyproject.toml: what the scripts install, what constraints.txt pins, and what a user has installed."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from falign.cli.installed import CHECKED, require_supported_releases
from falign.errors import InstallationError

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPENDENCIES = list(map(Requirement, PROJECT["dependencies"]))
OPTIONAL = [Requirement(each) for extra in PROJECT["optional-dependencies"].values() for each in extra]
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_script_installs_the_lowest_version_of_every_dependency():
    script = ROOT / "scripts" / "bound_constraints.py"
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    floors = dict(line.split("==") for line in printed.splitlines())
    assert list(floors) == [each.name for each in DEPENDENCIES]
    for each in DEPENDENCIES:
        assert each.specifier.contains(floors[each.name])
        assert f">={floors[each.name]}" in str(each.specifier).split(",")
    assert "scripts/bound_constraints.py" in (ROOT / "scripts" / "test_bounds.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("requirement", DEPENDENCIES + OPTIONAL, ids=str)
def test_the_pinned_set_is_within_the_bounds(requirement):
    pinned = {canonicalize_name(name): number for name, number in PINNED.items()}
    assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


def test_python_is_as_new_as_the_libraries_need():
    assert not SpecifierSet(PROJECT["requires-python"]).contains("3.10")  # transformers 5.23 needs 3.11
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.11")


def install(folder, **releases):
    """Write the metadata of packages as pip does, those of falign with the bounds of pyproject.toml."""
    required = "".join(f"Requires-Dist: {each}\n" for each in PROJECT["dependencies"])
    for name, number in {"falign": "0.1.0", **releases}.items():
        (folder / f"{name}-{number}.dist-info").mkdir()
        text = f"Metadata-Version: 2.4\nName: {name}\nVersion: {number}\n{required if name == 'falign' else ''}"
        (folder / f"{name}-{number}.dist-info" / "METADATA").write_text(text)


@pytest.mark.parametrize(
    ("releases", "message"),
    [
        (
            {"transformers": "5.16.0"},
            "transformers 5.16.0 is installed; falign needs 'transformers<5.24,>=5.23'. "
            "Run: pip install 'transformers<5.24,>=5.23'",
        ),
        ({"transformers": "5.24.0"}, "transformers 5.24.0 is installed; falign needs 'transformers<5.24,>=5.23'"),
        ({"transformers": "5.24.0.dev0"}, "transformers 5.24.0.dev0 is installed"),
        ({"peft": "0.20.0"}, "peft 0.20.0 is installed; falign needs 'peft>=0.21'. Run: pip install 'peft>=0.21'"),
        (
            {"transformers": "5.8", "peft": "0.20.0"},
            "transformers 5.8 is installed and peft 0.20.0 is installed; "
            "falign needs 'transformers<5.24,>=5.23' 'peft>=0.21'",
        ),
    ],
)
def test_a_release_outside_the_bounds_is_named_with_the_command_that_mends_it(releases, message, tmp_path, monkeypatch):
    install(tmp_path, **releases)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InstallationError, match=re.escape(message)):
        require_supported_releases()


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    install(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(InstallationError, match="transformers is missing and peft is missing; falign needs"):
        require_supported_releases()


def test_what_is_installed_here_and_other_builds_of_it_are_taken(tmp_path, monkeypatch):
    require_supported_releases()
    assert {"transformers", "peft"} == set(CHECKED)
    install(tmp_path, transformers=f"{version('transformers')}+local", peft="0.22.0.dev0")
    monkeypatch.syspath_prepend(tmp_path)
    require_supported_releases()


def test_a_command_says_so_before_it_imports_the_library(tmp_path):
    install(tmp_path, transformers="5.16.0")
    (tmp_path / "transformers.py").write_text("raise SystemExit('transformers was imported')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from falign.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "run.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: transformers 5.16.0 is installed; falign needs"), done.stderr

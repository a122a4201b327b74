"""The TRL that is installed, and what of it the trainers override; scripts/test_trl.sh runs this folder on others."""

from pathlib import Path

import pytest
import trl
from packaging.version import Version

from falign.integrations import trl as integration
from scripts.bound_constraints import floors

ROOT = Path(__file__).parents[3]
TRAINERS = [name for name in integration.__all__ if name.endswith("Trainer")]


def test_continuous_integration_runs_the_oldest_release_that_is_allowed():
    assert Version(trl.__version__) >= Version(floors()["trl"])
    assert "scripts/test_trl.sh floor" in (ROOT / "scripts" / "test.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TRAINERS)
def test_what_a_trainer_overrides_exists_upstream(name):
    """An override of a method that TRL has renamed would never be called."""
    trainer = getattr(integration, name)
    own = {each for each in vars(trainer) if getattr(vars(trainer)[each], "__override__", False)}
    above = {each for base in trainer.__mro__[1:] for each in vars(base)}
    assert own
    assert own <= above

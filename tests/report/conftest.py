"""Real run folders of a tiny model, offline and online; each test has its own copy."""

import shutil
import warnings

import pytest
from rich.console import Console

from falign.report import write_report
from falign.runfile import parse_run
from falign.training import train
from tests.models.tiny import save_tiny
from tests.report.page_text import Page
from tests.report.summaries import add_summary, rewards_summary, samples_summary
from tests.training.pairs import run_data, write_pairs
from tests.training.prompts import online_data, write_prompts

HOSTILE = "<script>alert('x')</script> & \"quoted\" $a_b$: "


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tiny = save_tiny(folder / "tiny")
    offline = run_data(tiny, write_pairs(folder / "pairs.jsonl"), folder / "offline", sampling={"prompts": [HOSTILE]})
    other = {**offline, "output_dir": str(folder / "other"), "objective": {"divergence": "forward_kl", "beta": 0.3}}
    online = online_data(tiny, write_prompts(folder / "prompts.jsonl"), folder / "online")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
        for run in (offline, other, online):
            train(parse_run(run), console=Console(quiet=True))
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """Return a function from the name of a run to a copy of its folder; without logs nothing is drawn of it."""

    def copy(name, *, logs=True):
        folder = shutil.copytree(trained / name, tmp_path / "runs" / name)
        if not logs:
            (folder / "metrics.jsonl").unlink()
        return folder

    return copy


@pytest.fixture(scope="session")
def reported(trained, tmp_path_factory):
    """A report of three runs, the first of which is evaluated: what was written, its text, and its page."""
    folder = tmp_path_factory.mktemp("reported")
    paths = [shutil.copytree(trained / name, folder / name) for name in ("offline", "other", "online")]
    add_summary(paths[0], rewards_summary())
    add_summary(paths[0], samples_summary())
    written = write_report(paths, folder / "report")
    text = written.page.read_text(encoding="utf-8")
    return written, text, Page(text)

"""Model cards of real exports, parsed as the Hub does; and an export that is uploaded."""

import re

import pytest
from huggingface_hub import ModelCard, constants
from rich.console import Console

import falign
from falign.errors import ConfigError
from falign.runfile import parse_run
from falign.runs.model_card import base_license
from falign.training import train
from tests.models.tiny import save_tiny
from tests.runs.hub import TOKEN, hub
from tests.training.pairs import run_data, write_pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    tiny, data = save_tiny(folder / "tiny"), write_pairs(folder / "pairs.jsonl")
    (tiny / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny-license\nlicense_link: https://example.org/license\n---\n# Tiny\n"
    )
    train(parse_run(run_data(tiny, data, folder / "mine", training={"max_steps": 2})), console=Console(quiet=True))
    return falign.load(folder / "mine")


def test_a_card_has_method_data_figures_and_license_and_no_folder_of_this_disk(run, tmp_path):
    for format in ("adapter", "merged"):
        exported = run.export(format, out=tmp_path / format)
        card = ModelCard.load(exported.path / "README.md", ignore_metadata_errors=False)
        assert card.data.library_name == {"adapter": "peft", "merged": "transformers"}[format]
        assert (card.data.license, card.data.license_name) == ("other", "tiny-license")
        assert card.data.pipeline_tag == "text-generation"
        assert card.data.tags == ["falign", "alignment", "pairwise"]
        assert "divergence: jensen_shannon, beta: 0.5" in card.text
        assert "| pairs.jsonl | 24 | 24 | 0 | 0 |" in card.text
        manifest = run.folder.read_manifest()
        assert manifest["inputs"]["rows"] in card.text
        assert manifest["base_weights"] in card.text
        row = re.search(r"\| rewards/accuracies \| (\S+) \| (\S+) \|", card.text)
        before, after = (run.summary.before["rewards/accuracies"], run.summary.after["rewards/accuracies"])
        assert (float(row[1]), float(row[2])) == pytest.approx((before, after), rel=1e-3)
        assert str(tmp_path.parent.parent) not in card.content


def test_a_given_license_wins_and_what_is_none_is_refused(run, tmp_path):
    exported = run.export("adapter", out=tmp_path / "adapter", license="apache-2.0")
    assert ModelCard.load(exported.path / "README.md").data.license == "apache-2.0"
    with pytest.raises(ConfigError, match=r"license=.Apache 2.: give an identifier of the Hub, such as apache-2\.0"):
        run.export("adapter", out=tmp_path / "other", license="Apache 2")
    (tmp_path / "README.md").write_text("---\n{unreadable: [\n---\n")
    assert base_license(str(tmp_path)) == {}


def test_an_export_is_uploaded_whole_with_its_card(run, tmp_path, monkeypatch):
    with hub() as (url, state):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        exported = run.export("adapter", out=tmp_path / "adapter", push="lab/mine", private=True)
    assert exported.url == f"{url}/lab/mine"
    assert state.files == {("lab/mine", file.name): file.read_bytes() for file in exported.path.iterdir()}
    assert 'from_pretrained("lab/mine")' in state.files["lab/mine", "README.md"].decode()
    with pytest.raises(ConfigError, match="private applies only to an upload"):
        run.export("adapter", out=tmp_path / "other", private=True)

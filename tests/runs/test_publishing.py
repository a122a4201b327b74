"""Uploads to a server on this machine, by the real client of the Hub."""

import pytest
from huggingface_hub import constants

from falign.errors import ConfigError, PublishingError
from falign.runs.publishing import check_account, push
from tests.runs.hub import READER, TOKEN, hub

# The client sends large files in a form that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")


@pytest.fixture
def server(monkeypatch):
    with hub() as (url, state):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield state


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "export"
    target.mkdir()
    (target / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# A model\n", encoding="utf-8")
    (target / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 64)
    return target


def test_a_folder_arrives_as_it_is_in_a_private_repository_that_is_created_once(server, folder):
    account = check_account("mine")
    assert account.repository == "ann/mine"
    for _ in range(2):
        assert push(folder, account, private=True).endswith("/ann/mine")
    (asked,) = server.repositories.values()
    assert asked.get("private") or asked.get("visibility") == "private"
    assert server.files == {("ann/mine", file.name): file.read_bytes() for file in folder.iterdir()}
    assert {token for _, path, token in server.requests if path.startswith(("/api/repos", "/api/models"))} == {TOKEN}


@pytest.mark.parametrize(
    ("name", "token", "error", "message"),
    [
        ("a/b/c", TOKEN, ConfigError, r"push='a/b/c' is not the name of a repository"),
        ("mine", None, ConfigError, r"push needs a token that may write: run `hf auth login`, or set HF_TOKEN"),
        ("mine", "hf_" + "x" * 30, PublishingError, r"answered 401 .*: the token is not valid \(any more\)"),
        ("mine", READER, PublishingError, r"the token of ann may only read: make one that may write"),
        ("bob/mine", TOKEN, PublishingError, r"who may write to ann, lab, closed: name one of these"),
    ],
    ids=["name", "no token", "wrong token", "reads", "other account"],
)
def test_what_cannot_be_uploaded_is_refused_before_anything_is_sent(server, monkeypatch, name, token, error, message):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(error, match=message):
        check_account(name)
    assert not server.repositories


def test_an_upload_that_the_hub_refuses_names_the_status_and_the_remedy(server, folder):
    with pytest.raises(PublishingError, match=r"push=closed/mine: .* answered 403 .*rights.*: the token may not write"):
        push(folder, check_account("closed/mine"))
    assert not server.files


def test_offline_and_unreachable_are_said_so(server, folder, monkeypatch):
    account = check_account("mine")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PublishingError, match=r"http://127.0.0.1:9 cannot be reached .*: check the network"):
        push(folder, account)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        check_account("mine")

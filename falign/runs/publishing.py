"""Upload of an exported folder to a repository of the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of the HTTP library that huggingface_hub uses, which changes with its release
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from falign.errors import ConfigError, PublishingError, one_line

__all__ = ["Account", "check_account", "push"]


class Account(NamedTuple):
    """An account whose token may write to a repository.

    Attributes:
        repository: The full name of the repository, ``OWNER/NAME``.
    """

    repository: str


def check_account(name: str) -> Account:
    """Check that an upload can work, before anything is exported.

    Args:
        name: ``OWNER/NAME``, or ``NAME`` in the account of the token.

    Returns:
        The account.

    Raises:
        ConfigError: The name is invalid, there is no token, or transformers and the Hub are set offline.
        PublishingError: The Hub cannot be reached, or refuses the token.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"push={name!r} is not the name of a repository: {one_line(error)}") from error
    if constants.is_offline_mode():
        raise ConfigError("push needs the Hub, and HF_HUB_OFFLINE is set: unset it, or leave push out.")
    if get_token() is None:
        raise ConfigError(
            "push needs a token that may write: run `hf auth login`, or set HF_TOKEN; "
            "it is made under Settings, Access Tokens, of your account."
        )
    with _reaching(name):
        account = HfApi().whoami()
    owner, _, rest = name.rpartition("/")
    owners = [account["name"], *(each["name"] for each in account.get("orgs", ()))]
    if owner and owner not in owners:
        raise PublishingError(
            f"push={name}: the token is that of {account['name']}, who may write to {', '.join(owners)}: name one of "
            "these, or take the token of another account."
        )
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise PublishingError(f"push={name}: the token of {account['name']} may only read: make one that may write.")
    return Account(f"{owner or account['name']}/{rest}")


def push(folder: Path, account: Account, *, private: bool = False) -> str:
    """Create the repository if it does not exist, and upload a folder to it in one commit.

    Args:
        folder: The folder.
        account: From :func:`check_account`.
        private: Whether a new repository is private; an existing one stays as it is.

    Returns:
        Its address.

    Raises:
        PublishingError: The Hub cannot be reached, or refuses the upload; nothing was committed.
    """
    api, name = HfApi(), account.repository
    with _reaching(name):
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by falign export")
    return str(url)


@contextmanager
def _reaching(name: str) -> Iterator[None]:
    """Convert errors of a request to one with the remedy."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConfigError(f"push={name}: HF_HUB_OFFLINE is set: unset it.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedies = {
            401: "the token is not valid (any more): run `hf auth login`, or set HF_TOKEN to a new one",
            403: "the token may not write there: make one with write access to this repository",
            404: "there is no such account, or the token may not see it: check the name",
            409: "a repository of this name is in the way: choose another name",
            429: "too many requests: wait, and push again",
        }
        remedy = remedies.get(status, "push again later")
        raise PublishingError(
            f"push={name}: {constants.ENDPOINT} answered {status} ({_said(error)}): {remedy}."
        ) from error
    except (HTTPError, OSError) as error:
        raise PublishingError(
            f"push={name}: {constants.ENDPOINT} cannot be reached ({type(error).__name__}: {one_line(error)}): check "
            "the network, and push again."
        ) from error


def _said(error: HfHubHTTPError) -> str:
    return one_line(ValueError(error.server_message or type(error).__name__))

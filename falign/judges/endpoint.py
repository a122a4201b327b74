"""The endpoint of a judge: its address, its options, and the limits on time, money and simultaneous requests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from falign.choices import nearest, shown
from falign.errors import ConfigError, holds_secret, refuse_passwords
from falign.plain_yaml import plain_yaml

__all__ = ["MILLION", "Endpoint", "read_endpoint"]

MILLION = 1_000_000

OWN_KEYS = {
    "model": "model",
    "temperature": "temperature",
    "max_tokens": "max_tokens",
    "seed": "seed",
    "response_format": "answer",
}
"""Keys of a request that fields of the endpoint set, with these fields."""

FIXED_KEYS = ("messages", "n", "stream")


class Endpoint(BaseModel):
    """A model behind an OpenAI-compatible endpoint (``POST URL/chat/completions``).

    The key is read from the environment, and is never part of the object.

    Example:
        >>> Endpoint(url="http://127.0.0.1:8000/v1", model="judge").cost(2_000_000, 0) is None
        True
        >>> Endpoint(url="http://x/v1", model="m", price_prompt=2, price_completion=8).cost(500_000, 250_000)
        3.0
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    url: str = Field(pattern=r"^https?://[^/\s]+(/\S*)?$")
    """Base address, usually ending in ``/v1``."""
    model: str = Field(min_length=1)
    """Name of the model there; a dated version, if the service has them."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; null sends none."""
    temperature: float | None = Field(default=0.0, ge=0)
    """Null leaves it out of the request, for models that refuse it."""
    max_tokens: int | None = Field(default=1024, ge=1)
    """Maximum tokens of an answer; null leaves it out of the request."""
    seed: int | None = None
    """Seed of the service's sampling, where it has one."""
    answer: Literal["auto", "schema", "text"] = "auto"
    """``schema`` asks for JSON of a schema (``response_format``); ``text`` only says so in the prompt; ``auto`` tries
    the schema, and asks for text if the service refuses it."""
    options: dict[str, Any] = {}
    """Further keys of the request: ``{reasoning_effort: low}``."""
    reasks: int = Field(default=1, ge=0)
    """How often a malformed answer is answered by the reason and a request for another; then it is a failure."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds for each attempt, from the first byte sent to the last byte of the answer."""
    retries: int = Field(default=6, ge=0)
    """Further attempts after status 429, 408 or 5xx, a timeout or a broken connection."""
    backoff: float = Field(default=1.0, ge=0)
    """Seconds before the second attempt, doubled each time up to a minute; a ``Retry-After`` of the service counts
    instead."""
    concurrency: int = Field(default=8, ge=1)
    """Maximum number of simultaneous requests of one process."""
    cache: Path | None = None
    """A file (SQLite) for answers, by address, model, messages and options: with it, none is paid for twice."""
    price_prompt: float | None = Field(default=None, ge=0)
    """Price of a million prompt tokens."""
    price_completion: float | None = Field(default=None, ge=0)
    """Price of a million completion tokens."""
    budget: float | None = Field(default=None, gt=0)
    """The most to spend, in the unit of the prices; with a cache, what it has cost so far counts."""

    @field_validator("url")
    @classmethod
    def _without_slash(cls, url: str) -> str:
        if holds_secret(url):
            raise ValueError("an address with a password; put the key into the environment, and name it in api_key_env")
        if "?" in url or "#" in url:
            raise ValueError(
                "an address with a query; give the base address, and further keys of the request in options"
            )
        return url.rstrip("/").removesuffix("/chat/completions")

    @model_validator(mode="after")
    def _check(self) -> Endpoint:
        for key in self.options:
            if key in FIXED_KEYS:
                raise ValueError(f"options.{key} is set by falign: leave it out")
            if key in OWN_KEYS:
                raise ValueError(f"options.{key} has a field of its own: set {OWN_KEYS[key]}")
        if (self.price_prompt is None) != (self.price_completion is None):
            raise ValueError("price_prompt and price_completion belong together: give both, 0 for what is free")
        if self.budget is not None and self.price_prompt is None:
            raise ValueError("budget needs the prices of a million tokens: set price_prompt and price_completion")
        return self

    def key(self) -> str | None:
        """Return the key of the service from the environment.

        Raises:
            ConfigError: The variable is not set.
        """
        if self.api_key_env is None:
            return None
        value = os.environ.get(self.api_key_env, "").strip()
        if not value:
            near = nearest(self.api_key_env, [name for name in os.environ if name.endswith(("KEY", "TOKEN"))])
            hint = f" Did you mean {near}?" if near else ""
            raise ConfigError(
                f"api_key_env={self.api_key_env!r}: this environment variable is not set; export it before the "
                f"call.{hint}"
            )
        return value

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Return the price of tokens; None without prices."""
        if self.price_prompt is None or self.price_completion is None:
            return None
        return (prompt_tokens * self.price_prompt + completion_tokens * self.price_completion) / MILLION

    def body(self, messages: list[dict[str, str]], schema: dict[str, Any] | None) -> dict[str, Any]:
        """Return the JSON of a request.

        Args:
            messages: The conversation.
            schema: JSON schema of the answer; None to leave it out.
        """
        given = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": self.seed}
        form = None if schema is None else {"type": "json_schema", "json_schema": schema}
        return {
            "model": self.model,
            "messages": messages,
            **{name: value for name, value in given.items() if value is not None},
            **({} if form is None else {"response_format": form}),
            **self.options,
        }

    def identity(self) -> dict[str, Any]:
        """Return the fields that an answer depends on."""
        names = ("url", "model", "temperature", "max_tokens", "seed", "answer", "options", "reasks")
        return {name: getattr(self, name) for name in names}


def read_endpoint(given: Endpoint | Mapping[str, Any] | str | Path) -> Endpoint:
    """Return an endpoint from its fields, or from a YAML file with them.

    Raises:
        ConfigError: The file is missing, or a field is unknown, missing or invalid.
    """
    if isinstance(given, Endpoint):
        return given
    place, values = "judge", given
    if isinstance(given, str | Path):
        place = str(given)
        if not Path(given).is_file():
            raise ConfigError(f"No file of a judge at {place}: give a YAML file with the keys url and model.")
        values = plain_yaml(Path(given).read_text(encoding="utf-8"), place=place)
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{place} holds {type(values).__name__}; it must have the keys of an endpoint: url, model, ..."
        )
    refuse_passwords(dict(values), place=place)
    try:
        return Endpoint.model_validate(dict(values))
    except ValidationError as error:
        messages = [_explained(detail) for detail in error.errors(include_url=False)]
        raise ConfigError(f"{place}: " + "\n  ".join(messages)) from error


def _explained(detail: Any) -> str:
    path = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        near = nearest(path, Endpoint.model_fields)
        hint = f": did you mean {near}?" if near else "."
        return f"unknown key {path!r}{hint} The keys of an endpoint are {', '.join(Endpoint.model_fields)}."
    if detail["type"] == "missing":
        return f"{path} is required."
    reason = detail["msg"].removeprefix("Value error, ")
    return f"{path}={shown(detail['input'])}: {reason}." if path else f"{reason}."

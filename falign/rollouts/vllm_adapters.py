"""Adapters on a server: one name and one folder per version, loaded once and never in place."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from typing_extensions import override

from falign.errors import ConfigError
from falign.models.staging import staged_folder
from falign.models.structure import adapter_weights
from falign.rollouts.vllm_client import HTTPClient, RefusedError
from falign.rollouts.vllm_published import Published, Sync

__all__ = ["AdapterSync"]


class AdapterSync(Sync):
    """Serve each version as an adapter of its own over the server's base model.

    A name or a path that is used twice would serve keys and values that older weights have left in the server's cache,
    and an adapter loaded in place is read from its folder again at every step.

    Args:
        client: Of the server.
        base: What the server calls its base model.
    """

    kind = "adapter"
    exclusive = False

    def __init__(self, client: HTTPClient, *, base: str) -> None:
        self._client, self._base = client, base
        self._loaded: set[str] | None = None  # None: not known

    @override
    def write(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, PeftModel)
        name = model.active_adapters[0]
        weights = {key: value.detach().cpu().contiguous() for key, value in adapter_weights(model, name).items()}
        config = copy.deepcopy(model.peft_config[name])
        config.inference_mode = True
        config.base_model_name_or_path = self._base
        with staged_folder(folder, needed_bytes=sum(value.nbytes for value in weights.values())) as staging:
            save_file(weights, staging / "adapter_model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(str(staging))

    @override
    def bring(self, versions: Collection[Published]) -> None:
        if self._loaded is None:
            self._loaded = {card["id"] for card in self._client.get("/v1/models")["data"]}
        for version in versions:
            if version.name not in self._loaded:
                self._load(version)
                self._loaded.add(version.name)

    def _load(self, version: Published) -> None:
        body = {"lora_name": version.name, "lora_path": str(version.folder), "load_inplace": False}
        try:
            self._client.post("/v1/load_lora_adapter", body)
        except RefusedError as error:
            raise ConfigError(
                f"{error} The server does not load version {version.version}: it must see rollout.engine.shared_dir "
                f"under the same path ({version.folder}), and run with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."
            ) from error

    @override
    def doubt(self) -> None:
        self._loaded = None

    @override
    def drop(self, version: Published) -> None:
        try:
            self._client.post("/v1/unload_lora_adapter", {"lora_name": version.name})
        except RefusedError as error:
            if error.status != 404:  # a server that was started anew has lost it already
                raise
        if self._loaded is not None:
            self._loaded.discard(version.name)

    @override
    def model_of(self, version: Published) -> str:
        return version.name

    @override
    def close(self) -> None:
        pass  # each version is dropped by itself

"""Adapters on a server: one name and one folder per version, loaded once and never replaced in place."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator
from pathlib import Path

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from typing_extensions import override

from falign.errors import ConfigError
from falign.models.base_weights import BEYOND_PLAIN_LORA, base_change
from falign.models.staging import staged_folder
from falign.models.structure import adapter_weights, base_of, lora_layers
from falign.rollouts.vllm_client import HTTPClient, RefusedError
from falign.rollouts.vllm_published import Published, Sync

__all__ = ["AdapterSync", "why_not_servable"]


class AdapterSync(Sync):
    """Serve each version as a separate adapter over the server's base model.

    If a name or path were used twice, the server would reuse keys and values that it cached with older weights; and it
    reads an adapter that is replaced in place from its folder at every step.

    Args:
        client: The client of the server.
        base: The server's name for its base model.
    """

    kind = "adapter"
    exclusive = False

    def __init__(self, client: HTTPClient, *, base: str) -> None:
        self._client, self._base = client, base
        self._loaded: set[str] | None = None  # None: unknown

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
    def check_held(self, version: Published) -> None:
        pass  # requests name the version, and a restarted server does not know the name

    @override
    def doubt(self) -> None:
        self._loaded = None

    @override
    def drop(self, version: Published) -> None:
        try:
            self._client.post("/v1/unload_lora_adapter", {"lora_name": version.name})
        except RefusedError as error:
            if error.status != 404:  # a restarted server no longer has it
                raise
        if self._loaded is not None:
            self._loaded.discard(version.name)

    @override
    def model_of(self, version: Published) -> str:
        return version.name

    @override
    def close(self) -> None:
        pass  # each version is dropped separately


def why_not_servable(model: nn.Module, *, max_rank: int) -> str | None:
    """Return why the trained weights cannot be served as an adapter; None if they can.

    Args:
        model: The policy.
        max_rank: The largest rank that the server accepts; 0 if it serves no adapters.
    """
    if not isinstance(model, PeftModel):
        return "all weights are trained, there is no adapter"
    if len(model.active_adapters) != 1:
        return f"{len(model.active_adapters)} adapters are active, {', '.join(model.active_adapters)}"
    name = model.active_adapters[0]
    config = model.peft_config[name]
    if not isinstance(config, LoraConfig):
        return f"adapter {name!r} is {config.peft_type}, not LoRA"
    return next(_beyond_lora(config), None) or next(_unfit_layers(model, name, max_rank), None)


def _beyond_lora(config: LoraConfig) -> Iterator[str]:
    for field in BEYOND_PLAIN_LORA:
        if value := getattr(config, field):
            yield f"the adapter has {field}={value}"
    if (change := base_change(vars(config))) is not None:
        yield f"the adapter changes the base model ({change})"


def _unfit_layers(model: PeftModel, name: str, max_rank: int) -> Iterator[str]:
    if max_rank == 0:
        yield "the server serves no adapters (--enable-lora)"
    base, layers = base_of(model), lora_layers(model, name)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if any(isinstance(end, LoraLayer) and name in {*end.lora_A, *end.lora_embedding_A} for end in ends):
        yield "embeddings or head have an adapter, and the ends of the model are served without"
    for place, layer in layers.items():
        if layer.lora_variant:
            yield f"{place} has {', '.join(type(each).__name__ for each in layer.lora_variant.values())}"
        rank, root = layer.r[name], layer.use_rslora.get(name, False)
        if rank > max_rank:
            yield f"the rank of {place}, {rank}, is above --max-lora-rank {max_rank} of the server"
        if not math.isclose(layer.scaling[name], layer.lora_alpha[name] / (math.sqrt(rank) if root else rank)):
            yield f"{place} is scaled by {layer.scaling[name]:g}, which is not what its alpha and rank say"

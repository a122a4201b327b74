"""Whole weights on a server, for policies that it cannot serve as an adapter."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from falign.errors import ConfigError
from falign.models.identity import describe
from falign.models.staging import staged_folder
from falign.models.structure import base_of, without_adapters
from falign.rollouts.vllm_client import HTTPClient, ServerLostError
from falign.rollouts.vllm_description import ServerDescription, describe_server
from falign.rollouts.vllm_published import Published, Sync

__all__ = ["MergedSync", "merged_weights"]


class MergedSync(Sync):
    """Replace the server's weights by each version.

    The server first finishes running requests; its cache of keys and values is then emptied, because the server does
    not do this itself.

    Args:
        client: The client of the server.
        description: The server's settings.
    """

    kind = "merged"
    exclusive = True

    def __init__(self, client: HTTPClient, description: ServerDescription) -> None:
        self._client, self._description = client, description
        self._held: tuple[str, str] | None = None  # instance of the server, and the version that it holds

    @override
    def write(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, PreTrainedModel | PeftModel)
        base, weights = base_of(model), merged_weights(model)
        with staged_folder(folder, needed_bytes=sum(value.nbytes for value in weights.values())) as staging:
            base.save_pretrained(staging, state_dict=weights)

    @override
    def bring(self, versions: Collection[Published]) -> None:
        for version in versions:
            holds = self._as_held(version)
            if holds != self._held:
                self._reload(str(version.folder))
                self._held = holds

    def _as_held(self, version: Published) -> tuple[str, str]:
        # A restarted server has its first weights again, and the model's name does not show that.
        return describe_server(self._client).instance, version.name

    @override
    def check_held(self, version: Published) -> None:
        if self._as_held(version) != self._held:
            raise ServerLostError(
                f"{self._client.url}: the server was restarted or got other weights during the call, so replies may "
                f"come from other weights than version {version.version}."
            )

    def _reload(self, path: str) -> None:
        self._client.post("/pause?mode=wait")
        self._client.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
        self._client.post("/reset_prefix_cache")
        self._client.post("/resume")

    @override
    def doubt(self) -> None:
        self._held = None

    @override
    def drop(self, version: Published) -> None:
        pass  # the next one takes its place

    @override
    def model_of(self, version: Published) -> str:
        return self._description.base

    @override
    def close(self) -> None:
        # Otherwise an adapter of the next run would be served over the last weights of this one.
        if self._held is not None:
            self._reload(self._description.model)
            self._held = None


@torch.no_grad()
def merged_weights(policy: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """Return the weights of an equivalent model without adapters, by the names of its checkpoint.

    The policy itself is not merged, because merging and unmerging would leave its weights rounded.

    Raises:
        ConfigError: The base is quantized, or its checkpoint cannot represent an adapter.
    """
    base = base_of(policy)
    if (kind := describe(policy).quantization) is not None:
        raise ConfigError(
            f"The base is quantized ({kind}), and weights merged into it would be another model's: train plain LoRA, "
            "which is served as an adapter over a server with the same quantization."
        )
    wrapped: dict[str, nn.Module] = {}
    for place, module in base.named_modules():
        inside = any(place.startswith(f"{outer}.") for outer in wrapped)
        if without_adapters(module) is not module and not inside:
            wrapped[place] = module
    _refuse_tied(base, wrapped)
    weights = {
        key: value
        for key, value in base.state_dict().items()
        if not any(key.startswith(f"{place}.") for place in wrapped)
    }
    for place, module in wrapped.items():
        weights |= {f"{place}.{key}": value for key, value in _merged(place, module).state_dict().items()}
    return {key: value.detach().cpu().contiguous() for key, value in weights.items()}


def _refuse_tied(base: PreTrainedModel, wrapped: Mapping[str, nn.Module]) -> None:
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or without_adapters(head).weight is not without_adapters(embeddings).weight:
        return
    for place, module in wrapped.items():
        if module is head or module is embeddings:
            other = "embeddings" if module is head else "head"
            raise ConfigError(
                f"{place} has an adapter and shares its weights with the {other}, so a server of this model has no "
                f"place for them: leave {place} out of the adapter's targets, or sample without a server."
            )


def _merged(place: str, wrapper: nn.Module) -> nn.Module:
    one = copy.deepcopy(wrapper)  # only one layer at a time is in memory twice
    if isinstance(one, ModulesToSaveWrapper):
        return one.modules_to_save[one.active_adapter]  # pyright: ignore
    for layer in one.modules():  # each parameter of the experts has its own wrapper, nested in one another
        if not isinstance(layer, BaseTunerLayer):
            continue
        if not isinstance(layer, LoraLayer):
            raise ConfigError(f"{place} has a {type(layer).__name__}, and only LoRA and its variants are merged.")
        try:
            layer.merge()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise ConfigError(
                f"{place} cannot be merged ({error}): train plain LoRA to sample from a server."
            ) from error
    return without_adapters(one)

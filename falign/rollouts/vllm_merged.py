"""Whole weights on a server, for what it cannot serve as an adapter."""

from __future__ import annotations

import copy
from collections.abc import Collection
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
from falign.models.description import describe
from falign.models.staging import staged_folder
from falign.models.structure import base_of
from falign.rollouts.vllm_client import HTTPClient
from falign.rollouts.vllm_description import ServerDescription, describe_server
from falign.rollouts.vllm_published import Published, Sync

__all__ = ["MergedSync", "merged_weights"]


class MergedSync(Sync):
    """Replace the server's own weights by each version.

    Requests that run are waited for, and the cache of keys and values is emptied, which the server does not do itself.

    Args:
        client: Of the server.
        description: What it says about itself.
    """

    kind = "merged"
    exclusive = True

    def __init__(self, client: HTTPClient, description: ServerDescription) -> None:
        self._client, self._description = client, description
        self._held: tuple[str, str] | None = None  # which start of the server holds which version

    @override
    def write(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, PreTrainedModel | PeftModel)
        base, weights = base_of(model), merged_weights(model)
        with staged_folder(folder, needed_bytes=sum(value.nbytes for value in weights.values())) as staging:
            base.save_pretrained(staging, state_dict=weights)

    @override
    def bring(self, versions: Collection[Published]) -> None:
        for version in versions:
            # A server that was started anew has its first weights, and the name of the model does not tell.
            holds = (describe_server(self._client).instance, version.name)
            if holds != self._held:
                self._reload(str(version.folder))
                self._held = holds

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
        # An adapter of the next run would come to lie over the last weights of this one.
        if self._held is not None:
            self._reload(self._description.model)
            self._held = None


@torch.no_grad()
def merged_weights(policy: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """Return the weights of a plain model that computes what the policy does, by the names of its checkpoint.

    The policy is not changed: merging and taking apart again would leave its weights rounded.

    Raises:
        ConfigError: The base is quantised, so that merged weights would be another model's.
    """
    base = base_of(policy)
    if (kind := describe(policy).quantization) is not None:
        raise ConfigError(
            f"The base is quantised ({kind}), and weights merged into it would be another model's: train plain LoRA, "
            "which is served as an adapter over a server with the same quantisation."
        )
    weights: dict[str, Tensor] = {}
    replaced: dict[str, nn.Module] = {}
    for place, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            replaced[place] = _merged(place, module)
        elif isinstance(module, ModulesToSaveWrapper):
            replaced[place] = module.modules_to_save[module.active_adapter]  # pyright: ignore
    for key, value in base.state_dict().items():
        if not any(key.startswith(f"{place}.") for place in replaced):
            weights[key] = value
    for place, module in replaced.items():
        weights |= {f"{place}.{key}": value for key, value in module.state_dict().items()}
    return {key: value.detach().cpu().contiguous() for key, value in weights.items()}


def _merged(place: str, layer: BaseTunerLayer) -> nn.Module:
    if not isinstance(layer, LoraLayer) or not isinstance(layer, nn.Module):
        raise ConfigError(f"{place} is a {type(layer).__name__}, and only LoRA and its variants are merged.")
    one = copy.deepcopy(layer)  # one layer at a time is held twice
    try:
        one.merge()  # pyright: ignore[reportCallIssue]
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ConfigError(f"{place} cannot be merged ({error}): train plain LoRA to sample from a server.") from error
    return one.get_base_layer()

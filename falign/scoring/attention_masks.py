"""What a model takes as the mask of a batch of trees: one per layer type, in its attention's form."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from falign.scoring.backbone import without_wrapper
from falign.scoring.batch import TokenBatch
from falign.scoring.tree_attention import TreeMask

__all__ = ["tree_masks", "why_not_trees"]

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def why_not_trees(model: nn.Module) -> str | None:
    """Say why a model cannot read trees, as far as its configuration tells.

    Args:
        model: A causal language model in the Transformers layout, with or without adapters.

    Returns:
        The reason, or None where nothing speaks against it.
    """
    config = _config(model)
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"its attention is {attention!r}, and trees need 'sdpa' or 'eager'"
    if others := sorted(set(_layer_types(config)) - _LAYER_TYPES):
        return f"it has layers of the type {others[0]!r}, which see beyond a tree's paths"
    if any(_attention_dropout(module) for module in model.modules()):
        return "its attention has dropout, which would differ between copies of a prompt"
    return None


def tree_masks(model: nn.Module, batch: TokenBatch) -> Tensor | dict[str, Tensor]:
    """Return what the model's forward pass takes as `attention_mask` for a batch in the tree layout.

    Args:
        model: The model that will read the batch.
        batch: The trees, on the model's device.

    Returns:
        A mask, or one for each layer type where the model has several.
    """
    config = _config(model)

    def mask(window: int | None) -> Tensor:
        rows, columns = batch.input_ids.shape
        tree_mask = TreeMask.of(batch.spans, shape=(rows, columns), device=batch.input_ids.device, window=window)
        if config._attn_implementation == "sdpa":
            return tree_mask
        return tree_mask.additive(next(p.dtype for p in model.parameters() if p.is_floating_point()))

    window = getattr(config, "sliding_window", None)
    types = set(_layer_types(config))
    if not types:
        return mask(window)
    windows = {"full_attention": None, "sliding_attention": window}
    if len(types) == 1:
        return mask(windows[types.pop()])
    return {name: mask(windows[name]) for name in sorted(types)}


def _config(model: nn.Module) -> Any:
    config = without_wrapper(model).config
    return getattr(config, "get_text_config", lambda: config)()


def _layer_types(config: Any) -> list[str]:
    return getattr(config, "layer_types", None) or []


def _attention_dropout(module: nn.Module) -> bool:
    names = ("attention_dropout", "attn_dropout")
    values = [value for name, value in vars(module).items() if name.endswith(names)]
    values += [
        inner.p for name, inner in module.named_children() if name.endswith(names) and isinstance(inner, nn.Dropout)
    ]
    return any(isinstance(value, float) and value > 0 for value in values)

"""Loading what a run has trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from falign.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from falign.training import RunConfig, RunFolder

__all__ = ["Trained", "is_run", "load_trained"]


class Trained(NamedTuple):
    """A finished run in memory."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    config: RunConfig


def is_run(path: str) -> bool:
    """Return whether a path is that of a run folder, and not a model's."""
    return (Path(path) / "manifest.json").is_file()


def load_trained(folder: RunFolder) -> Trained:
    """Load the model of a run as it was trained.

    Raises:
        ConfigError: The run is not finished.
        ModelError: The base model is not the one that was trained.
    """
    from falign.models import load_adapter, load_model, load_tokenizer, weights_hash
    from falign.training import parse_run

    config = parse_run(folder.read_run_file(), place=str(folder.run_file))
    source = folder.weights if config.adapter is None else folder.adapter
    if not source.is_dir():
        raise ConfigError(f"{folder.path} has no trained model yet: finish it by `falign train ... --resume`.")
    if config.adapter is None:
        model = load_model(
            source,
            attn_implementation=config.model.attn_implementation,
            trust_remote_code=config.model.trust_remote_code,
        )
        return Trained(model, load_tokenizer(source), config)
    base = config.model.build()
    if weights_hash(base) != folder.read_json("manifest.json")["base_weights"]:
        raise ModelError(
            f"{config.model.path} holds other weights now than when {folder.path} was trained: restore them (or set "
            f"model.revision in {folder.run_file}), because the adapter is for those."
        )
    return Trained(load_adapter(base, source, trainable=False), config.model.build_tokenizer(), config)

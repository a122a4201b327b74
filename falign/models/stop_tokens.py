"""The token ids that end a completion."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from falign.models.sources import resolve

__all__ = ["stop_token_ids"]


def stop_token_ids(
    source: PreTrainedModel | GenerationConfig | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    revision: str | None = None,
) -> frozenset[int]:
    """Return every id that ends a completion: the generation config's (one or several) and the tokenizer's EOS.

    Args:
        source: a model, its generation config, or a model name, whose ``generation_config.json`` is then read
            without loading any weights.
        tokenizer: the model's tokenizer.
        revision: branch, tag or commit on the hub, where ``source`` is a name.
    """
    if isinstance(source, str | Path):
        config = _generation_config(resolve(source), revision)
    else:
        config = source.generation_config if isinstance(source, PreTrainedModel) else source
    ids = None if config is None else config.eos_token_id
    stops = [ids] if isinstance(ids, int) else list(ids or ())
    return frozenset(id_ for id_ in (*stops, tokenizer.eos_token_id) if isinstance(id_, int))


def _generation_config(name: str, revision: str | None) -> GenerationConfig | None:
    folder = Path(name)
    if folder.is_dir() and not (folder / "generation_config.json").is_file():
        return None  # older checkpoints have none; the tokenizer's EOS is then the only stop token
    try:
        return GenerationConfig.from_pretrained(name, revision=revision or "main")
    except OSError:  # the tokenizer came from there, so the model is there: it has no such file
        return None

"""The held-out prompts of a run, as prompts that can be answered."""

from __future__ import annotations

from falign.data import PromptRow, read_examples
from falign.data.bad_rows import BadRows
from falign.errors import ConfigError
from falign.training.config import DataConfig, RunConfig
from falign.training.parts import Language

__all__ = ["held_out_prompts"]


def held_out_prompts(config: RunConfig, language: Language) -> list[PromptRow]:
    """Return the prompts that a run has not learnt from; of an offline run each once, whatever completions it has.

    Args:
        config: The run.
        language: Its tokenizer.

    Raises:
        ConfigError: It has held none out.
        DataError: Its data are not there any more.
    """
    if config.prompts is not None:
        found = config.prompts.build(language.tokenizer, seed=config.seed).eval
    else:
        assert config.data is not None
        found = _of_preferences(config.data, language, config.seed)
    if not found:
        raise ConfigError(f"{config.output_dir} has held out no prompts: give --prompts FILE.")
    return found


def _of_preferences(data: DataConfig, language: Language, seed: int) -> list[PromptRow]:
    loaded = data.build(language.tokenizer, stop_token_ids=language.stop_tokens, seed=seed).eval
    texts = {}
    for source in data.eval or data.train:
        for example in read_examples(source.build(), bad_rows=BadRows("skip")):
            texts[example.place] = example.prompt
    rows = {tree.prompt_ids: PromptRow(texts[tree.place], tree.prompt_ids, {}, tree.place) for tree in reversed(loaded)}
    return list(reversed(rows.values()))

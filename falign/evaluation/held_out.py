"""The held-out prompts of a run, as prompts that can be answered."""

from __future__ import annotations

from collections.abc import Callable

from falign.data import PromptRow, read_examples
from falign.data.reports import BadRows
from falign.errors import ConfigError
from falign.runfile.config import DataConfig, RunConfig
from falign.runs.folder import RunFolder
from falign.runs.inputs import prompt_digest
from falign.training.parts import Language, load_language

__all__ = ["held_out_prompts"]


def held_out_prompts(folder: RunFolder, config: RunConfig, *, tell: Callable[[str], None]) -> list[PromptRow]:
    """Return the prompts that a run has held out and not trained on; of an offline run each once.

    What it held out is what its folder records: its data may have changed since, and would be split otherwise.

    Args:
        folder: The run.
        config: Its run file.
        tell: Called with a message if held-out prompts were also trained on.

    Raises:
        ConfigError: It has held none out, has no record of its rows, or its data lack some of them now.
        DataError: Its data are not there any more.
    """
    section, recorded = "data.eval" if config.prompts is None else "prompts.eval", folder.read_rows()
    held_out = {prompt for prompt, _ in recorded.rows.get(section, ())}
    wanted = held_out - recorded.trained_prompts
    if not wanted:
        reason = f"trained on all {len(held_out)} prompts that it held out" if held_out else "has held out no prompts"
        raise ConfigError(f"{folder.path} {reason}: give prompts=FILE.")
    if len(wanted) < len(held_out):
        tell(f"{len(held_out) - len(wanted)} of {len(held_out)} held-out prompts were trained on too: left out")
    language = load_language(config, date=folder.read_date())
    if config.prompts is None:
        assert config.data is not None
        loaded = _of_preferences(config, config.data, language)
    else:
        data = config.prompts.build(language.tokenizer, seed=config.seed)
        loaded = [*data.eval, *data.train]
    found = [(prompt_digest(row.prompt_ids), row) for row in loaded]
    if missing := len(wanted - {digest for digest, _ in found}):
        raise ConfigError(
            f"{folder.path}: {missing} of the {len(wanted)} prompts that it held out are not in its data any more: "
            "restore the files, or give prompts=FILE."
        )
    return [row for digest, row in found if digest in wanted]


def _of_preferences(config: RunConfig, data: DataConfig, language: Language) -> list[PromptRow]:
    preferences = "preference" in config.check().needs
    loaded = data.build(
        language.tokenizer, stop_token_ids=language.stop_tokens, seed=config.seed, preferences=preferences
    )
    texts = {}
    for source in (*data.train, *data.eval):
        for example in read_examples(source.build(), bad_rows=BadRows("skip")):
            texts[example.place] = example.prompt
    rows = {tree.prompt_ids: tree for tree in reversed([*loaded.eval, *loaded.train])}
    return [PromptRow(texts[tree.place], ids, {}, tree.place) for ids, tree in reversed(rows.items())]

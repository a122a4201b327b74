"""Files of samples, ``falign.write_samples``: several completions of each prompt, with rewards if they are wanted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter
from rich.console import Console
from rich.markup import escape

from falign.choices import require_choice
from falign.data import BadRowPolicy, PromptRow, load_prompts
from falign.data.samples import REWARD, Sample, sample_row
from falign.durable import claimed, refuse_link, write_whole
from falign.errors import ConfigError
from falign.evaluation.answering import load_named
from falign.evaluation.presampling_run import prompt_source, room_of_prompts, sampler_identity
from falign.evaluation.sample_inputs import check_tokens, given_rewards, prompts_digest
from falign.models import base_of, stop_token_ids
from falign.models.tokenizers import pad_token_id
from falign.rewards.combination import Rewards, row_check
from falign.rollouts import SampledCompletion, SamplingParams, TransformersEngine
from falign.rollouts.answers import require_random
from falign.rollouts.journal import Journal
from falign.runs.loading import Named, chat_of_run, chosen_chat, named
from falign.seeds import mixed
from falign.terminal import Terminal, progress
from falign.training.online.groups import judged

__all__ = ["SamplingSummary", "check_rows_file", "write_samples"]

PROMPTS_PER_CALL = 32


class SamplingSummary(BaseModel):
    """Counts of a file of samples."""

    model_config = ConfigDict(frozen=True)

    prompts: int
    completions: int
    truncated: int
    """Completions that hit `max_new_tokens`, and have no end."""
    empty: int
    """Completions without text."""
    distinct: int
    """Different completions, counted within each prompt."""
    mean_reward: float | None = None
    """Mean over completions; None without rewards."""
    timeouts: int = 0
    errors: int = 0
    too_long: int = 0
    """Prompts that were left out because they leave no room for a completion."""
    bad_rows: int = 0
    """Rows that could not be used."""
    messages: tuple[str, ...] = ()
    """The first messages about bad rows."""
    resumed: int = 0
    """Prompts that an earlier call had sampled, whose timeouts and errors are not counted here."""


def write_samples(
    model: Named,
    prompts: Any,
    out: str | Path,
    *,
    num_completions: int = 1,
    rewards: Any = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    template: str | None = None,
    chat: bool | None = None,
    bad_rows: str = "error",
    dtype: str = "auto",
    overwrite: bool = False,
    trust_code: bool = False,
    console: Console | None = None,
) -> SamplingSummary:
    """Write several completions of each prompt to a file, one per line; a stopped call continues if repeated.

    A line has ``prompt`` as the model read it (text or turns), ``completion``, its number ``sample``,
    ``finish_reason``, with rewards ``reward`` (of several also ``reward/NAME``), and the other ``columns`` of the
    prompt's row. ``falign.pairs`` makes preference data of such files, ``falign.score`` scores them, and a calibrated
    reward reads them.

    Args:
        model: A run, or any model.
        prompts: Rows in memory, a file, a folder, or a dataset on the Hub.
        out: The file, ``.jsonl``.
        num_completions: Completions per prompt; several need a temperature above 0.
        rewards: Rewards of the completions: functions or sections, as for ``falign.train``, a YAML file with a list of
            them, or a run. ``reward`` is their weighted sum.
        max_new_tokens: Maximum tokens of a completion.
        temperature: 0 decodes greedily; 1 samples from the model itself.
        seed: Seed of the sampling. The completions of a prompt depend on it and on the prompt alone, and on how often
            the same prompt came before.
        template: The prompt, with columns of the row in braces: ``"{question}"``.
        chat: Whether a plain prompt is a user's turn. By default as in the run; for a model, whether it has a chat
            template.
        bad_rows: ``error`` stops at a row that cannot be used; ``skip`` counts it and continues.
        dtype: Data type of a model; a run has its own.
        overwrite: Replace an existing file once the new one is complete; samples of a stopped call are used if they
            have the same inputs, and dropped otherwise.
        trust_code: Whether code that the run folder names may run.
        console: Where progress is shown; by default standard error.

    Raises:
        ConfigError: An argument is invalid, the file exists, or a stopped call had other arguments.
        DataError: A row cannot be used, or no row can.
        ModelError: The model is missing or damaged.
        RewardError: A reward failed.
    """
    console = console or Terminal(stderr=True, highlight=False, soft_wrap=True)
    out = Path(out)
    policy_of_bad_rows: Any = bad_rows
    require_choice("bad_rows", bad_rows, BadRowPolicy)
    require_random(num_completions, temperature)
    check_rows_file(out, overwrite=overwrite)
    source = prompt_source(prompts, template)
    loaded = None if rewards is None else given_rewards(rewards, trust_code=trust_code)
    name = named(model)[0]
    with console.status(f"loading {escape(name)}"):
        policy, tokenizer = load_named(model, dtype=dtype, trust_code=trust_code)
    if loaded is not None:
        check_tokens(name, tokenizer, loaded)
        loaded.rewards.require_group(num_completions, field="num_completions")
    engine = TransformersEngine(policy, pad_token_id=pad_token_id(tokenizer))
    engine.publish(policy, version=0)
    data = load_prompts(
        [replace(source, chat=chosen_chat(chat_of_run(name) if chat is None else chat, tokenizer, console))],
        tokenizer,
        max_length=room_of_prompts(engine.capabilities().max_length, max_new_tokens, model=name),
        long_prompt="drop",
        bad_rows=policy_of_bad_rows,
        check=None if loaded is None else row_check(loaded.rewards.without_transforms()),
    )
    params = SamplingParams(max_new_tokens, temperature, stop_token_ids=stop_token_ids(base_of(policy), tokenizer))
    record = {
        **sampler_identity(policy, tokenizer),
        "stop_token_ids": sorted(params.stop_token_ids),
        "prompts": prompts_digest(data.train),
        "rewards": None if loaded is None else loaded.record,
        "num_completions": num_completions,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    timeouts = errors = 0
    with claimed(out.with_name(f".{out.name}.lock")):
        journal = Journal(
            out.with_name(f".{out.name}.partial.jsonl"),
            TypeAdapter(dict[str, Any]).validate_python,
            record=record,
            chunk_size=PROMPTS_PER_CALL * num_completions,
            total=len(data.train) * num_completions,
            work="sampling",
            overwrite=overwrite,
        )
        resumed = len(journal.entries) // num_completions
        with progress(console, "prompts", total=len(data.train), done=resumed) as show:
            for rows, seeds in islice(_calls(data.train, seed), -(-resumed // PROMPTS_PER_CALL), None):
                rollouts = engine.sample(
                    [row.prompt_ids for row in rows], num_completions, params, version=0, seed=seeds
                )
                owners = [row for row in rows for _ in range(num_completions)]
                found = None
                if loaded is None:
                    texts = [_text(rollout, tokenizer) for rollout in rollouts]
                else:
                    texts, found = judged(loaded.rewards.without_transforms(), owners, rollouts, tokenizer)
                    timeouts, errors = timeouts + found.timeouts, errors + found.errors
                journal.extend(_rows(owners, rollouts, texts, found, num_completions))
                show(len(journal.entries) // num_completions)
        write_whole(out, (json.dumps(row, ensure_ascii=False) + "\n" for row in journal.entries))
        journal.path.unlink()  # last: until then the same call continues
    return _summary(journal.entries, len(data.train)).model_copy(
        update={
            "timeouts": timeouts,
            "errors": errors,
            "too_long": data.report.dropped,
            "bad_rows": data.report.bad,
            "messages": data.report.messages,
            "resumed": resumed,
        }
    )


def check_rows_file(out: Path, *, overwrite: bool) -> None:
    """Refuse a file of rows that cannot be written, before anything is computed.

    Raises:
        ConfigError: Its suffix is not ``.jsonl``, it exists, is a link, or its folder is missing.
    """
    if out.suffix != ".jsonl":
        raise ConfigError(f"out={out}: the suffix {out.suffix!r} is unknown; name a file .jsonl.")
    if out.is_dir():
        raise ConfigError(f"out={out} is a folder: name a file.")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists: name another file, or give overwrite=True to replace it.")
    if not out.parent.is_dir():
        raise ConfigError(f"out={out}: the folder {out.parent} does not exist; create it.")
    refuse_link(out)


def _calls(prompts: Sequence[PromptRow], seed: int) -> Iterator[tuple[list[PromptRow], list[int]]]:
    """Yield the prompts of each call of the engine, with a seed for each that depends on no other prompt."""
    seen: dict[tuple[int, ...], int] = {}
    for start in range(0, len(prompts), PROMPTS_PER_CALL):
        rows, seeds = list(prompts[start : start + PROMPTS_PER_CALL]), []
        for row in rows:
            seeds.append(mixed(seed, seen.get(row.prompt_ids, 0), *row.prompt_ids))
            seen[row.prompt_ids] = seen.get(row.prompt_ids, 0) + 1
        yield rows, seeds


def _text(rollout: SampledCompletion, tokenizer: Any) -> str:
    return str(tokenizer.decode(list(rollout.completion_ids), skip_special_tokens=True))


def _rows(
    owners: Sequence[PromptRow],
    rollouts: Sequence[SampledCompletion],
    texts: Sequence[str],
    rewards: Rewards | None,
    num_completions: int,
) -> list[dict[str, Any]]:
    """Return the lines of completions, as plain values."""
    rows = []
    for i, (row, rollout, text) in enumerate(zip(owners, rollouts, texts, strict=True)):
        sample = Sample(
            prompt=row.prompt,
            completion=text,
            place=row.place,
            reward=None if rewards is None else rewards.total[i],
            truncated=rollout.finish_reason == "length",
            columns=row.columns,
        )
        several = {} if rewards is None or len(rewards.parts) < 2 else rewards.parts
        parts = {f"{REWARD}/{name}": values[i] for name, values in several.items()}
        # Values of columns that JSON does not have, such as dates, are written as text.
        rows.append(json.loads(json.dumps(sample_row(sample, i % num_completions, **parts), default=str)))
    return rows


def _summary(rows: Sequence[dict[str, Any]], num_prompts: int) -> SamplingSummary:
    rewards = [row[REWARD] for row in rows if REWARD in row]
    per_prompt = len(rows) // num_prompts
    return SamplingSummary(
        prompts=num_prompts,
        completions=len(rows),
        truncated=sum(row["finish_reason"] == "length" for row in rows),
        empty=sum(not row["completion"].strip() for row in rows),
        distinct=len({(i // per_prompt, row["completion"]) for i, row in enumerate(rows)}),
        mean_reward=sum(rewards) / len(rewards) if rewards else None,
    )

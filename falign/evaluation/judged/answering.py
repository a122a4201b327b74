"""Answers of a model to the questions of a judged benchmark, turn after turn, with a journal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.markup import escape

from falign.data.tokenization import encode_prompt
from falign.errors import ConfigError
from falign.evaluation.answering import load_named
from falign.evaluation.judged.benchmarks import Answers, JudgedBenchmark, JudgedItem, digest
from falign.evaluation.judged.options import JudgeOptions
from falign.evaluation.loading import positions_of
from falign.evaluation.presampling_run import sampler_identity
from falign.models import base_of, stop_token_ids
from falign.models.tokenizers import pad_token_id
from falign.rollouts import Engine, EngineSetup, SamplingParams
from falign.rollouts.journal import Journal
from falign.runfile.engine_config import TransformersEngineConfig
from falign.runfile.reading import parse_engine, read_section
from falign.seeds import mixed
from falign.terminal import progress

__all__ = ["generated_answers"]

QUESTIONS_PER_CALL = 16
VERSION = 0
_MOST_BATCH_TOKENS = 16_384
_TURNS = TypeAdapter(list[str])


def generated_answers(
    options: JudgeOptions, benchmark: JudgedBenchmark, questions: Sequence[JudgedItem], console: Console
) -> tuple[Answers, dict[str, Any]]:
    """Return a model's answers, and the record of what they depend on; a stopped call continues if repeated.

    Args:
        options: The model, its engine and the sampling.
        benchmark: Has the temperature of each question.
        questions: The questions.
        console: Shows progress.

    Raises:
        ConfigError: A question of several turns meets a model without a chat template, or a stopped call had other
            inputs.
        FalignError: The model or the engine cannot be used.
    """
    section = TransformersEngineConfig() if options.engine is None else _engine_section(options.engine)
    with console.status(f"loading {escape(options.model)}"):
        policy, tokenizer = load_named(options.named, dtype=options.dtype, trust_code=options.trust_code)
    if tokenizer.chat_template is None and any(len(question.turns) > 1 for question in questions):
        raise ConfigError(
            f"{options.model} has no chat template, and {questions[0].place} has several turns: give a chat model."
        )
    params = SamplingParams(options.max_new_tokens, stop_token_ids=stop_token_ids(base_of(policy), tokenizer))
    prompts = {each.id: _prompt_ids(each, (), tokenizer) for each in questions}
    longest = sorted(prompts.values(), key=len)[-2:]
    positions = positions_of(policy)
    needed = len(longest[-1]) + options.max_new_tokens
    if positions is not None and needed > positions:
        raise ConfigError(
            f"max_new_tokens={options.max_new_tokens}: with the longest question, of {len(longest[-1])} tokens, that "
            f"is more than the {positions} positions of {options.model}: lower it."
        )
    record = {
        **sampler_identity(policy, tokenizer),
        "questions": digest([[each.id, each.turns] for each in questions]),
        "engine": section.model_dump(mode="json"),
        "temperature": "the benchmark's" if options.temperature is None else options.temperature,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
    }
    journal = Journal(
        options.out / ".answers.partial.jsonl",
        _TURNS.validate_python,
        record=record,
        chunk_size=QUESTIONS_PER_CALL,
        total=len(questions),
        work="answering",
        overwrite=options.overwrite,
    )
    done = len(journal.entries)
    if done < len(questions):
        setup = EngineSetup(
            policy,
            pad_token_id=pad_token_id(tokenizer),
            max_batch_tokens=_MOST_BATCH_TOKENS,
            encode=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            prompt_ids=longest,
            params=params,
            longest=needed,
        )
        engine = section.open(setup, console)
        try:
            engine.publish(policy, VERSION)
            with progress(console, "questions answered", total=len(questions), done=done) as show:
                for start in range(done, len(questions), QUESTIONS_PER_CALL):
                    chunk = questions[start : start + QUESTIONS_PER_CALL]
                    journal.extend(_answered(chunk, options, benchmark, engine, params, tokenizer))
                    show(len(journal.entries))
        finally:
            engine.close()
    turns = {question.id: tuple(found) for question, found in zip(questions, journal.entries, strict=True)}
    return Answers(options.label, turns), record


def _engine_section(engine: Any) -> Any:
    if isinstance(engine, str | Path):
        return parse_engine(read_section(engine, what="file of an engine"), place=str(engine))
    return parse_engine(engine, place="engine")


def _temperature(options: JudgeOptions, benchmark: JudgedBenchmark, question: JudgedItem) -> float:
    return benchmark.temperature(question) if options.temperature is None else options.temperature


def _prompt_ids(question: JudgedItem, answers: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    """Return the token ids of the next turn, behind those that have been answered."""
    if tokenizer.chat_template is None:
        return encode_prompt(question.turns[0], tokenizer, question.place)
    turns = [{"role": "user", "content": question.turns[0]}]
    for text, answer in zip(question.turns[1:], answers, strict=False):
        turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": text}]
    return encode_prompt(turns, tokenizer, question.place)


def _answered(
    questions: Sequence[JudgedItem],
    options: JudgeOptions,
    benchmark: JudgedBenchmark,
    engine: Engine,
    params: SamplingParams,
    tokenizer: Any,
) -> list[list[str]]:
    """Return the answers to each turn of some questions; those of a question depend on the seed and on it alone."""
    found: dict[str, list[str]] = {question.id: [] for question in questions}
    for turn in range(max(len(question.turns) for question in questions)):
        open_ones = [question for question in questions if turn < len(question.turns)]
        for temperature, group in _by_temperature(open_ones, options, benchmark):
            prompts = [_prompt_ids(question, found[question.id], tokenizer) for question in group]
            seeds = [mixed(options.seed, "answer", turn, *ids) for ids in prompts]
            rollouts = engine.sample(prompts, 1, replace(params, temperature=temperature), version=VERSION, seed=seeds)
            for question, rollout in zip(group, rollouts, strict=True):
                text = tokenizer.decode(list(rollout.completion_ids), skip_special_tokens=True)
                found[question.id].append(str(text).strip())
    return [found[question.id] for question in questions]


def _by_temperature(
    questions: Sequence[JudgedItem], options: JudgeOptions, benchmark: JudgedBenchmark
) -> Iterator[tuple[float, list[JudgedItem]]]:
    groups: dict[float, list[JudgedItem]] = {}
    for question in questions:
        groups.setdefault(_temperature(options, benchmark, question), []).append(question)
    yield from groups.items()

"""``falign.evaluate_judge``: a model's answers to a benchmark, judged by an LLM and summarized."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from falign.durable import checksum, claimed, write_whole
from falign.errors import ConfigError, JudgeError
from falign.evaluation.judged.benchmarks import BENCHMARKS, Answers, JudgedBenchmark, JudgedItem, digest
from falign.evaluation.judged.judging import JudgedRow, JudgedTask, judged_metrics, judged_rows
from falign.evaluation.judged.options import JUDGMENTS_FILE, JudgeOptions, judged_folder
from falign.evaluation.summaries import JudgeSummary, write_summary
from falign.judges import RATE, Endpoint, Judge, ScoreForm, read_endpoint, read_template
from falign.runs.loading import Named, named
from falign.terminal import Terminal

__all__ = ["evaluate_judge"]

CACHE = "judge-cache.sqlite"


def evaluate_judge(
    model: Named,
    benchmark: str,
    questions: str | Path,
    *,
    judge: Endpoint | Mapping[str, Any] | str | Path,
    mode: str | None = None,
    baseline: str | Path | None = None,
    references: str | Path | None = None,
    template: str | Path | None = None,
    engine: Any = None,
    max_new_tokens: int = 1024,
    temperature: float | None = None,
    seed: int = 0,
    limit: int | None = None,
    label: str | None = None,
    dtype: str = "auto",
    name: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    trust_code: bool = False,
    console: Console | None = None,
) -> JudgeSummary:
    """Let a model answer a benchmark's questions, and an LLM judge its answers; a stopped call continues if repeated.

    Pairs are judged in both orders. Verdicts that are missing after the endpoint's ``reasks`` are counted and left out.
    Neither length nor style is controlled for; the mean lengths stand beside the results.

    Args:
        model: A run or any model, which answers; or a file of answers in the benchmark's format (``.jsonl``, ``.json``,
            also ``.gz``).
        benchmark: ``mt_bench``, ``arena_hard``, ``alpaca_eval``, or ``module:Class`` of your own, a subclass of
            :class:`falign.evaluation.judged.JudgedBenchmark`.
        questions: The benchmark's file of questions.
        judge: The endpoint, or a YAML file with its fields. Without a ``cache``, answers are kept in `out`.
        mode: ``single`` scores each answer from 1 to 10; ``pairwise`` compares it with the baseline's. By default the
            first that the benchmark has.
        baseline: A file of answers to compare with; by default the reference outputs in an AlpacaEval file.
        references: A file of reference answers, shown to the judge; by default those of the questions.
        template: A YAML file with the judge's messages (``system``, ``user``) in place of the built-in ones.
        engine: The section ``rollout.engine`` of a run file, or a YAML file with it: where answers are sampled. By
            default in this process.
        max_new_tokens: Maximum length of an answer.
        temperature: By default the benchmark's own: for MT-Bench by category, else 0.
        seed: Seed of the answers and the intervals.
        limit: Maximum number of questions; the first ones are used.
        label: Name of the model in its file of answers; by default that of its folder.
        dtype: Data type of a model; a run has its own.
        name: Results go to ``RUN/evaluation/NAME``; by default the benchmark's name and the mode.
        out: A folder for the results, required for a model.
        overwrite: Replace existing results. Answers of the judge that are in its cache are used.
        trust_code: Whether code that the run folder names may run.
        console: Shows progress; standard error by default.

    Raises:
        ConfigError: The arguments contradict each other, results exist, or a stopped call had other inputs.
        DataError: A file is missing or has another format, or lacks an answer.
        JudgeError: The judge cannot be asked, or its budget is spent; what was judged so far is kept for the next call.
    """
    console = console or Terminal(stderr=True, highlight=False, soft_wrap=True)
    made = BENCHMARKS.get(benchmark, field="benchmark")()
    path = named(model)[0]
    chosen = mode or made.modes[0]
    options = JudgeOptions(
        named=model,
        model=path,
        benchmark=made,
        questions=questions,
        judge=read_endpoint(judge),
        mode=chosen,
        baseline=baseline,
        references=references,
        template=template,
        engine=engine,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        limit=limit,
        label=label or Path(path).resolve().name,
        dtype=dtype,
        out=judged_folder(path, made.name, mode=chosen, name=name, out=out),
        overwrite=overwrite,
        trust_code=trust_code,
    )
    options.check()
    if options.given_answers and (label is not None or dtype != "auto"):
        raise ConfigError(f"`label` and `dtype` have no effect on {path}, which holds answers: leave them out.")
    return _evaluate(options, console)


def _evaluate(options: JudgeOptions, console: Console) -> JudgeSummary:
    benchmark = options.benchmark
    questions = benchmark.read_questions(options.questions, limit=options.limit)
    baseline, references = _baseline(options, questions), _references(options)
    asked = _judge(options)
    with console.status("asking the judge's endpoint"):
        served = asked.served()
    options.out.mkdir(parents=True, exist_ok=True)
    with claimed(options.out / ".judge.lock"):
        answers, sampling = _answers(options, questions, console)
        answers.require_all(questions, options.model)
        file = options.out / benchmark.answers_file
        rows = [benchmark.answer_row(each, answers.turns[each.id], model=answers.model) for each in questions]
        write_whole(file, benchmark.file_text(rows))
        record = {
            "benchmark": benchmark.name,
            "mode": options.mode,
            "questions": digest([[each.id, each.turns, each.category] for each in questions]),
            "references": digest([references.get(each.id, each.references) for each in questions]),
            "answers": answers.digest(questions),
            "baseline": None if baseline is None else baseline.digest(questions),
            **{f"judge.{key}": value for key, value in asked.identity().items() if key not in ("template", "form")},
            "judge.template": digest(asked.template.identity()),
            "judge.form": digest(asked.form.schema()),
            "judge.served": served.get("root"),
        }
        judged = judged_rows(
            JudgedTask(benchmark, questions, answers, baseline, references),
            asked,
            options.out / ".judgments.partial.jsonl",
            record=record,
            overwrite=options.overwrite,
            console=console,
        )
        lines = [json.dumps({**row._asdict(), "model": answers.model}, ensure_ascii=False) + "\n" for row in judged]
        write_whole(options.out / JUDGMENTS_FILE, lines)
        summary = _summary(options, questions, answers, baseline, judged, asked, {**record, "sampling": sampling})
        write_summary(options.out, summary)
        # Last, so that a call that stops before this line can be repeated.
        for name in (".answers.partial.jsonl", ".judgments.partial.jsonl"):
            (options.out / name).unlink(missing_ok=True)
    return summary


def _answers(
    options: JudgeOptions, questions: Sequence[JudgedItem], console: Console
) -> tuple[Answers, dict[str, Any] | None]:
    if options.given_answers:
        return options.benchmark.read_answers(options.model), None
    from falign.evaluation.judged.answering import generated_answers

    return generated_answers(options, options.benchmark, questions, console)


def _baseline(options: JudgeOptions, questions: Sequence[JudgedItem]) -> Answers | None:
    if options.mode == "single":
        return None
    if options.baseline is not None:
        found, place = options.benchmark.read_answers(options.baseline), str(options.baseline)
    else:
        found, place = options.benchmark.own_baseline(questions), str(options.questions)
    if found is None:
        raise ConfigError(f"mode={options.mode!r} compares with a baseline: give `baseline`, a file of its answers.")
    found.require_all(questions, place)
    return found


def _references(options: JudgeOptions) -> Mapping[str, tuple[str, ...]]:
    return {} if options.references is None else options.benchmark.read_answers(options.references).turns


def _judge(options: JudgeOptions) -> Judge:
    benchmark: JudgedBenchmark = options.benchmark
    pairwise = options.mode == "pairwise"
    template = benchmark.pair_template if pairwise else RATE
    if options.template is not None:
        template = read_template(options.template)
    shown = ("first", "second") if pairwise else ("completion",)
    template.check({"prompt", "reference", "form", *shown}, required=shown)
    endpoint = options.judge
    if endpoint.cache is None:
        endpoint = endpoint.model_copy(update={"cache": options.out / CACHE})
    return Judge(endpoint, template, benchmark.form if pairwise else ScoreForm(1, 10))


def _summary(
    options: JudgeOptions,
    questions: Sequence[JudgedItem],
    answers: Answers,
    baseline: Answers | None,
    rows: Sequence[JudgedRow],
    judge: Judge,
    record: dict[str, Any],
) -> JudgeSummary:
    failed = [row for row in rows if row.value is None]
    if len(failed) == len(rows):
        raise JudgeError(
            f"the judge {options.judge.model!r} gave no verdict on any of {len(rows)} answers. The first reason: "
            f"{failed[0].problem}"
        )
    metrics = judged_metrics(rows, options.benchmark, pairwise=baseline is not None, seed=options.seed)
    spent, usage = judge.spent, judge.usage
    return JudgeSummary.model_validate(
        {
            "kind": "judge",
            "name": options.out.name,
            "benchmark": options.benchmark.name,
            "mode": options.mode,
            "model": options.model,
            "label": answers.model,
            "baseline": None if baseline is None else baseline.model,
            "judge": rows[0].judge or options.judge.model,
            "num_questions": len(questions),
            "num_judgments": len(rows),
            "failures": len(failed),
            "categories": dict(Counter(question.category for question in questions if question.category)),
            "metrics": metrics,
            "usage": {
                "requests": usage.requests,
                "cached": usage.cached,
                "prompt_tokens": spent.prompt_tokens,
                "completion_tokens": spent.completion_tokens,
                "cost": spent.cost,
            },
            "record": record,
            "files": {name: checksum(options.out / name) for name in (options.benchmark.answers_file, JUDGMENTS_FILE)},
        }
    )

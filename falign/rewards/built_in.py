"""The built-in rewards, each described once: its function's signature and docstring also make its run-file section.

A new reward is a function here with its row in :data:`REWARDS`. For one that must be killable, a function in
:mod:`falign.rewards.verifiers` judges a completion in another process. It takes the settings that are named here, and
repeats neither their defaults nor their checks. Settings are not read from its own signature, because its module may
import libraries (sympy) that a run without this reward need not load, and because types would be lost to callers.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from falign import divergences
from falign.errors import ConfigError
from falign.judges.endpoint import Endpoint
from falign.registry import Registry, is_own_name
from falign.rewards.base import LoadsModel, ReadsFile, Reward
from falign.rewards.lexicon import Lexicon, Words, fit_lexicon, read_labeled, read_lexicon
from falign.rewards.own_function import OwnFunction
from falign.rewards.verifier import Verifier

if TYPE_CHECKING:
    from falign.rewards.classifier import ClassifierReward
    from falign.rewards.implicit import ImplicitReward
    from falign.rewards.judge import JudgeReward
    from falign.rewards.oracle import OracleReward

__all__ = [
    "REWARDS",
    "choice",
    "classifier",
    "implicit",
    "judge",
    "judge_oracle",
    "lexicon",
    "load_reward",
    "mathematics",
    "number",
    "oracle",
    "regex",
    "sections",
    "sentiment",
    "sql",
    "words",
]

Dtype = Literal["auto", "float32", "bfloat16", "float16", "fastest"]
Seconds = Annotated[float, Field(gt=0)]

SQL_SHARE = 0.8  # share of the deadline after which the database stops the query, so that its process survives


def _verifier(
    name: str,
    judge: str,
    timeout: float,
    failed: float | None,
    columns: Mapping[str, str],
    settings: Mapping[str, Any],
    templates: Mapping[str, str] | None = None,
) -> Verifier:
    """Return a verifier with a function of :mod:`falign.rewards.verifiers`; its arguments are those of the class."""
    function = f"falign.rewards.verifiers.{judge}"
    return Verifier(name, function, columns, templates or {}, settings, timeout=timeout, failed=failed)


def mathematics(
    *,
    answer: str = "answer",
    decimals: Annotated[int, Field(ge=0)] = 6,
    timeout: Seconds = 10.0,
    failed: float | None = 0.0,
) -> Verifier:
    """1 if the last answer equals the row's as an expression (by math-verify), else 0.

    Args:
        answer: The column with LaTeX, an expression, a number, or a text whose answer follows ``####``.
        decimals: Digits after the point to which numbers must agree.
        timeout: See :class:`Verifier`.
        failed: See :class:`Verifier`.
    """
    return _verifier("math", "mathematics:score", timeout, failed, {"answer": answer}, {"decimals": decimals})


def number(
    *,
    answer: str = "answer",
    tolerance: Annotated[float, Field(ge=0)] = 1e-6,
    timeout: Seconds = 10.0,
    failed: float | None = 0.0,
) -> Verifier:
    """1 if the last number is the row's, else 0.

    Args:
        answer: The column with a number, or a text whose last number it is, or the first after ``####``.
        tolerance: Largest difference as a share of the answer, or of 1 if that is 0.
        timeout: See :class:`Verifier`.
        failed: See :class:`Verifier`.
    """
    return _verifier("number", "numbers:score", timeout, failed, {"answer": answer}, {"tolerance": tolerance})


def choice(
    *,
    answer: str = "answer",
    letters: Annotated[str, Field(min_length=2)] = "ABCDE",
    options: str | None = None,
    timeout: Seconds = 10.0,
    failed: float | None = 0.0,
) -> Verifier:
    """1 if the completion's final choice of a letter is the row's, else 0.

    Args:
        answer: The column with the letter.
        letters: The letters to choose from.
        options: A column with the texts of the options; a completion may end with such a text in place of a letter.
        timeout: See :class:`Verifier`.
        failed: See :class:`Verifier`.
    """
    settings = {"letters": letters}
    if options is None:
        return _verifier("choice", "choice:score", timeout, failed, {"answer": answer}, settings)
    columns = {"answer": answer, "options": options}
    return _verifier("choice", "choice:score_with_options", timeout, failed, columns, settings)


def regex(
    pattern: str,
    *,
    whole: bool = False,
    answer: str | None = None,
    timeout: Seconds = 10.0,
    failed: float | None = 0.0,
) -> Verifier:
    """1 if a regular expression matches, else 0.

    Args:
        pattern: Python's syntax; flags go inside (``(?s)``).
        whole: Whether it must match the whole completion.
        answer: A column that its first group must equal, in its last match.
        timeout: See :class:`Verifier`.
        failed: See :class:`Verifier`.

    Raises:
        ConfigError: The pattern is invalid, or has no group for ``answer``.
    """
    try:
        groups = re.compile(pattern).groups
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"reward regex: the pattern {pattern!r:.80} is invalid: {error}.") from error
    if answer is not None and groups == 0:
        raise ConfigError(
            f"reward regex: the pattern {pattern!r:.80} has no group that could equal answer={answer!r}; put "
            "parentheses around what is to be compared."
        )
    settings = {"pattern": pattern, "whole": whole}
    if answer is None:
        return _verifier("regex", "patterns:matches", timeout, failed, {}, settings)
    return _verifier("regex", "patterns:matches_answer", timeout, failed, {"answer": answer}, settings)


def sections(
    tags: Annotated[Sequence[str], Field(min_length=1)], *, timeout: Seconds = 10.0, failed: float | None = 0.0
) -> Verifier:
    """1 if the completion is a sequence of sections ``<tag>…</tag>`` and nothing else, else 0.

    Args:
        tags: Their names, in order.
        timeout: See :class:`Verifier`.
        failed: See :class:`Verifier`.
    """
    return _verifier("sections", "patterns:sections", timeout, failed, {}, {"tags": list(tags)})


def sql(
    root: Path | str,
    *,
    database: str = "{db_id}.sqlite",
    answer: str = "query",
    max_rows: Annotated[int, Field(ge=1)] = 10_000,
    skip_empty: bool = False,
    timeout: Seconds = 10.0,
    failed: float | None = 0.0,
) -> Verifier:
    """1 if the query returns the same as the row's query, on a read-only SQLite file, else 0.

    Args:
        root: The folder of the databases; no file outside it is opened.
        database: The file in that folder, with columns of the row in braces.
        answer: The column with the row's query.
        max_rows: Most rows that it may return.
        skip_empty: Whether rows whose query returns nothing, as many wrong queries do, are left out.
        timeout: See :class:`Verifier`; it covers both queries.
        failed: See :class:`Verifier`.

    Raises:
        ConfigError: The folder does not exist.
    """
    root = Path(root)
    if not root.is_dir():
        raise ConfigError(f"reward sql: root={str(root)!r} is not a folder; give the one that holds the databases.")
    settings: dict[str, Any] = {
        "root": str(root.absolute()),
        "seconds": SQL_SHARE * timeout,
        "max_rows": max_rows,
        "skip_empty": skip_empty,
    }
    templates = {"database": database}
    return _verifier("sql", "sql:score", timeout, failed, {"answer": answer}, settings, templates)


def words(
    words: Sequence[str] = (), column: str | None = None, mode: Literal["all", "any", "none", "share"] = "all"
) -> Words:
    """Presence of whole words, ignoring case.

    Args:
        words: The words, if they are the same for all rows.
        column: The column with the words of each row: a list, or a text with white space between them.
        mode: ``all``, ``any`` or ``none`` of them must occur, for 1 or 0; ``share`` is the share that occurs.

    Raises:
        ConfigError: Both or neither of ``words`` and ``column`` are given.
    """
    return Words(words, column, mode)


def lexicon(
    path: Annotated[Path | str, ReadsFile()], *, output: Literal["sum", "mean", "present", "probability"] = "sum"
) -> Lexicon:
    """The sum of weighted words.

    Args:
        path: File with one word per line, followed by a tab and its weight if that is not 1.
        output: ``mean``: the sum divided by the number of words; ``present``: 1 if one of them occurs, else 0;
            ``probability``: the logistic function of the sum.

    Raises:
        DataError: A line is not a word with its weight.
    """
    return Lexicon(read_lexicon(path), output=output)


def sentiment(
    path: Annotated[Path | str, ReadsFile()],
    positive: str,
    *,
    output: Literal["sum", "mean", "probability"] = "sum",
    smoothing: Annotated[float, Field(gt=0)] = 1.0,
) -> Lexicon:
    """The log-odds of a class by the words of labeled texts (naive Bayes).

    Args:
        path: JSONL, also ``.gz``, with ``text`` and ``label``.
        positive: The label whose log-odds are the reward.
        output: ``sum``: the log-odds; ``mean``: the log-odds divided by the number of words; ``probability``: that of
            the class.
        smoothing: Added to every count.

    Raises:
        DataError: A row lacks a column, or there are not two classes.
    """
    texts, labels = read_labeled(path, positive=positive)
    return fit_lexicon(texts, labels, smoothing=smoothing, output=output)


def classifier(
    path: Annotated[str, LoadsModel()],
    *,
    text: Literal["joined", "completion", "pair", "chat"] = "joined",
    output: Literal["score", "logprob", "probability"] = "score",
    label: str | int | None = None,
    max_length: Annotated[int | None, Field(ge=1)] = None,
    tokens_per_batch: Annotated[int, Field(ge=1)] = 16_384,
    dtype: Dtype = "auto",
    device: str | None = None,
    revision: str | None = None,
) -> ClassifierReward:
    """The score of a sequence classifier.

    Args:
        path: Hub name or folder.
        text: The classifier's input: prompt and completion as one text, the completion, a pair of texts, or a
            conversation.
        output: ``score``: the head's raw value.
        label: Name or index of the label; required if the head has several.
        max_length: Maximum number of tokens, by default that of the model. Longer inputs lose their beginning.
        tokens_per_batch: Tokens computed at once, padding included.
        dtype: Dtype of the weights.
        device: By default the GPU if there is one.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ModelError: The model does not exist or cannot be loaded.
        ConfigError: The label is missing or unknown.
    """
    from falign.rewards.classifier import ClassifierReward, load_classifier

    model, tokenizer = load_classifier(path, dtype=dtype, device=device, revision=revision)
    return ClassifierReward(
        model,
        tokenizer,
        text=text,
        output=output,
        label=label,
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
    )


def implicit(
    path: Annotated[str, LoadsModel(reads_policy_ids=True)],
    reference: Annotated[str, LoadsModel(reads_policy_ids=True)],
    *,
    divergence: str = "reverse_kl",
    beta: Annotated[float, Field(gt=0)] = 0.1,
    layout: Literal["padded", "tree"] = "padded",
    tokens_per_batch: Annotated[int, Field(ge=1)] = 8192,
    dtype: Dtype = "auto",
    device: str | None = None,
) -> ImplicitReward:
    """The implicit reward of a model trained by f-DPO, β f'(π/π_ref).

    Args:
        path: Hub name or folder of π, which must have the policy's tokens.
        reference: Hub name or folder of π_ref, likewise.
        divergence: A name, or ``module:Name`` of your own; it must have a barrier.
        beta: β.
        layout: ``tree`` computes each prompt once for all its completions, if the models support it.
        tokens_per_batch: Tokens scored at once.
        dtype: Dtype of the weights.
        device: By default the GPU if there is one.

    Raises:
        ValueError: The divergence is unknown or has no barrier.
        ModelError: A model does not exist or cannot be loaded.
    """
    import torch

    from falign.models import load_model
    from falign.models.heads import share_head
    from falign.rewards.implicit import ImplicitReward
    from falign.scoring import Scorer

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    f = divergences.get(divergence, field="divergence")
    model, reference_model = (load_model(each, dtype=dtype, device=place) for each in (path, reference))
    share_head(model, reference_model)
    return ImplicitReward(model, reference_model, f, beta, Scorer(layout), tokens_per_batch=tokens_per_batch)


def oracle(
    function: str, *, both_orders: bool = True, samples: Annotated[Path | str | None, ReadsFile()] = None
) -> OracleReward:
    """The win rate over the other completions of the prompt, by a judge of pairs.

    Args:
        function: ``module:function``, called as ``oracle(prompts, first, second, **columns)``, which returns the
            probability that the first completion is preferred, one per pair; it may be ``async``.
        both_orders: Ask for both orders of a pair and take the mean, so that no position is preferred; ``asymmetry`` is
            logged. False asks once.
        samples: A file of samples (`falign sample --out`), whose completions are the opponents in place of the others.

    Raises:
        ConfigError: It cannot be imported, or is not an oracle.
    """
    from falign.rewards.oracle import OracleReward

    return OracleReward.named(function, both_orders=both_orders, samples=samples)


def judge(
    endpoint: Endpoint,
    *,
    scale: tuple[int, int] = (1, 10),
    template: Annotated[Path | str | None, ReadsFile()] = None,
    reference: str | None = None,
    failed: float | None = None,
) -> JudgeReward:
    """The score that an LLM judge gives on a scale.

    Args:
        endpoint: The judge: a model behind an OpenAI-compatible endpoint.
        scale: The worst and the best score, whole numbers.
        template: A YAML file with the texts ``system`` and ``user``; placeholders are ``{prompt}``, ``{completion}``,
            ``{reference}``, ``{form}`` and columns of the data. By default a general one.
        reference: Column with a reference answer, which is shown to the judge.
        failed: Value of a completion without a verdict; null leaves it out. It is counted as an error.

    Raises:
        ConfigError: The template is missing or cannot be read, the key is missing, or the scale is empty.
    """
    from falign.judges import RATE, Judge, ScoreForm, read_template
    from falign.rewards.judge import JudgeReward

    texts = RATE if template is None else read_template(template)
    texts.check(texts.placeholders, required=["completion"])
    try:
        form = ScoreForm(*scale)
    except ValueError as error:
        raise ConfigError(f"reward judge: {error}") from error
    return JudgeReward(Judge(Endpoint.model_validate(endpoint), texts, form), reference, failed)


def judge_oracle(
    endpoint: Endpoint,
    *,
    both_orders: bool = True,
    samples: Annotated[Path | str | None, ReadsFile()] = None,
    template: Annotated[Path | str | None, ReadsFile()] = None,
    reference: str | None = None,
    failed: Annotated[float, Field(ge=0, le=1)] | None = None,
) -> OracleReward:
    """The win rate over the other completions of the prompt, by an LLM judge of pairs.

    Args:
        endpoint: The judge: a model behind an OpenAI-compatible endpoint.
        both_orders: Ask for both orders of a pair; if they disagree, it is a tie, and ``position_bias`` is logged.
            False asks once.
        samples: A file of samples (`falign sample --out`), whose completions are the opponents in place of the others.
        template: A YAML file with the texts ``system`` and ``user``; placeholders are ``{prompt}``, ``{first}``,
            ``{second}``, ``{reference}``, ``{form}`` and columns of the data. By default a general one.
        reference: Column with a reference answer, which is shown to the judge.
        failed: Probability of a pair without a verdict; null leaves the pair out.

    Raises:
        ConfigError: The template is missing or cannot be read, or the key is missing.
        DataError: The file of samples is missing or damaged.
    """
    from falign.judges import COMPARE, PAIR, Judge, read_template
    from falign.rewards.judge import JudgeOracle
    from falign.rewards.oracle import OracleReward, opponents_of

    texts = COMPARE if template is None else read_template(template)
    texts.check(texts.placeholders, required=["first", "second"])
    asked = JudgeOracle(Judge(Endpoint.model_validate(endpoint), texts, PAIR), both_orders, reference)
    opponents = None if samples is None else opponents_of(samples)
    # The oracle itself asks for both orders, because a disagreement is a tie and not half a win.
    return OracleReward(asked, "judge", both_orders=False, opponents=opponents, failed=failed)


REWARDS: Registry[Callable[..., Reward]] = Registry(
    "reward",
    {
        "math": mathematics,
        "number": number,
        "choice": choice,
        "regex": regex,
        "sections": sections,
        "sql": sql,
        "words": words,
        "lexicon": lexicon,
        "sentiment": sentiment,
        "classifier": classifier,
        "implicit": implicit,
        "oracle": oracle,
        "judge": judge,
        "judge_oracle": judge_oracle,
    },
    wanted="class or function that makes a reward",
)
"""Makers of the built-in rewards, by their kind in run files."""


def load_reward(name: str) -> Reward:
    r"""Return a reward by name.

    Args:
        name: ``module:function``, or a name of ``REWARDS`` with its arguments as a Python call, literals only:
            ``math``, ``number(answer='label', tolerance=0.01)``, ``regex(r'\d+', whole=True)``.

    Raises:
        ConfigError: It is unknown, cannot be imported, or does not take these arguments.
    """
    if is_own_name(name.strip()):
        return OwnFunction(name.strip())
    function, arguments, keywords = _parsed(name)
    make = REWARDS.get(function)
    try:
        return make(*arguments, **keywords)
    except TypeError as error:
        raise ConfigError(f"reward {name!r}: {error}; write its arguments as in a Python call.") from error


def _parsed(name: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Return the function, arguments and keywords of a call; of any other text, the text as the function."""
    try:
        node = ast.parse(name.strip(), mode="eval").body
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
            return node.func.id, [ast.literal_eval(argument) for argument in node.args], keywords
    except SyntaxError:
        pass  # a plain name, or an unknown one
    except ValueError as error:
        raise ConfigError(f"reward {name!r}: {error}; its arguments must be literals.") from error
    return name.strip(), [], {}

"""Tokenization: the boundary between prompt and completion, one stop token at the end, at most one BOS."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from falign.choices import shown
from falign.data.chat_template import NO_INPUTS, TemplateInputs, Tokenizer
from falign.data.conversations import Text
from falign.data.examples import Example
from falign.data.fidelity import check_decoded
from falign.data.rendering import Answer, Rendered, render, render_prompt
from falign.data.token_weights import answer_text, token_weights
from falign.data.windows import Window, fit
from falign.errors import ConfigError, DataError
from falign.scoring.batch import PromptTree

__all__ = ["Encoded", "Tokenized", "encode", "encode_prompt", "fitted", "tokenize"]


class Encoded(NamedTuple):
    """An example in token ids, of any length.

    Attributes:
        tree: Prompt and completions.
        drifting_tokens: Number of tokens at the end of the prompt that change when a completion follows. They belong to
            the completions, or to neither side if the template writes them only in the prompt.
        reopened: Whether they change because the template opens an answer differently from its generation prompt;
            otherwise they merge with the first characters of an answer.
    """

    tree: PromptTree
    drifting_tokens: int
    reopened: bool = False


@dataclass(frozen=True)
class Tokenized:
    """An example in token ids that fits the window, with the cuts that were made.

    Attributes:
        tree: Prompt and completions; None if the row was dropped.
        drifting_tokens: As in ``Encoded``.
        reopened: As in ``Encoded``.
        prompt_tokens_cut: Number of tokens cut from the prompt.
        completions_cut: Number of completions that were cut.
        dropped: Reason why the row was dropped, or None.
    """

    tree: PromptTree | None
    drifting_tokens: int = 0
    reopened: bool = False
    prompt_tokens_cut: int = 0
    completions_cut: int = 0
    dropped: str | None = None


def tokenize(example: Example, tokenizer: Tokenizer, *, stop_token_ids: Collection[int], window: Window) -> Tokenized:
    """Return the example as token ids that fit the window.

    Args:
        example: Prompt and completions as text.
        tokenizer: The model's tokenizer.
        stop_token_ids: All tokens at which the model's generation ends, besides the tokenizer's EOS.
        window: Maximum lengths, and the policies for longer rows.

    Raises:
        ConfigError: A required chat template or stop token is missing.
        DataError: The row cannot be tokenized, or is too long under the policy ``"error"``.
    """
    encoded = encode(example, tokenizer, stop_token_ids=stop_token_ids)
    return fitted(encoded, window, bos_token_id=tokenizer.bos_token_id)


def fitted(encoded: Encoded, window: Window, *, bos_token_id: int | None) -> Tokenized:
    """Return an example cut to the window.

    Raises:
        DataError: It is too long under the policy ``"error"``.
    """
    found = fit(encoded.tree, window, bos_token_id=bos_token_id)
    return Tokenized(
        found.tree,
        encoded.drifting_tokens,
        encoded.reopened,
        found.prompt_tokens_cut,
        found.completions_cut,
        found.dropped,
    )


def encode(example: Example, tokenizer: Tokenizer, *, stop_token_ids: Collection[int]) -> Encoded:
    """Return the example as token ids of any length.

    Each whole text is tokenized once. The prompt is the common prefix of the tokens of the prompt alone and of all
    whole texts. So it is the same for all completions, and prompt + completion are the tokens of the whole text.

    Raises:
        ConfigError: A required chat template or stop token is missing.
        DataError: No prompt token is left, or a completion has a stop token in its middle.
    """
    rendered = render(example, tokenizer)
    bos = [] if example.conversational else _leading_bos(tokenizer)
    prompt_ids = _ids(rendered.prompt, tokenizer, bos, example.place)
    full_ids = [_ids(text, tokenizer, bos, example.place) for text in rendered.full]
    # The last token of each text is left out here, so that every completion keeps at least one token.
    boundary = _common_length([prompt_ids, *(ids[:-1] for ids in full_ids)])
    if boundary == 0:
        raise DataError(
            f"{example.place}: no token of the prompt {shown(rendered.prompt)} survives, because its only token merges "
            "with the completion's first; lengthen the prompt, or use a tokenizer that adds a BOS token."
        )
    stops = frozenset(stop_token_ids) | ({tokenizer.eos_token_id} - {None})
    places = [f"{example.place}: completion {number}" for number in range(1, len(full_ids) + 1)]
    ended = [
        _with_one_stop(ids[boundary:], tokenizer, stops, place, inner=bool(rendered.answers))
        for ids, place in zip(full_ids, places, strict=True)
    ]
    counted = None
    if rendered.answers:
        whole = example.shared == 0
        counted = tuple(
            _counted(ids, full, full_ids[n], rendered.answers[n], boundary, tokenizer, stops, places[n], whole=whole)
            for n, (ids, full) in enumerate(zip(ended, rendered.full, strict=True))
        )
    completions = tuple(ended)
    weights = None
    if example.weights is not None:
        added = len(bos) if bos and not rendered.prompt.startswith(tokenizer.bos_token) else 0
        aligned = _weights(example, example.weights, rendered, tokenizer, boundary - added)
        # An appended stop token counts once; what was cut behind a stop token does not count.
        weights = tuple((*own, 1.0)[: len(ids)] for own, ids in zip(aligned, completions, strict=True))
    tree = PromptTree(
        tuple(prompt_ids[:boundary]),
        completions,
        example.preference,
        example.place,
        token_weights=weights,
        weight=example.weight,
        counted=counted,
        margin=_margin(example.columns.get("margin")),
    )
    _check_distinct(tree)
    reopened = not all(text.startswith(rendered.prompt) for text in rendered.full)
    # `reopened` counts only if it changes tokens: the prompt must have lost some at its end.
    return Encoded(tree, len(prompt_ids) - boundary, reopened and boundary < len(prompt_ids))


def _margin(value: object) -> float | None:
    """Return a margin; None for what is not a finite number, which only objectives that read it refuse."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None  # pyright: ignore[reportArgumentType]


def _weights(
    example: Example,
    weights: Sequence[Sequence[float]],
    rendered: Rendered,
    tokenizer: Tokenizer,
    boundary: int,
) -> tuple[tuple[float, ...], ...]:
    found = []
    for own, completion, full in zip(weights, example.completions, rendered.full, strict=True):
        # The answer follows the text that both have in common.
        same = (a == b for a, b in zip(rendered.prompt, full, strict=False))
        start = next((i for i, equal in enumerate(same) if not equal), len(rendered.prompt))
        found.append(
            token_weights(
                own,
                answer_text(completion),
                full,
                start=start,
                boundary=boundary,
                tokenizer=tokenizer,
                place=example.place,
            )
        )
    return tuple(found)


def _check_distinct(tree: PromptTree) -> None:
    if tree.preference is None:
        return
    seen: dict[tuple[int, ...], int] = {}
    for number, ids in enumerate(tree.completion_ids):
        other = seen.setdefault(ids, number)
        if tree.preference[other] != tree.preference[number]:
            raise DataError(
                f"{tree.place}: completions {other + 1} and {number + 1} are the same tokens, because they differ only "
                "in white space, which is trimmed; neither can be preferred: correct the row or remove it."
            )


def encode_prompt(
    prompt: Text, tokenizer: Tokenizer, place: str, *, inputs: TemplateInputs = NO_INPUTS
) -> tuple[int, ...]:
    """Return the token ids of a prompt without a completion.

    Raises:
        ConfigError: The prompt is a conversation, and there is no usable chat template.
        DataError: The template refuses it, or no token is left.
    """
    bos = _leading_bos(tokenizer) if isinstance(prompt, str) else []
    ids = tuple(_ids(render_prompt(prompt, tokenizer, place, inputs=inputs), tokenizer, bos, place))
    if not ids:
        raise DataError(f"{place}: the prompt has no token; a completion needs at least one before it.")
    return ids


def _ids(text: str, tokenizer: Tokenizer, bos: list[int], place: str) -> list[int]:
    # verbose=False: no warning about the tokenizer's own maximum; the window of the run is checked later.
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    check_decoded(text, ids, tokenizer.decode, place)
    return ids if ids[: len(bos)] == bos else bos + ids


def _leading_bos(tokenizer: Tokenizer) -> list[int]:
    # Chat templates write their own BOS; for plain text it is there if the tokenizer adds one to any text.
    added = tokenizer("", add_special_tokens=True)["input_ids"]
    return [added[0]] if len(added) and added[0] == tokenizer.bos_token_id else []


def _common_length(sequences: Sequence[list[int]]) -> int:
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def _counted(
    ids: tuple[int, ...],
    full: str,
    full_ids: list[int],
    answers: Sequence[Answer],
    boundary: int,
    tokenizer: Tokenizer,
    stops: frozenset[int],
    place: str,
    *,
    whole: bool,
) -> tuple[bool, ...]:
    """Return which tokens of a completion of several turns count: those of its answers, each with one stop token.

    An answer begins where the tokens of all that the model reads before it end, and ends with the stop token that
    closes its turn; without one, with its turn, or else with its text. With `whole`, the completion begins with the
    first answer.
    """
    starts = [start for start, _ in _spans(full, tokenizer, place)]
    counted = [False] * len(ids)
    for number, answer in enumerate(answers):
        opening = _ids(answer.opening, tokenizer, [], place)
        first = 0 if whole and number == 0 else _common_length([opening, full_ids]) - boundary
        after = bisect_left(starts, answer.end) - boundary
        limit = len(ids) if number == len(answers) - 1 else bisect_left(starts, answer.following) - boundary
        end = next((i + 1 for i in range(after, limit) if ids[i] in stops), None)
        if end is None:
            if answer.closed is None and answer.calls:
                raise DataError(
                    f"{place}, answer {number + 1}: the chat template closes the turn of a call with no stop token, so "
                    "that its end cannot be found; set model.chat_template to one that does."
                )
            end = after if answer.closed is None else bisect_left(starts, answer.closed) - boundary
            end = min(end, len(ids))
        inner = next((i for i in range(first, end - 1) if ids[i] in stops), None)
        if inner is not None:
            _refuse_stop(ids[inner], inner - first + 1, end - first, tokenizer, f"{place}, answer {number + 1}")
        counted[first:end] = [True] * (end - first)
    return tuple(counted)


def _spans(full: str, tokenizer: Tokenizer, place: str) -> list[tuple[int, int]]:
    """Return start and end of each token in the text."""
    try:
        return tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    except NotImplementedError as error:
        raise ConfigError(
            f"{place}: completions of several turns need a fast tokenizer, which gives the characters of each token: "
            "load one."
        ) from error


def _refuse_stop(id_: int, number: int, total: int, tokenizer: Tokenizer, place: str) -> NoReturn:
    raise DataError(
        f"{place} has the stop token {tokenizer.decode([id_])!r} in its middle (token {number} of {total}), where "
        "generation would end; remove it from the text."
    )


def _with_one_stop(
    ids: list[int], tokenizer: Tokenizer, stops: frozenset[int], place: str, *, inner: bool = False
) -> tuple[int, ...]:
    end = _terminal_stop(ids, tokenizer, stops)
    if end is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"{place} has no stop token, and the tokenizer has no EOS to append; set its eos_token.")
        ids = [*ids, tokenizer.eos_token_id]
        end = len(ids) - 1
    early = None if inner else next((i for i in range(end) if ids[i] in stops), None)
    if early is not None:
        _refuse_stop(ids[early], early + 1, end + 1, tokenizer, place)
    return tuple(ids[: end + 1])


def _terminal_stop(ids: list[int], tokenizer: Tokenizer, stops: frozenset[int]) -> int | None:
    """Return the index of the completion's end: the first stop token of a tail of stop tokens and white space."""
    # Walk back over stop tokens and white space; the last stop token seen is the first of that tail.
    end = None
    for i in reversed(range(len(ids))):
        if ids[i] in stops:
            end = i
        elif tokenizer.decode([ids[i]]).strip():
            break
    return end

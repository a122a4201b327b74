"""Rendered examples: the exact texts that a tokenizer reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from falign.data.chat_template import NO_INPUTS, TemplateInputs, Tokenizer, reads
from falign.data.conversations import TOOL_CALLS, Message, Text
from falign.data.examples import Example
from falign.data.fidelity import Written, compact, write
from falign.errors import ConfigError, DataError

__all__ = ["Answer", "Rendered", "render", "render_prompt", "require_chat_choice"]


class Answer(NamedTuple):
    """An answer that counts, in a completion of several turns.

    Attributes:
        opening: All that the model reads before it, its generation prompt included, as a text of its own.
        end: Where the answer ends in the whole text, before what closes its turn.
        following: Where the next turn begins there; the length of the text for the last.
        closed: Where its turn ends, if the whole text begins with all up to this turn; otherwise None.
        calls: Whether the answer calls tools, whose last value `end` need not be after.
    """

    opening: str
    end: int
    following: int
    closed: int | None
    calls: bool


class Rendered(NamedTuple):
    """The rendered texts of one example.

    Attributes:
        prompt: The prompt alone, up to where the answer begins.
        full: Prompt and completion, for each completion.
        answers: The answers in each completion, if one has several turns; otherwise empty.
    """

    prompt: str
    full: tuple[str, ...]
    answers: tuple[tuple[Answer, ...], ...] = ()


def render(example: Example, tokenizer: Tokenizer) -> Rendered:
    """Render the prompt alone and with each completion: by the chat template, or concatenated.

    Raises:
        ConfigError: The prompt is a conversation, and there is no usable chat template.
        DataError: The template refuses this conversation, or changes its text.
    """
    prompt, completions, place = example.prompt, example.completions, example.place
    if isinstance(prompt, str):
        return Rendered(prompt, tuple(prompt + text for text in completions if isinstance(text, str)))
    opening = render_prompt(prompt, tokenizer, place, inputs=example.inputs)
    several = any(len(turns) > 1 for turns in completions)
    whole: list[Written] = []
    answers: list[tuple[Answer, ...]] = []
    for turns in completions:
        assert not isinstance(turns, str)
        like = whole[0] if whole and not several else None
        written = write([*prompt, *turns], tokenizer, place, answered=True, like=like, inputs=example.inputs)
        _check_opening(opening, written, len(prompt), place)
        whole.append(written)
        if several:
            found = _answers([*prompt, *turns], len(prompt) + example.shared, written, example, tokenizer)
            answers.append(tuple(found))
    return Rendered(opening, tuple(written.text for written in whole), tuple(answers))


def _check_options(inputs: TemplateInputs, tokenizer: Tokenizer, place: str) -> None:
    for name in inputs.options:
        if not reads(tokenizer, name):
            raise DataError(
                f"{place}: chat_template_kwargs has {name!r}, which the chat template does not read; remove it, or set "
                "model.chat_template to one that does."
            )


def _check_opening(opening: str, written: Written, turns: int, place: str) -> None:
    """Refuse a conversation whose first turns are another text when later ones follow."""
    # Training sees the prompt before an answer, sampling sees it alone; both must be the same text.
    end = written.spans[turns - 1][1]
    if compact(opening)[:end] != compact(written.text)[:end]:
        raise DataError(
            f"{place}: the chat template changes the prompt when an answer follows, so training and sampling would "
            "use different prompts; set model.chat_template to another one."
        )


def _answers(
    turns: list[Message], first: int, written: Written, example: Example, tokenizer: Tokenizer
) -> Iterator[Answer]:
    """Yield the assistant's turns from the given one on."""
    places = [i for i, character in enumerate(written.text) if not character.isspace()]
    starts, ends = zip(*written.spans, strict=True)
    for number in range(first, len(turns)):
        if turns[number]["role"] != "assistant":
            continue
        opening = write(turns[:number], tokenizer, example.place, answered=False, inputs=example.inputs).text
        _check_opening(opening, written, number, example.place)
        last = number == len(turns) - 1
        end, calls = places[ends[number] - 1] + 1, TOOL_CALLS in turns[number]
        if last:
            yield Answer(opening, end, len(written.text), len(written.text), calls)
            continue
        own = write(turns[: number + 1], tokenizer, example.place, answered=True, inputs=example.inputs).text.rstrip()
        closed = len(own) if written.text.startswith(own) else None
        yield Answer(opening, end, places[starts[number + 1]], closed, calls)


def require_chat_choice(prompt: Text, tokenizer: Tokenizer, chat: bool | None, place: str) -> None:
    """Refuse plain text if the tokenizer has a chat template and ``chat`` does not say whether to use it.

    Args:
        prompt: The prompt.
        tokenizer: The model's tokenizer.
        chat: The choice of the source, :attr:`falign.data.DataSource.chat`.
        place: File and row, for messages.

    Raises:
        ConfigError: ``chat`` is None, and the row can be read in both ways.
    """
    if chat is None and isinstance(prompt, str) and tokenizer.chat_template:
        raise ConfigError(
            f"{place}: the row is plain text, and the model has a chat template, so say how to read it: chat=True "
            "(prompts are user turns, completions assistant turns) or chat=False (plain text without the template)."
        )


def render_prompt(prompt: Text, tokenizer: Tokenizer, place: str, *, inputs: TemplateInputs = NO_INPUTS) -> str:
    """Render a prompt alone, up to where the answer begins.

    Raises:
        ConfigError: The prompt is a conversation, and there is no usable chat template.
        DataError: The template refuses this conversation, or changes its text.
    """
    if isinstance(prompt, str):
        return prompt
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{place}: the row is a conversation, and the tokenizer has no chat template; "
            "set model.chat_template to a file or a Jinja string, or use a model that has one."
        )
    _check_options(inputs, tokenizer, place)
    return write(prompt, tokenizer, place, answered=False, inputs=inputs).text

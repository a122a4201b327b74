"""Rendered examples: the exact texts that a tokenizer reads."""

from __future__ import annotations

from typing import NamedTuple

from falign.data.chat_template import Tokenizer
from falign.data.conversations import Text
from falign.data.examples import Example
from falign.data.fidelity import Written, compact, write
from falign.errors import ConfigError, DataError

__all__ = ["Rendered", "render", "render_prompt", "require_chat_choice"]


class Rendered(NamedTuple):
    """The rendered texts of one example.

    Attributes:
        prompt: The prompt alone, up to where the answer begins.
        full: Prompt and completion, for each completion.
    """

    prompt: str
    full: tuple[str, ...]


def render(example: Example, tokenizer: Tokenizer) -> Rendered:
    """Render the prompt alone and with each completion: by the chat template, or concatenated.

    Raises:
        ConfigError: The prompt is a conversation, and there is no usable chat template.
        DataError: The template refuses this conversation, or changes its text.
    """
    prompt, completions, place = example.prompt, example.completions, example.place
    if isinstance(prompt, str):
        return Rendered(prompt, tuple(prompt + text for text in completions if isinstance(text, str)))
    opening = render_prompt(prompt, tokenizer, place)
    whole: list[Written] = []
    for turns in completions:
        assert not isinstance(turns, str)
        like = whole[0] if whole else None
        whole.append(write([*prompt, *turns], tokenizer, place, answered=True, like=like))
        # Training sees the prompt before an answer, sampling sees it alone; both must be the same text.
        end = whole[-1].spans[-2][1]
        if compact(opening)[:end] != compact(whole[-1].text)[:end]:
            raise DataError(
                f"{place}: the chat template changes the prompt when an answer follows, so training and sampling would "
                "use different prompts; set model.chat_template to another one."
            )
    return Rendered(opening, tuple(written.text for written in whole))


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


def render_prompt(prompt: Text, tokenizer: Tokenizer, place: str) -> str:
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
    return write(prompt, tokenizer, place, answered=False).text

"""From an example to the exact texts that a tokenizer sees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from falign.data.conversations import Message, Text
from falign.data.examples import Example
from falign.errors import ConfigError, DataError

__all__ = ["Rendered", "Tokenizer", "render", "render_prompt", "require_chat_choice"]


if TYPE_CHECKING:

    class Tokenizer(Protocol):
        """What this package uses of a Transformers tokenizer, without seconds of importing it."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
        def decode(self, *args: Any, **kwargs: Any) -> Any: ...
        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any: ...
        def __getattr__(self, name: str, /) -> Any: ...  # bos_token_id, eos_token_id, chat_template

else:
    Tokenizer = Any


class Rendered(NamedTuple):
    """Texts of one example.

    Attributes:
        prompt: The prompt alone, up to where the answer begins.
        full: Prompt and completion, for each completion.
    """

    prompt: str
    full: tuple[str, ...]


def render(example: Example, tokenizer: Tokenizer) -> Rendered:
    """Render the prompt alone and with each completion: by the chat template, or joined as they are.

    Raises:
        ConfigError: A conversation, and no usable chat template.
        DataError: The template refuses this conversation.
    """
    prompt, completions = example.prompt, example.completions
    rendered = render_prompt(prompt, tokenizer, example.place)
    if isinstance(prompt, str):
        return Rendered(rendered, tuple(prompt + text for text in completions if isinstance(text, str)))
    full = tuple(
        _apply_template([*prompt, *turns], tokenizer, example.place, answered=True)
        for turns in completions
        if not isinstance(turns, str)
    )
    return Rendered(rendered, full)


def require_chat_choice(prompt: Text, tokenizer: Tokenizer, chat: bool | None, place: str) -> None:
    """Refuse plain text where the tokenizer has a chat template and nobody has said whether to use it.

    Args:
        prompt: As it will be rendered.
        tokenizer: The model's.
        chat: As :attr:`falign.data.DataSource.chat`.
        place: The row, for messages.

    Raises:
        ConfigError: Both readings are possible, and ``chat`` is None.
    """
    if chat is None and isinstance(prompt, str) and tokenizer.chat_template:
        raise ConfigError(
            f"{place}: the row is plain text, and the model has a chat template. Set chat on the source: "
            "true makes the prompt a user's turn and a completion the assistant's, as the model is prompted in a chat; "
            "false continues the text as it stands, without the template."
        )


def render_prompt(prompt: Text, tokenizer: Tokenizer, place: str) -> str:
    """Render a prompt alone, up to where the answer begins.

    Raises:
        ConfigError: A conversation, and no usable chat template.
        DataError: The template refuses this conversation.
    """
    if isinstance(prompt, str):
        return prompt
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{place}: the row is a conversation, and the tokenizer has no chat template; "
            "set model.chat_template to a file or a Jinja string, or use a model that has one."
        )
    return _apply_template(prompt, tokenizer, place, answered=False)


def _apply_template(turns: list[Message], tokenizer: Tokenizer, place: str, *, answered: bool) -> str:
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not answered))
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template is not valid Jinja (line {error.lineno}: {error}); mend model.chat_template."
        ) from error
    except TemplateError as error:
        roles = " ".join(turn["role"] for turn in turns)
        raise DataError(
            f"{place}: the chat template refuses the turns ({roles}): {error}; "
            "mend the row, or set model.chat_template."
        ) from error

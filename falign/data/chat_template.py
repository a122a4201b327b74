"""Chat templates: programs by others, which may fail, hang, or write without end."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from falign.choices import shown
from falign.data.conversations import Message
from falign.deadlines import LateError, failure, within
from falign.errors import ConfigError, DataError

__all__ = ["NO_INPUTS", "RESERVED", "TemplateInputs", "Tokenizer", "apply_template", "reads", "template_source"]

SECONDS = 10.0
"""Time limit for rendering one conversation; real templates need a thousandth of it."""

CHARACTERS = 1_000_000
"""Largest number of characters that a template may add to the turns."""

_tried: set[tuple[str, bool, frozenset[str]]] = set()
"""Templates that have terminated on a kind of conversation: whether it is answered, and its roles and keys."""

if TYPE_CHECKING:

    class Tokenizer(Protocol):
        """The part of a Transformers tokenizer that this package uses; importing the class takes seconds."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
        def decode(self, *args: Any, **kwargs: Any) -> Any: ...
        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any: ...
        def __getattr__(self, name: str, /) -> Any: ...  # bos_token_id, eos_token_id, chat_template

else:
    Tokenizer = Any


@dataclass(frozen=True)
class TemplateInputs:
    """The inputs of a chat template besides the turns of a row.

    Attributes:
        tools: Definitions of the functions that the assistant may call.
        options: Further variables, such as ``enable_thinking``.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments for ``apply_chat_template``."""
        return {**self.options, **({"tools": list(self.tools)} if self.tools else {})}


NO_INPUTS = TemplateInputs()

RESERVED = frozenset({
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
"""Names of arguments of ``apply_chat_template``, which are not options of a template."""


def reads(tokenizer: Tokenizer, name: str) -> bool:
    """Return whether a name occurs in the chat template."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", template_source(tokenizer)) is not None


def template_source(tokenizer: Tokenizer) -> str:
    """Return the text of a tokenizer's chat template, or of all of them if it has several."""
    template = tokenizer.chat_template
    return "\n".join(map(str, template.values())) if isinstance(template, dict) else str(template)


def apply_template(
    turns: Sequence[Message],
    tokenizer: Tokenizer,
    place: str,
    *,
    answered: bool,
    inputs: TemplateInputs = NO_INPUTS,
) -> str:
    """Render a conversation by the tokenizer's chat template.

    Args:
        turns: The conversation.
        tokenizer: A tokenizer with a chat template.
        place: The row, for messages.
        answered: Whether the last turn is the answer; otherwise the generation prompt comes last.
        inputs: What the template reads besides the turns.

    Raises:
        ConfigError: The template is not valid Jinja, does not terminate, or writes without end.
        DataError: The template refuses the conversation, or fails on it.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    _try_first(turns, tokenizer, place, answered=answered, inputs=inputs)
    try:
        with within(SECONDS):
            text = _rendered(turns, tokenizer, answered, inputs)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"{_named(tokenizer)} is not valid Jinja (line {error.lineno}: {error.message}); correct it, or set "
            "model.chat_template to another one."
        ) from error
    except LateError as error:
        raise ConfigError(
            f"{_named(tokenizer)}{_line(error, tokenizer)} has not finished one conversation ({place}) after "
            f"{SECONDS:g} s: shorten what it computes there, or set model.chat_template to another."
        ) from error
    except Exception as error:  # a template is a program, and raises whatever Python does
        roles = " ".join(turn["role"] for turn in turns)
        does = "refuses" if type(error) is TemplateError else "fails on"
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise DataError(
            f"{place}: the chat template {does} the turns ({roles}): {reason} "
            f"[{_named(tokenizer)}{_line(error, tokenizer)}]; correct the row, or set model.chat_template."
        ) from error
    room = CHARACTERS + 10 * (len(str(turns)) + len(str(inputs)))
    if len(text) > room:
        raise ConfigError(
            f"{_named(tokenizer)} writes {len(text):,} characters for one conversation ({place}): remove what it "
            "repeats, or set model.chat_template to another."
        )
    return text


def _try_first(
    turns: Sequence[Message], tokenizer: Tokenizer, place: str, *, answered: bool, inputs: TemplateInputs
) -> None:
    """Refuse a template that hangs, or takes all memory, in one operation that no deadline can interrupt.

    Each template is tried on the first conversation of each kind, because a trial takes longer than rendering.
    """
    kind = frozenset(turn["role"] for turn in turns) | frozenset(key for turn in turns for key in turn)
    kind |= frozenset(inputs.arguments())
    key = (template_source(tokenizer), answered, kind)
    if key in _tried:
        return
    if (problem := failure(_render, turns, tokenizer, answered, inputs, seconds=2 * SECONDS)) is not None:
        raise ConfigError(
            f"{_named(tokenizer)} {problem} on one conversation ({place}): shorten what it computes, or set "
            "model.chat_template to another."
        )
    _tried.add(key)


def _rendered(turns: Sequence[Message], tokenizer: Tokenizer, answered: bool, inputs: TemplateInputs) -> str:
    further = inputs.arguments()
    return str(
        tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=not answered, **further)
    )


def _render(turns: Sequence[Message], tokenizer: Tokenizer, answered: bool, inputs: TemplateInputs) -> None:
    try:
        with within(SECONDS):
            _rendered(turns, tokenizer, answered, inputs)
    except MemoryError:
        raise
    except Exception:  # anything a template raises, LateError included: rendering it in this process reports the line
        return


def _named(tokenizer: Tokenizer) -> str:
    """Return the location of the template, which `falign.models.load_tokenizer` records."""
    place = vars(tokenizer).get("chat_template_place")
    return f"the chat template ({place})" if place else "the chat template"


def _line(error: Exception, tokenizer: Tokenizer) -> str:
    """Return the line of the template that an error came from, with its text."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    if not frames or not frames[-1].lineno:
        return ""
    number, lines = frames[-1].lineno, template_source(tokenizer).splitlines()
    text = f" ({shown(lines[number - 1].strip())})" if number <= len(lines) else ""
    return f", line {number}{text}"

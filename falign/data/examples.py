"""The normal form of every data layout: a prompt, its completions, and which is preferred."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from falign.choices import shown
from falign.data.chat_template import NO_INPUTS, TemplateInputs
from falign.data.conversations import TOOL_CALLS, Message, Text, common_turns, looks_like_hh, read_dialogue
from falign.errors import DataError

__all__ = ["Example", "build_example", "prompt_key", "prompt_turns", "require_preference", "user_turns"]

_REMEDY = "correct the row or remove it"


@dataclass(frozen=True)
class Example:
    """One prompt and its completions, as text.

    Attributes:
        prompt: Plain text, or the turns before the answer.
        completions: Plain texts, or turns. These end with the assistant's; users and tools may speak in between.
        preference: One value per completion, larger is preferred (a pair: 1 and 0; an unpaired label: 1 or 0);
            None if the data has no preference.
        place: The row it came from, for messages.
        columns: All columns of the row, under the file's names and falign's.
        weights: Weight of each character of each completion's text; None without such columns.
        weight: How much the row counts; 1 without such a column.
        shared: Number of turns at the beginning of each completion that all have in common, and that do not count.
        inputs: What the chat template reads of the row besides its turns.
        left_out: Reason why the row, although it is good, is not trained on; None for all others.
    """

    prompt: Text
    completions: tuple[Text, ...]
    preference: tuple[float, ...] | None
    place: str
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    weights: tuple[tuple[float, ...], ...] | None = None
    weight: float = 1.0
    shared: int = 0
    inputs: TemplateInputs = NO_INPUTS
    left_out: str | None = None

    @property
    def conversational(self) -> bool:
        """True if a chat template renders it."""
        return not isinstance(self.prompt, str)


def build_example(
    place: str,
    *,
    prompt: Text,
    completions: Sequence[Text],
    preference: Sequence[float] | None,
    fields: Sequence[str],
    system: str | None = None,
) -> Example:
    """Convert prompt and completions to one form, plain or conversational, and check them.

    Args:
        place: The row, for messages.
        prompt: Text or turns.
        completions: Text or turns; turns may repeat the prompt's before the answer.
        preference: One value per completion, or None.
        fields: The column of each completion, for messages.
        system: The value of the ``system`` column, if there is one. Even if empty, it makes the row a conversation,
            because plain text has no place for it.

    Raises:
        DataError: The row cannot be trained on; the message says why.
    """
    _check_whole_texts(prompt, completions, fields, place)
    shared = 0
    if system is not None or not all(isinstance(text, str) for text in (prompt, *completions)):
        if isinstance(prompt, str) and looks_like_hh(prompt):  # answers after "Assistant:" begin with a space
            completions = [text.strip() if isinstance(text, str) else text for text in completions]
        prompt, answers = _at_first_difference(
            _turns(prompt, "user"), [_turns(text, "assistant") for text in completions], fields, place
        )
        prompt, answers, shared = _after_a_question(prompt, answers)
        prompt, completions = prompt_turns(prompt, system, place), answers
        for turns, field in zip(answers, fields, strict=True):
            _check_answer(turns, shared, field, place)
    _check_texts(place, prompt, completions, fields)
    _check_preference(place, completions, preference, fields)
    preferred = None if preference is None else tuple(preference)
    return Example(prompt, tuple(completions), preferred, place, shared=shared)


def prompt_turns(prompt: Text, system: str | None, place: str) -> list[Message]:
    """Return a prompt as turns, after the value of a ``system`` column if there is one.

    Raises:
        DataError: The turns cannot be a prompt, or have another system turn.
    """
    turns = _turns(prompt, "user")
    if system and system.strip():
        turns = _with_system(turns, system, place)
    _check_prompt_turns(turns, place)
    return turns


def require_preference(example: Example) -> None:
    """Refuse a row in which no completion is preferred to another.

    Raises:
        DataError: With the place of the row.
    """
    if len(set(example.preference or ())) < 2:
        raise DataError(
            f"{example.place}: no completion is preferred to another, which this objective needs: give chosen and "
            "rejected, or completions with different scores."
        )


def prompt_key(prompt: Text) -> str:
    """Return a key that is equal for equal prompts; case and spacing do not count.

    Example:
        >>> prompt_key("What is  this?") == prompt_key("what is this? ")
        True
    """
    turns = [prompt] if isinstance(prompt, str) else [str(part) for turn in prompt for part in turn.values()]
    return json.dumps([" ".join(text.casefold().split()) for text in turns])


def user_turns(prompt: Text) -> list[Message]:
    """Return a prompt as turns: a plain text is a user's, or the dialogue that it holds."""
    return _turns(prompt, "user")


def _turns(text: Text, role: str) -> list[Message]:
    if isinstance(text, str) and role == "user" and looks_like_hh(text):
        turns = read_dialogue(text, place="", field="prompt")
        opened = turns[-1]["role"] == "assistant" and not turns[-1]["content"]
        return turns[:-1] if opened else turns
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _at_first_difference(
    prompt: list[Message], completions: Sequence[list[Message]], fields: Sequence[str], place: str
) -> tuple[list[Message], list[list[Message]]]:
    """Split dialogues at the first turn in which they differ: the turns that they share belong to the prompt."""
    answers = [_answer(turns, prompt) for turns in completions]  # without a repeated prompt
    shared = common_turns(*answers)
    if not shared:
        return prompt, answers
    repeats = any(len(turns) < len(whole) for turns, whole in zip(answers, completions, strict=True))
    whole = _continued(prompt, shared, repeated=repeats)
    if whole is None:
        raise DataError(
            f"{place}: {fields[0]!r} has {len(answers[0])} turns after the common prompt, and does not begin with it "
            f"({shown(prompt[-1]['content'])}); give the dialogue alone, or only its answer: {_REMEDY}."
        )
    return whole, [turns[len(shared) :] for turns in answers]


def _after_a_question(
    prompt: list[Message], answers: Sequence[list[Message]]
) -> tuple[list[Message], list[list[Message]], int]:
    """Move answers at the end of the prompt into the completions, where these go on with a user's or a tool's turn.

    The number of moved turns comes last: they are context, not what is compared.
    """
    end = len(prompt)
    if answers and all(turns and turns[0]["role"] != "assistant" for turns in answers):
        while end and prompt[end - 1]["role"] == "assistant":
            end -= 1
    return prompt[:end], [[*prompt[end:], *turns] for turns in answers], len(prompt) - end


def _continued(prompt: list[Message], shared: list[Message], *, repeated: bool) -> list[Message] | None:
    """Return a prompt with the turns that all dialogues share; None if the two do not fit together."""
    if repeated:  # the dialogues began with the prompt, which `_answer` has removed
        return [*prompt, *shared] if shared[0]["role"] == "assistant" else None
    # The dialogues may begin with a system turn that the prompt lacks. The prompt's turns must follow it at once.
    start = 1 if shared[0]["role"] == "system" and prompt and prompt[0]["role"] != "system" else 0
    if not prompt or shared[start : start + len(prompt)] == prompt:
        return shared
    # Otherwise they must continue the prompt: with an answer, or after a prompt of system turns only.
    follows = shared[0]["role"] == "assistant" or {turn["role"] for turn in prompt} == {"system"}
    return [*prompt, *shared] if follows else None


def _answer(turns: list[Message], prompt: list[Message]) -> list[Message]:
    repeats_prompt = len(turns) > len(prompt) and turns[: len(prompt)] == prompt
    return turns[len(prompt) :] if repeats_prompt else turns


def _with_system(prompt: list[Message], system: str, place: str) -> list[Message]:
    turn = {"role": "system", "content": system}
    if prompt and prompt[0]["role"] == "system" and prompt[0] != turn:
        raise DataError(f"{place}: the row has a 'system' column and another system turn in its prompt; keep one.")
    return prompt if prompt[:1] == [turn] else [turn, *prompt]


def _content(text: Text) -> str:
    return text if isinstance(text, str) else (text[-1]["content"] if text else "")


def _check_prompt_turns(prompt: list[Message], place: str) -> None:
    if prompt and prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{place}: the last turn of the prompt is the assistant's, {shown(prompt[-1]['content'])}; "
            f"the answer must follow another role's turn: {_REMEDY}."
        )


def _check_answer(turns: list[Message], shared: int, field: str, place: str) -> None:
    if turns and turns[-1]["role"] != "assistant":
        raise DataError(
            f"{place}: the last turn of {field!r} is by {turns[-1]['role']!r}; it must be the assistant's: {_REMEDY}."
        )
    if turns and turns[0]["role"] != "assistant":
        raise DataError(
            f"{place}: {field!r} goes on with a turn by {turns[0]['role']!r} after the prompt's last one, "
            f"{shown(turns[0]['content'])}; an answer must follow it: {_REMEDY}."
        )
    roles = [turn["role"] for turn in turns]
    for number, pair in enumerate(pairwise(roles)):
        if number >= shared and pair == ("assistant", "assistant"):
            raise DataError(
                f"{place}: {field!r} has two answers one after the other ({shown(turns[number]['content'])}, "
                f"{shown(turns[number + 1]['content'])}); give several answers as a list of texts, or of lists of "
                f"turns: {_REMEDY}."
            )


def _check_whole_texts(prompt: Text, completions: Sequence[Text], fields: Sequence[str], place: str) -> None:
    """Refuse plain completions that repeat the prompt before the answer."""
    for text, field in zip(completions, fields, strict=True):
        if isinstance(text, str) and looks_like_hh(text):
            raise DataError(
                f"{place}: {field!r} is a whole dialogue in HH-RLHF's layout, beside a prompt ({shown(text)}); give "
                "its last answer alone, or set format=hh and ignore=[prompt] for pairs of dialogues."
            )
    if not isinstance(prompt, str) or not completions:
        return
    # An answer may well begin with the same single word as the prompt.
    stripped = prompt.strip()
    plain = [text.strip() for text in completions if isinstance(text, str)]
    repeated = [text for text in plain if text.startswith(stripped) and len(text) > len(stripped)]
    if len(stripped.split()) > 1 and len(repeated) == len(completions):
        named = f"{fields[0]!r} begins" if len(fields) == 1 else f"all completions, such as {fields[0]!r}, begin"
        raise DataError(
            f"{place}: {named} with the whole prompt ({shown(prompt)}), which would then occur twice; remove "
            f"it from the completions: {_REMEDY}."
        )


def _check_texts(place: str, prompt: Text, completions: Sequence[Text], fields: Sequence[str]) -> None:
    for text, field in zip((prompt, *completions), ("prompt", *fields), strict=True):
        for part in (text,) if isinstance(text, str) else [turn["content"] for turn in text]:
            if any("\ud800" <= character <= "\udfff" for character in part):
                raise DataError(
                    f"{place}: {field!r} has half a surrogate pair ({shown(part)}); it must be Unicode: {_REMEDY}."
                )
    if not _content(prompt).strip():
        raise DataError(f"{place}: the prompt is empty ({shown(prompt)}); it must contain text: {_REMEDY}.")
    if not completions:
        raise DataError(f"{place}: there are no completions; a row needs at least one: {_REMEDY}.")
    for text, field in zip(completions, fields, strict=True):
        if not _content(text).strip() and (isinstance(text, str) or not text or TOOL_CALLS not in text[-1]):
            raise DataError(f"{place}: {field!r} is empty ({shown(text)}); it must contain text: {_REMEDY}.")


def _check_preference(
    place: str, completions: Sequence[Text], preference: Sequence[float] | None, fields: Sequence[str]
) -> None:
    if preference is None:
        return
    if not all(math.isfinite(value) for value in preference):
        raise DataError(f"{place}: the preference is {shown(list(preference))}; it must be finite numbers: {_REMEDY}.")
    if len(preference) > 1 and len(set(preference)) == 1:
        raise DataError(
            f"{place}: all {len(preference)} completions have the same score; nothing is preferred: {_REMEDY}."
        )
    for i, (text, value) in enumerate(zip(completions, preference, strict=True)):
        for j in range(i):
            if completions[j] == text and preference[j] != value:
                raise DataError(
                    f"{place}: {fields[j]!r} and {fields[i]!r} are equal ({shown(_content(text))}), "
                    f"so neither can be preferred: {_REMEDY}."
                )

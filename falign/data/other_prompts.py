"""Other prompts of the same rows, behind which a reference scores the completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from falign.data.chat_template import TemplateInputs, Tokenizer
from falign.data.conversations import Text
from falign.data.examples import Example
from falign.data.prompts import PromptRow, filled
from falign.data.tokenization import Tokenized, encode_prompt
from falign.errors import DataError

__all__ = ["OtherPrompts"]


@dataclass
class OtherPrompts:
    r"""The prompt of each row under another template.

    Attributes:
        template: Text with the row's columns in braces. It takes the place of a plain prompt, or of the last turn of a
            conversation, whose other turns stay; ``{prompt}`` is what it replaces.
        tokenizer: The policy's tokenizer.
        ids: Token ids, by the place of the row and the ids of its own prompt.
        longest: Tokens of the longest one together with its longest completion.
        place: The row of the longest one.

    Example:
        >>> OtherPrompts("{question}\nReference solution: {solution}", tokenizer).template  # doctest: +SKIP
    """

    template: str
    tokenizer: Tokenizer
    ids: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = field(default_factory=dict)
    longest: int = 0
    place: str = ""

    def add_example(self, example: Example, tokenized: Tokenized) -> None:
        """Add the row of given completions.

        Args:
            example: The row as text.
            tokenized: The row as tokens.

        Raises:
            DataError: The row lacks a column, or its completions cannot follow another prompt.
        """
        assert tokenized.tree is not None
        tree = tokenized.tree
        ids = self._encoded(example.prompt, example.columns, example.place, example.inputs)
        if tokenized.drifting_tokens:
            # The completions begin with tokens that the prompt alone ends with, or that replace those.
            alone = encode_prompt(example.prompt, self.tokenizer, example.place, inputs=example.inputs)
            end = alone[len(alone) - tokenized.drifting_tokens :]
            if ids[len(ids) - len(end) :] != end or len(end) >= len(ids):
                raise DataError(
                    f"{example.place}: the completion begins with a token that contains the end of its prompt, so it "
                    f"cannot follow the prompt {self.template!r}: end both prompts in the same way, such as with a "
                    "line break, or use the chat template."
                )
            ids = ids[: len(ids) - len(end)]
        self._add(tree.place, tree.prompt_ids, ids, max(map(len, tree.completion_ids)))

    def add_prompt(self, row: PromptRow, *, max_new_tokens: int) -> None:
        """Add the row of a prompt, after which completions are sampled.

        Args:
            row: The row.
            max_new_tokens: Largest number of tokens of a completion.

        Raises:
            DataError: The row lacks a column.
        """
        self._add(
            row.place, row.prompt_ids, self._encoded(row.prompt, row.columns, row.place, row.inputs), max_new_tokens
        )

    def _encoded(self, prompt: Text, columns: Mapping[str, Any], place: str, inputs: TemplateInputs) -> tuple[int, ...]:
        last = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        text = filled(self.template, {**columns, "prompt": last}, place)
        turns: Text = text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]
        return encode_prompt(turns, self.tokenizer, place, inputs=inputs)

    def _add(self, place: str, own: Sequence[int], other: tuple[int, ...], completion_tokens: int) -> None:
        if self.ids.setdefault((place, tuple(own)), other) != other:
            raise DataError(
                f"{place}: two rows have this place and the same prompt, but different prompts {self.template!r}: give "
                "the sources different names."
            )
        if len(other) + completion_tokens > self.longest:
            self.longest, self.place = len(other) + completion_tokens, place

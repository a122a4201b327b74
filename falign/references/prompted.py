"""A reference that scores the completions behind another prompt."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from falign.errors import DataError, ModelError
from falign.objectives import TokenWeighting
from falign.references.base import Reference
from falign.scoring import LAYOUTS, CompletionStates, PromptTree, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompted"]


class Prompted(Reference):
    """``π_k(y | x')`` with another prompt x' for each row: a context, or a solution that the policy does not see.

    The completions keep their token ids, and each of their tokens is predicted after x' in place of x.

    Args:
        reference: The model, or combination, behind the other prompt; a reference inside the policy shares its weights.
        prompts: The ids of x', by the place of the row and the ids of its prompt x.
        template: The template of x', for the record.

    Source:
        Context distillation: Askell et al. (arXiv:2112.00861), Section 2.2; Snell et al. (arXiv:2209.15189).

    Example:
        >>> prompts = {("rows:1", (5, 6)): (9, 5, 6)}
        >>> teacher = Prompted(AdapterOff(), prompts, template="{hint}{prompt}")  # doctest: +SKIP
    """

    def __init__(
        self,
        reference: Reference,
        prompts: Mapping[tuple[str, tuple[int, ...]], tuple[int, ...]],
        *,
        template: str,
    ) -> None:
        self.reference = reference
        self.prompts = prompts
        self.template = template
        self.moves, self.every, self.cannot_shard = reference.moves, reference.every, reference.cannot_shard

    @property
    @override
    def own_model(self) -> nn.Module | None:
        return self.reference.own_model

    @property
    @override
    def members(self) -> Mapping[str, Reference]:
        return self.reference.members

    @property
    @override
    def reads_whole(self) -> bool:
        return self.reference.reads_whole

    @property
    @override
    def normalized(self) -> bool:
        return self.reference.normalized

    @override
    def with_members(self, members: Mapping[str, Reference]) -> Prompted:
        return self._with(self.reference.with_members(members))

    @override
    def with_cache(
        self, make: Callable[[Reference, Sequence[PromptTree]], Reference], trees: Sequence[PromptTree]
    ) -> Prompted:
        # The cached values are those of x' and the completion, whatever the row's own prompt.
        return self._with(make(self.reference, [self.tree(tree) for tree in trees]))

    @override
    def identity(self) -> dict[str, Any]:
        rows = sorted([place, *own, -1, *other] for (place, own), other in self.prompts.items())
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return {**self.reference.identity(), "prompt": self.template, "prompts": digest}

    @override
    def logprobs(self, policy_model: nn.Module, batch: TokenBatch) -> Float[Tensor, "N T"]:
        return self.reference.logprobs(policy_model, self.batch(batch))

    @override
    def states(
        self, policy_model: nn.Module, batch: TokenBatch, *, weighting: TokenWeighting = "none"
    ) -> CompletionStates:
        return self.reference.states(policy_model, self.batch(batch), weighting=weighting)

    def tree(self, tree: PromptTree) -> PromptTree:
        """Return a row behind its other prompt.

        Args:
            tree: The row with its own prompt.

        Raises:
            DataError: The row has no other prompt.
        """
        other = self.prompts.get((tree.place, tree.prompt_ids))
        if other is None:
            raise DataError(
                f"{tree.place or 'a row without a place'}: there is no prompt {self.template!r} of this row, because "
                "its columns were not read: score rows of the run's own data, or give a reference without prompt."
            )
        return replace(tree, prompt_ids=other)

    def batch(self, batch: TokenBatch) -> TokenBatch:
        """Return a batch behind the other prompts, in its layout and on its device.

        Args:
            batch: The rows with their own prompts.

        Returns:
            The same completions in the same order.

        Raises:
            DataError: A row has no other prompt.
        """
        rows, trees, n = batch.input_ids.tolist(), [], 0
        for span in batch.spans:
            row, begin = rows[span.row], span.start + span.prompt_length
            completions, end = [], begin
            for length in span.completion_lengths:
                completions.append(tuple(row[end : end + length]))
                end += length
            counted = tuple(own or (True,) * len(ids) for own, ids in zip(span.counted, completions, strict=True))
            own = PromptTree(tuple(row[span.start : begin]), tuple(completions), place=batch.place[n], counted=counted)
            trees.append(self.tree(own))
            n += len(completions)
        layout = LAYOUTS["tree" if batch.attention_mask is None else "padded"]
        return layout(trees, pad_token_id=0).to(batch.input_ids.device)

    @override
    def acting(self, policy_model: nn.Module) -> AbstractContextManager[nn.Module]:
        raise ModelError(
            f"A reference behind the prompt {self.template!r} cannot generate completions of the policy's prompts: use "
            "a reference without prompt."
        )

    @override
    def check_fits(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
        return self.reference.check_fits(tokenizer, vocabulary)

    @override
    def check_length(self, longest: int, *, place: str) -> None:
        pass  # it does not read the run's prompts, and its own were measured when it was built

    @override
    def check_rollouts(self, *, place: str, updates: int) -> None:
        self.reference.check_rollouts(place=place, updates=updates)

    @override
    def move(self, policy_model: nn.Module, step: int, optimizer: Any) -> None:
        self.reference.move(policy_model, step, optimizer)

    @override
    def observe(self, metrics: Mapping[str, float]) -> None:
        self.reference.observe(metrics)

    @override
    def save(self, folder: Path, policy_model: nn.Module) -> None:
        self.reference.save(folder, policy_model)

    @override
    def load(self, folder: Path, policy_model: nn.Module) -> None:
        self.reference.load(folder, policy_model)

    @override
    def metrics(self) -> dict[str, float]:
        return self.reference.metrics()

    def _with(self, reference: Reference) -> Prompted:
        made = copy.copy(self)
        made.reference = reference
        return made

"""Rows of scores of prompt trees under a policy, its reference and its objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NotRequired

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from falign.errors import ConfigError, ModelError
from falign.models.tokenizers import check_token_rows
from falign.objectives import BaseObjective, reference_names
from falign.references import REFERENCE, Reference, objective_inputs
from falign.scoring import (
    LayoutChoice,
    PromptTree,
    Scorer,
    TokenBatch,
    choose_layout,
    evaluation_mode,
    without_wrapper,
)
from falign.scoring.batch import token_rows

__all__ = ["CompletionScorer", "ScoreRow", "check_finite", "check_rows", "choose_common_layout", "plain_floats"]


class ScoreRow(TypedDict):
    """The scores of one completion, as plain values; lists have one value per token, logs are in nats.

    Attributes:
        place: The row of the source, as in ``pairs.jsonl:12``.
        completion: Index of the completion within the row, from 0.
        preference: Larger is preferred within the row; None if the source has none.
        num_tokens: Tokens of the completion, its stop token included.
        token_ids: Their ids.
        text_sha256: Hash of the text of prompt and completion, by :func:`falign.data.samples.text_sha256`.
        logprobs: log π.
        reference_logprobs: log π_ref.
        log_ratios: log π - log π_ref.
        log_ratio: Their sum.
        implicit_reward: The reward that the objective defines.
        entropy: Entropy of the policy's distribution.
        token_divergence: D_f between the policy's and the reference's distributions, for token-level objectives.
    """

    place: str
    completion: int
    preference: float | None
    num_tokens: int
    token_ids: list[int]
    text_sha256: NotRequired[str]
    logprobs: list[float]
    reference_logprobs: list[float]
    log_ratios: list[float]
    log_ratio: float
    implicit_reward: float
    entropy: list[float]
    token_divergence: NotRequired[list[float]]


@dataclass(frozen=True, kw_only=True)
class CompletionScorer:
    """Scores completions under a policy, its references and its objective, without gradient and dropout.

    Attributes:
        policy: The model, on the device to compute on.
        reference: The reference that it is compared with.
        objective: The objective that defines the implicit reward, and the measure ``divergence`` if there is one.
        scorer: A scorer with a layout that the policy and the references' models can read.
        references: Further references, by the names under which the objective reads them.
        reward_head: The head of a reward model, for objectives that read ``learned_rewards``.

    Raises:
        ConfigError: The objective reads a reference that is missing.
    """

    policy: nn.Module
    reference: Reference
    objective: BaseObjective
    scorer: Scorer
    references: Mapping[str, Reference] = field(default_factory=dict)
    reward_head: nn.Module | None = None

    def __post_init__(self) -> None:
        given = {REFERENCE, *self.references}
        if missing := sorted(self._read - given):
            raise ConfigError(
                f"The objective or its measures read the reference {missing[0]!r}, and the scorer has "
                f"{', '.join(sorted(given))}: give it under this name in `references`."
            )

    @property
    def _read(self) -> frozenset[str]:
        """The names of the references that the objective and its measures read."""
        return reference_names(self.objective.needs, self.objective.measures)

    def score(self, trees: Sequence[PromptTree]) -> list[list[ScoreRow]]:
        """Return the rows of each tree, one per completion.

        Args:
            trees: The trees of one batch.

        Raises:
            ModelError: A value is NaN or infinite, or a token id has no row in the policy's embeddings.
        """
        check_rows(self.policy, trees)
        # A batch needs preferences for all trees or none. They affect no score, so they are copied from trees to rows.
        bare = [replace(tree, preference=None) for tree in trees]
        batch = self.scorer.lay_out(bare, model=self.policy)
        with torch.no_grad(), evaluation_mode(self.policy):
            known = {}
            if REFERENCE not in self._read:  # the rows have its log-probabilities, whatever the objective reads
                known["reference_logprobs"] = self.reference.logprobs(self.policy, batch)
            scored = objective_inputs(
                self.policy,
                batch,
                references={**self.references, REFERENCE: self.reference},
                objective=self.objective,
                chunk_tokens=self.scorer.chunk_tokens,
                columns=known,
                reward_head=self.reward_head,
            )
            completions, log_ratios = scored.completions, scored.completions.log_ratio
            per_token = {
                "logprobs": completions.logprobs,
                "reference_logprobs": completions.reference_logprobs,
                "log_ratios": log_ratios,
                "entropy": scored.entropy,
                "token_divergence": completions.measures.get("divergence"),
            }
            per_completion = {
                "log_ratio": completions.sequence_sum(log_ratios),
                "implicit_reward": self.objective.completion_rewards(completions),
            }
        lists = {name: _lists(values, batch, name) for name, values in per_token.items() if values is not None}
        numbers = {name: _numbers(values, batch, name) for name, values in per_completion.items()}
        rows: list[list[ScoreRow]] = []
        n = 0
        for tree in trees:
            rows.append([])
            for i, ids in enumerate(tree.counted_ids):
                row: ScoreRow = {
                    "place": tree.place,
                    "completion": i,
                    "preference": None if tree.preference is None else float(tree.preference[i]),
                    "num_tokens": len(ids),
                    "token_ids": list(ids),
                    "logprobs": lists["logprobs"][n],
                    "reference_logprobs": lists["reference_logprobs"][n],
                    "log_ratios": lists["log_ratios"][n],
                    "log_ratio": numbers["log_ratio"][n],
                    "implicit_reward": numbers["implicit_reward"][n],
                    "entropy": lists["entropy"][n],
                }
                if tree.text_sha256:
                    row["text_sha256"] = tree.text_sha256[i]
                if "token_divergence" in lists:
                    row["token_divergence"] = lists["token_divergence"][n]
                rows[-1].append(row)
                n += 1
        return rows


def choose_common_layout(
    models: Sequence[nn.Module],
    trees: Sequence[PromptTree],
    *,
    pad_token_id: int,
    wanted: Literal["auto", "tree", "padded"] = "auto",
) -> LayoutChoice:
    """Return a layout that all models can read, after a test on the two longest trees with several completions.

    Args:
        models: The policy, and the references' own models.
        trees: Some of the trees to score.
        pad_token_id: Any valid id.
        wanted: See :func:`falign.scoring.choose_layout`.

    Raises:
        ConfigError: Trees are wanted, and a model cannot read them.
    """
    longest = sorted(trees, key=lambda tree: (len(tree.completion_ids) > 1, tree.num_tokens))[-2:]
    bare = [replace(tree, preference=None) for tree in longest]
    try:
        choices = [choose_layout(model, bare, pad_token_id=pad_token_id, wanted=wanted) for model in models]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return next((choice for choice in choices if choice.layout == "padded"), choices[0])


def check_rows(model: nn.Module, trees: Sequence[PromptTree]) -> None:
    """Refuse token ids that have no row in the model's embeddings.

    Raises:
        ModelError: The message has the first such token and its place.
    """
    language_model: Any = without_wrapper(model)
    check_token_rows(
        token_rows(trees),
        num_rows=language_model.get_input_embeddings().num_embeddings,
        model=language_model.name_or_path or type(language_model).__name__,
    )


def _lists(values: Tensor, batch: TokenBatch, name: str) -> list[list[float]]:
    check_finite(values, batch, name)
    rows = zip(values.cpu(), batch.completion_mask.cpu(), strict=True)
    return [plain_floats(row[mask]) for row, mask in rows]


def _numbers(values: Tensor, batch: TokenBatch, name: str) -> list[float]:
    check_finite(values[:, None], batch, name)
    return plain_floats(values)


def check_finite(values: Tensor, batch: TokenBatch, name: str) -> None:
    """Refuse scores that are NaN or infinite.

    Args:
        values: Shape (N, T).
        batch: Has the place of each row.
        name: Name of the scores in the message.

    Raises:
        ModelError: A value is NaN or infinite; the message has its row and token.
    """
    bad = ~values.isfinite()
    if bad.any():
        row, column = (int(index) for index in bad.nonzero()[0])
        raise ModelError(
            f"{batch.place[row]}: {name} is {values[row, column].item()} (completion token {column + 1}). Check the "
            "weights and the dtype of policy and reference, or remove the row; scores of earlier rows are kept."
        )


def plain_floats(values: Tensor) -> list[float]:
    """Return the values of a vector, rounded to nine digits: enough to restore any 32-bit float exactly.

    Example:
        >>> import torch
        >>> plain_floats(torch.tensor([0.1]))
        [0.100000001]
    """
    return [float(f"{value:.9g}") for value in values.tolist()]

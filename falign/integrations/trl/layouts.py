"""How a batch of TRL is scored: by TRL's own forward passes, or as prompt trees by falign's chunked head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from trl.trainer import utils as trl_utils

from falign.errors import ConfigError, DataError
from falign.integrations.trl.batch_forms import OWN_ROWS, BatchForm, spread
from falign.objectives import CompletionBatch, Objective
from falign.objectives.batch import REFERENCE
from falign.references import ObjectiveInputs, Reference, completion_batch, objective_inputs
from falign.scoring import PromptTree, Scorer, TokenBatch, check_head, choose_layout

__all__ = ["OwnRows", "Scored", "ScoringLayout", "Trees"]

FUSED = "add_fused_lm_head" in dir(trl_utils)
"""Whether this TRL patches a fused head into its models; before 1.15 they return logits."""


class Scored(NamedTuple):
    """A scored batch.

    Attributes:
        completions: The objective's argument.
        outputs: The return value of TRL's ``compute_loss``, if it ran; it has logged TRL's metrics then.
        entropy: Entropy of the policy at each completion token, nats, shape (M,), if TRL did not log it.
        aux_loss: The load-balancing loss of a mixture of experts, if it is trained.
    """

    completions: CompletionBatch
    outputs: Any = None
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None


@runtime_checkable
class ScoringLayout(Protocol):
    """One way of scoring TRL's batches."""

    def fields(self, inputs: Mapping[str, Any]) -> CompletionBatch:
        """Return the completions with zeros in place of log-probabilities, before any forward pass."""
        ...

    def score(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        objective: Objective,
        run_trl: Callable[[], Any],
        columns: Mapping[str, Tensor],
    ) -> Scored:
        """Return the scores of a batch for the loss.

        Args:
            model: The policy, perhaps in a wrapper.
            inputs: The batch, on the model's device.
            objective: Its needs and measures determine what is computed.
            run_trl: Runs TRL's ``compute_loss`` on the batch.
            columns: Known fields of the completions.
        """
        ...

    def score_rows(self, inputs: Mapping[str, Any], objective: Objective, rows: str) -> CompletionBatch:
        """Return the scores of the batch's own or mismatched rows, without gradient."""
        ...


@dataclass(frozen=True)
class OwnRows:
    """TRL's rows, log-probabilities and reference.

    Attributes:
        form: Order and meaning of the rows.
        policy: The policy, without wrapper.
        reference_model: TRL's separate reference; None for one inside the policy, or a precomputed one.
        acting: Returns a context in which the returned model is TRL's reference; not called if it is precomputed.
        precomputed: Read the reference's sums from the batch.
    """

    form: BatchForm
    policy: nn.Module
    reference_model: nn.Module | None
    acting: Callable[[], AbstractContextManager[nn.Module]]
    precomputed: bool

    def fields(self, inputs: Mapping[str, Any]) -> CompletionBatch:
        """Return the rows; a position is a completion token if the one before predicts it."""
        mask = inputs["completion_mask"][:, 1:].bool()
        if not mask.any(dim=-1).all():
            row = int((~mask.any(dim=-1)).nonzero()[0])
            raise DataError(
                f"Row {row + 1} of a batch has no completion token that a token before predicts: leave such examples "
                "out of the dataset, or raise max_length."
            )
        return self._completions(inputs, torch.zeros(mask.shape, device=mask.device), {})

    def score(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        objective: Objective,
        run_trl: Callable[[], Any],
        columns: Mapping[str, Tensor],
    ) -> Scored:
        """Run TRL's ``compute_loss`` and read the log-probabilities of its forward passes, in place of its loss."""
        modules = [each for each in (model, self.policy, self.reference_model) if each is not None]
        with _recorded(*modules) as outputs:
            returned = run_trl()
        found = dict(columns)
        # The policy runs first; a reference inside the policy runs after it, with adapters switched.
        policy = outputs[model][0]
        logprobs = _logprobs(policy, inputs)
        if "reference_logprobs" in objective.needs and not self.precomputed:
            reference = outputs[self.policy if self.reference_model is None else self.reference_model][-1]
            found["reference_logprobs"] = _logprobs(reference, inputs)
        aux_loss = policy.aux_loss if "aux_loss" in policy else None
        return Scored(self._completions(inputs, logprobs, found), returned, aux_loss=aux_loss)

    def score_rows(self, inputs: Mapping[str, Any], objective: Objective, rows: str) -> CompletionBatch:
        """Run the policy, and the reference if it is needed."""
        found = {}
        if "reference_logprobs" in objective.needs and not self.precomputed:
            with self.acting() as reference:
                found["reference_logprobs"] = _forward(reference, inputs, rows)
        return self._completions(inputs, _forward(self.policy, inputs, rows), found, rows)

    def _completions(
        self,
        inputs: Mapping[str, Any],
        logprobs: Float[Tensor, "N T"],
        found: Mapping[str, Tensor],
        rows: str = OWN_ROWS,
    ) -> CompletionBatch:
        mask = inputs[f"{rows}completion_mask"][:, 1:].bool()
        given = dict(found)
        if self.precomputed:
            given["reference_logprobs"] = spread(self.form.reference_sums(inputs, rows), mask)
        return CompletionBatch.of(
            {
                "logprobs": logprobs,
                "completion_mask": mask,
                "prompt_index": self.form.prompt_index(inputs),
                "preference": self.form.preference(inputs),
                **given,
            }
        )


@contextmanager
def _recorded(*modules: nn.Module) -> Iterator[dict[nn.Module, list[Any]]]:
    """Record the outputs of modules, each in the order of its calls."""
    outputs: dict[nn.Module, list[Any]] = {module: [] for module in modules}
    hooks = [
        module.register_forward_hook(lambda called, _, output: outputs[called].append(output)) for module in outputs
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _forward(model: nn.Module, inputs: Mapping[str, Any], rows: str) -> Float[Tensor, "N T"]:
    """Return the log-probabilities of a batch's rows, as TRL's trainers compute them."""
    ids, mask = inputs[f"{rows}input_ids"], inputs[f"{rows}completion_mask"]
    further = {"labels": ids.masked_fill(mask == 0, -100), "fused_lm_head": True} if FUSED else {}
    outputs = model(input_ids=ids, attention_mask=inputs[f"{rows}attention_mask"], use_cache=False, **further)
    return _logprobs(outputs, inputs, rows)


def _logprobs(outputs: Any, inputs: Mapping[str, Any], rows: str = OWN_ROWS) -> Float[Tensor, "N T"]:
    """Return the log-probabilities of an output of TRL's forward pass; 0 where masked."""
    targets, mask = inputs[f"{rows}input_ids"][:, 1:], inputs[f"{rows}completion_mask"][:, 1:].bool()
    # Prompt-learning adapters put virtual tokens before the real ones.
    if FUSED:
        return outputs.log_probs[:, -targets.shape[1] :]
    logits = outputs.logits[:, :-1][:, -targets.shape[1] :]
    return trl_utils.selective_log_softmax(logits, targets).masked_fill(~mask, 0.0)


@dataclass(frozen=True)
class Trees:
    """Prompt trees, or padded rows, scored by :func:`falign.references.objective_inputs`.

    Attributes:
        form: Order and meaning of the rows.
        policy: The policy, without wrapper.
        scorer: Writes trees into rows.
        references: References by name.
        precomputed: Read the sums of the one named ``reference`` from the batch.
    """

    form: BatchForm
    policy: nn.Module
    scorer: Scorer
    references: Mapping[str, Reference]
    precomputed: bool

    def fields(self, inputs: Mapping[str, Any]) -> CompletionBatch:
        """Return the completions in the order of the trees."""
        batch = self._batch(inputs, OWN_ROWS)
        zeros = torch.zeros(batch.completion_mask.shape, device=batch.completion_mask.device)
        return completion_batch(batch, zeros, self._known(inputs, batch, OWN_ROWS))

    def score(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        objective: Objective,
        run_trl: Callable[[], Any],
        columns: Mapping[str, Tensor],
    ) -> Scored:
        """Score the trees; TRL's ``compute_loss`` does not run."""
        scores = self._scores(inputs, objective, OWN_ROWS, columns, wrapped=model)
        return Scored(scores.completions, entropy=scores.entropy[scores.completions.completion_mask])

    def score_rows(self, inputs: Mapping[str, Any], objective: Objective, rows: str) -> CompletionBatch:
        """Score the trees of the own or mismatched rows."""
        return self._scores(inputs, objective, rows, {}, wrapped=self.policy).completions

    def try_on(self, inputs: Mapping[str, Any], objective: Objective) -> None:
        """Refuse a model whose head is not read correctly, or that a reference cannot be computed from.

        Args:
            inputs: A batch of one or two examples.
            objective: The objective, without schedules.

        Raises:
            ConfigError: The model cannot read trees.
            ModelError: Another check of falign fails.
        """
        tree = self.form.trees(inputs)[0]
        check_head(self.policy, tree.prompt_ids + tree.completion_ids[0])
        try:
            choose_layout(self.policy, [tree], pad_token_id=self.scorer.pad_token_id, wanted=self.scorer.layout)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        with torch.no_grad():
            self.score(self.policy, inputs, objective, lambda: None, {})

    def _scores(
        self,
        inputs: Mapping[str, Any],
        objective: Objective,
        rows: str,
        columns: Mapping[str, Tensor],
        *,
        wrapped: nn.Module,
    ) -> ObjectiveInputs:
        batch = self._batch(inputs, rows)
        return objective_inputs(
            self.policy,
            batch,
            references=self.references,
            objective=objective,
            chunk_tokens=self.scorer.chunk_tokens,
            wrapped=wrapped,
            columns={**columns, **self._known(inputs, batch, rows)},
        )

    def _batch(self, inputs: Mapping[str, Any], rows: str) -> TokenBatch:
        trees: list[PromptTree] = self.form.trees(inputs, rows)
        return self.scorer.lay_out(trees).to(inputs["input_ids"].device)

    def _known(self, inputs: Mapping[str, Any], batch: TokenBatch, rows: str) -> dict[str, Tensor]:
        if not self.precomputed:
            return {}
        order: Int[Tensor, " N"] = self.form.order(inputs)
        return {f"{REFERENCE}_logprobs": spread(self.form.reference_sums(inputs, rows)[order], batch.completion_mask)}

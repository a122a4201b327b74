"""Loading of what completions are scored by: a run with its references and objective, or one or two models."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from falign.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from falign.data import Window
    from falign.evaluation import CompletionScorer
    from falign.models.heads import RewardHead
    from falign.objectives import BaseObjective
    from falign.references import Reference
    from falign.runfile import RunConfig
    from falign.runs import RunFolder
    from falign.runs.loading import Given
    from falign.scoring import LayoutChoice, PromptTree, Scorer

__all__ = ["Scored", "load_alone", "load_compared", "load_run", "positions_of", "run_objective"]


class Scored(NamedTuple):
    """A policy with everything that its scores depend on besides the data.

    Attributes:
        policy: The model, on the device to compute on.
        tokenizer: The policy's tokenizer.
        reference: The reference that the policy is compared with; None if it is scored alone.
        objective: The objective that defines the implicit reward; a substitute if the run's own defines none.
        window: Maximum lengths, and the handling of longer rows.
        chunk_tokens: Positions whose logits are computed at once.
        record: Values that identify these, by name.
        rewarding: Whether the objective is the run's own, and not a substitute.
        references: Further references that the objective reads, by name.
        reward_head: The head of a reward model, if the run has trained one.
    """

    policy: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    reference: Reference | None
    objective: BaseObjective
    window: Window
    chunk_tokens: int
    record: dict[str, Any]
    rewarding: bool = True
    references: Mapping[str, Reference] = {}
    reward_head: RewardHead | None = None

    def models(self) -> list[Any]:
        """Return the policy, and the models of those references that have their own."""
        references = [*([] if self.reference is None else [self.reference]), *self.references.values()]
        own = [model for each in references if (model := each.own_model) is not None]
        return [self.policy, *own]

    def scorer(self, trees: Sequence[PromptTree], *, layout: Any) -> tuple[CompletionScorer, LayoutChoice]:
        """Check the models on the first trees, and return a scorer under policy, references and objective.

        Arguments and errors are those of :meth:`choose_scorer`.
        """
        from falign.evaluation import CompletionScorer

        scorer, choice = self.choose_scorer(trees, layout=layout)
        assert self.reference is not None
        compared = CompletionScorer(
            policy=self.policy,
            reference=self.reference,
            objective=self.objective,
            scorer=scorer,
            references=self.references,
            reward_head=self.reward_head,
        )
        return compared, choice

    def choose_scorer(self, trees: Sequence[PromptTree], *, layout: Any) -> tuple[Scorer, LayoutChoice]:
        """Check the models on the first trees, and return a scorer of log-probabilities and the reason for its layout.

        Args:
            trees: The first trees of the source.
            layout: ``auto``, ``tree`` or ``padded``.

        Raises:
            ConfigError: The window is longer than a model's positions, or a model cannot read the layout.
            ModelError: The scores differ from those of the model's own logits.
        """
        from falign.evaluation import choose_common_layout
        from falign.evaluation.completion_scorer import check_rows
        from falign.models.tokenizers import pad_token_id
        from falign.scoring import Scorer

        check_rows(self.policy, trees)
        self._check(trees[0].prompt_ids + trees[0].completion_ids[0])
        pad_id = pad_token_id(self.tokenizer)
        choice = choose_common_layout(self.models(), trees, pad_token_id=pad_id, wanted=layout)
        return Scorer(choice.layout, pad_id, self.chunk_tokens), choice

    def _check(self, token_ids: Sequence[int]) -> None:
        from falign.models import base_of
        from falign.scoring import check_head

        for model in self.models():
            positions = positions_of(model)
            if positions is not None and self.window.max_length > positions:
                raise ConfigError(
                    f"max_length={self.window.max_length} is more than the {positions} positions of "
                    f"{base_of(model).name_or_path}: lower it."
                )
            check_head(model, token_ids)


def load_run(
    path: str,
    *,
    max_length: int | None,
    any_objective: bool = False,
    references: Collection[str] | None = None,
    checkpoint: int | None = None,
    given: Given | None = None,
    trust_code: bool = False,
) -> Scored:
    """Load a run as it was trained: its policy, reference, objective and window.

    Args:
        path: The run folder.
        max_length: The window, if not the run's own.
        any_objective: Accept a run whose objective defines no implicit reward; log-ratios take its place.
        references: Names of the references to load; by default ``reference`` and those that the objective reads.
        checkpoint: The step of a checkpoint to load instead of the last weights.
        given: Objects that replace sections of the run file.
        trust_code: Whether code that the run folder names may run.

    Raises:
        ConfigError: The run is not finished, names code that is not trusted, has no reference of a needed name, or its
            objective defines no implicit reward although one is needed.
        ModelError: A model is missing, or not the one of the training.
    """
    from falign.methods import FDPO
    from falign.models import model_identity, weights_hash
    from falign.objectives import reference_names
    from falign.references import REFERENCE
    from falign.runs import RunFolder
    from falign.runs.loading import checkpoint_folder, load_trained
    from falign.training.references import rebuild_references
    from falign.training.trainer import state_folder

    folder = RunFolder.open(path)
    objective = run_objective(path, given=given, trust_code=trust_code)
    if not objective.rewarding and not any_objective:
        kind = folder.read_settings()["objective"]["kind"]
        raise ConfigError(
            f"{path}: objective.kind={kind} defines no implicit reward to score by: export the run as a merged model, "
            "and score that with reference=MODEL and a divergence of your choice."
        )
    objective, rewarding = (objective, True) if objective.rewarding else (FDPO("reverse_kl", 1.0), False)
    if references is None:
        references = {REFERENCE, *reference_names(objective.needs, objective.measures)}
    _require_main_reference(folder, references)
    trained = load_trained(folder, checkpoint, given=given, trust_code=trust_code)
    policy, tokenizer, config = trained.model, trained.tokenizer, trained.config
    config = config if given is None else given.in_place(config, path=folder.path)
    policy.to(_device())  # pyright: ignore[reportArgumentType]
    rebuilt = rebuild_references(config, policy, tokenizer, folder, device=_device(), names=references)
    if checkpoint is not None:
        for name, each in rebuilt.items():
            each.load(state_folder(checkpoint_folder(folder, checkpoint), name), policy)
    window = _window(config)
    if config.adapter is None:
        identity = model_identity(policy)
    else:
        identity = {**model_identity(policy), "adapter": weights_hash(policy, adapter="default")}
    if trained.reward_head is not None:
        trained.reward_head.to(_device())
        identity |= {"reward_head": trained.reward_head.content_hash}
    reference = rebuilt.pop(REFERENCE, None)
    record = _record(identity, reference, config.objective.model_dump(mode="json"))
    for name, each in sorted(rebuilt.items()):
        record |= {f"references.{name}.{key}": value for key, value in each.identity().items()}
    return Scored(
        policy,
        tokenizer,
        reference,
        objective,
        window if max_length is None else replace(window, max_length=max_length),
        config.training.chunk_tokens,
        record,
        rewarding,
        rebuilt,
        trained.reward_head,
    )


def _require_main_reference(folder: RunFolder, references: Collection[str]) -> None:
    """Refuse a run that has references of other names only, if the one named ``reference`` is needed."""
    from falign.references import REFERENCE
    from falign.runs.named_code import read_run

    sections = read_run(folder, uses=[], trust_code=False).reference_sections()
    if REFERENCE in references and REFERENCE not in sections:
        raise ConfigError(
            f"{folder.path} has no reference named {REFERENCE!r} to compare the policy with; {folder.run_file} names "
            f"{', '.join(sorted(sections))} under references: export the run as a merged model, and score that with "
            "reference=MODEL."
        )


def load_compared(
    path: str, *, reference: str, divergence: str | None, beta: float | None, dtype: str, max_length: int | None
) -> Scored:
    """Load two models, one to score and one to compare it with, under f-DPO's implicit reward.

    Args:
        path: The policy.
        reference: The model to compare it with.
        divergence: Name of f; ``reverse_kl`` if None.
        beta: β; 0.1 if None.
        dtype: Data type of both models.
        max_length: The window; 1024 if None.

    Raises:
        ConfigError: f or β defines no implicit reward, or the two models have different tokens.
        ModelError: A model is missing.
    """
    from falign.data import Window
    from falign.methods import FDPO
    from falign.models import load_model, load_tokenizer, model_identity
    from falign.models.heads import share_head
    from falign.models.tokenizers import check_same_tokens
    from falign.references import FrozenModel
    from falign.scoring import DEFAULT_CHUNK_TOKENS

    divergence, beta = "reverse_kl" if divergence is None else divergence, 0.1 if beta is None else beta
    try:
        objective = FDPO(divergence, beta)
    except ValueError as error:
        raise ConfigError(f"divergence={divergence} beta={beta:g}: {error}") from error
    tokenizer, other = load_tokenizer(path), load_tokenizer(reference)
    check_same_tokens(tokenizer, other, f"{path} and {reference}")
    policy = load_model(path, dtype=dtype, device=_device())
    frozen = load_model(reference, dtype=dtype, device=_device())
    identity = model_identity(frozen)
    against = FrozenModel(frozen, weights=identity["weights"], config=identity["config"])
    share_head(policy, frozen)
    settings = {"kind": "pairwise", "divergence": objective.divergence.name, "beta": beta}
    return Scored(
        policy,
        tokenizer,
        against,
        objective,
        Window(1024 if max_length is None else max_length),
        DEFAULT_CHUNK_TOKENS,
        _record(model_identity(policy), against, settings),
    )


def load_alone(path: str, *, dtype: str, max_length: int | None) -> Scored:
    """Load a model without a reference.

    Args:
        path: The policy.
        dtype: Data type of the model.
        max_length: The window; 1024 if None.

    Raises:
        ModelError: The model is missing.
    """
    from falign.data import Window
    from falign.methods import FDPO
    from falign.models import load_model, load_tokenizer, model_identity
    from falign.scoring import DEFAULT_CHUNK_TOKENS

    tokenizer = load_tokenizer(path)
    policy = load_model(path, dtype=dtype, device=_device())
    return Scored(
        policy,
        tokenizer,
        None,
        FDPO("reverse_kl", 1.0),
        Window(1024 if max_length is None else max_length),
        DEFAULT_CHUNK_TOKENS,
        _record(model_identity(policy), None, {}),
        rewarding=False,
    )


def run_objective(path: str, *, given: Given | None = None, trust_code: bool = False) -> BaseObjective:
    """Return the objective of a run as its run file defines it, without values that training fits on samples.

    Args:
        path: The run folder.
        given: Objects in memory that replace sections of the run file.
        trust_code: Whether code that the run folder names (module:Name) may be imported.

    Raises:
        ConfigError: The run is missing, its run file is damaged, or it names code that is not trusted or has changed.
    """
    from falign.objectives import complete
    from falign.runs import RunFolder
    from falign.runs.named_code import import_from, named_code, own_code, read_run

    folder = RunFolder.open(path)
    uses = ["objective", "reference", "references"]
    config = read_run(folder, uses=uses, trust_code=trust_code)
    if code := {field: value for field, value in named_code(config, uses).items() if ":" in value}:
        import_from(Path.cwd())
        recorded = folder.read_inputs()["hashes"]["objective_code"]
        if any(recorded.get(name) != hashes for name, hashes in own_code(config, {*uses}).items()):
            field, value = next(iter(code.items()))
            raise ConfigError(
                f"{path} was trained with another version of {field}={value}, so its rewards would change: restore the "
                "module, and start in its folder."
            )
    objective = complete((config if given is None else given.in_place(config, path=folder.path)).check())
    # With the coefficients that the trained model has come to.
    logs = folder.metrics()
    names = {f"coefficients/{path}": path for path in objective.controllers}
    last = {path: log[name] for log in logs for name, path in names.items() if name in log}
    return objective.controlled(last).at(max((log["step"] for log in logs), default=0))


def positions_of(model: Any) -> int | None:
    """Return the number of positions of a model; None if its configuration names none."""
    from falign.models import base_of

    positions = getattr(base_of(model).config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def _window(config: RunConfig) -> Window:
    """Return the window of a run's completions: that of its data, or that of its rollouts."""
    from falign.data import Window

    data = config.data
    if data is not None:
        return data.window
    assert config.prompts is not None, "a run has data or prompts"
    return Window(config.prompts.max_length + config.rollout.max_new_tokens)


def _record(policy: dict[str, Any], reference: Reference | None, objective: dict[str, Any]) -> dict[str, Any]:
    identity = {} if reference is None else reference.identity()
    sections = {"policy": policy, "reference": identity, "objective": objective}
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

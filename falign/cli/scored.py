"""Loading what is scored: a run with all that is its own, or two models that are compared."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from falign.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from falign.data import Window
    from falign.evaluation import CompletionScorer
    from falign.objectives import RewardingObjective
    from falign.references import Reference
    from falign.scoring import LayoutChoice, PromptTree

__all__ = ["Scored", "load_compared", "load_run"]


class Scored(NamedTuple):
    """A policy with all that its scores depend on besides the data.

    Attributes:
        policy: On the device to compute on.
        tokenizer: The policy's.
        reference: What the policy is compared with.
        objective: What defines the implicit reward.
        window: Lengths, and what happens to what is longer.
        chunk_tokens: Positions that reach the vocabulary at once.
        record: What tells these from others, by name.
    """

    policy: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    reference: Reference
    objective: RewardingObjective
    window: Window
    chunk_tokens: int
    record: dict[str, Any]

    def models(self) -> list[Any]:
        """Return the policy, and the reference's model where that is another one."""
        from falign.references import own_model

        other = own_model(self.reference)
        return [self.policy, *([] if other is None else [other])]

    def scorer(self, trees: Sequence[PromptTree], *, layout: Any) -> tuple[CompletionScorer, LayoutChoice]:
        """Check the models on the first trees, and return what scores them and the others.

        Args:
            trees: The first ones of the source.
            layout: ``auto``, ``tree`` or ``padded``.

        Raises:
            ConfigError: The window is too long, or a model cannot read the layout.
            ModelError: Scores are not those of the model's own logits.
        """
        from falign.evaluation import CompletionScorer, choose_common_layout
        from falign.models.tokenizers import pad_token_id

        self._check(trees[0].prompt_ids + trees[0].completion_ids[0])
        pad_id = pad_token_id(self.tokenizer)
        choice = choose_common_layout(self.models(), trees, pad_token_id=pad_id, wanted=layout)
        scorer = CompletionScorer(
            policy=self.policy,
            reference=self.reference,
            objective=self.objective,
            pad_token_id=pad_id,
            layout=choice.layout,
            chunk_tokens=self.chunk_tokens,
        )
        return scorer, choice

    def _check(self, token_ids: Sequence[int]) -> None:
        from falign.models import base_of
        from falign.scoring import check_head

        for model in self.models():
            positions = getattr(base_of(model).config, "max_position_embeddings", None)
            if isinstance(positions, int) and self.window.max_length > positions:
                raise ConfigError(
                    f"--max-length {self.window.max_length} is more than the {positions} positions of "
                    f"{base_of(model).name_or_path}: lower it."
                )
            check_head(model, token_ids)


def load_run(path: str, *, max_length: int | None) -> Scored:
    """Load a run as it was trained: its policy, reference, objective and window.

    Args:
        path: The run folder.
        max_length: The window, if not the run's own.

    Raises:
        ConfigError: The run is not finished, or its objective defines no implicit reward.
        ModelError: A model is not there, or not the one that was trained.
    """
    from falign.cli.trained import load_trained
    from falign.data import Window
    from falign.models import weights_hash
    from falign.objectives import RewardingObjective
    from falign.training import RunFolder
    from falign.training.references import rebuild_reference

    folder = RunFolder.open(path)
    policy, tokenizer, config = load_trained(folder)
    sys.path.insert(0, str(Path.cwd()))  # where a divergence of one's own (module:attribute) lies
    objective = config.objective.build()
    if not isinstance(objective, RewardingObjective):
        raise ConfigError(
            f"{path}: objective.kind={config.objective.kind} defines no implicit reward to score by. Export the run "
            "(falign export --format merged), and score that with --reference and a --divergence of your choice."
        )
    policy.to(_device())  # pyright: ignore[reportArgumentType]
    reference = rebuild_reference(config, policy, folder, device=_device())
    if config.data is not None:
        data = config.data
        window = Window(data.max_length, data.max_completion_length, data.long_prompt, data.long_completion)
    else:
        assert config.prompts is not None, "a run has data or prompts"
        window = Window(config.prompts.max_length + config.rollout.max_new_tokens)
    if config.adapter is None:
        identity = {"weights": weights_hash(policy)}
    else:
        base = folder.read_json("manifest.json")["base_weights"]
        identity = {"weights": base, "adapter": weights_hash(policy, adapter="default")}
    return Scored(
        policy,
        tokenizer,
        reference,
        objective,
        window if max_length is None else replace(window, max_length=max_length),
        config.training.chunk_tokens,
        _record(identity, reference, config.objective.model_dump(mode="json")),
    )


def load_compared(
    path: str, *, reference: str, divergence: str, beta: float, dtype: str, max_length: int | None
) -> Scored:
    """Load two models, one to be scored and one to compare it with, under f-DPO's implicit reward.

    Args:
        path: The policy.
        reference: The model that it is compared with.
        divergence: Name of f.
        beta: β.
        dtype: Of both models.
        max_length: The window; 1024 where None.

    Raises:
        ConfigError: f or β defines no implicit reward, or the two models' tokens differ.
        ModelError: A model is not there.
    """
    from falign.data import Window
    from falign.models import load_model, load_tokenizer, weights_hash
    from falign.objectives import FDPO
    from falign.references import FrozenModel
    from falign.scoring import DEFAULT_CHUNK_TOKENS

    try:
        objective = FDPO(divergence, beta)
    except ValueError as error:
        raise ConfigError(f"--divergence {divergence} --beta {beta:g}: {error}") from error
    tokenizer, other = load_tokenizer(path), load_tokenizer(reference)
    _check_same_tokens(tokenizer, other, f"{path} and {reference}")
    policy = load_model(path, dtype=dtype, device=_device())
    frozen = load_model(reference, dtype=dtype, device=_device())
    against = FrozenModel(frozen, weights=weights_hash(frozen))
    settings = {"kind": "pairwise", "divergence": objective.divergence.name, "beta": beta}
    return Scored(
        policy,
        tokenizer,
        against,
        objective,
        Window(1024 if max_length is None else max_length),
        DEFAULT_CHUNK_TOKENS,
        _record({"weights": weights_hash(policy)}, against, settings),
    )


def _record(policy: dict[str, Any], reference: Reference, objective: dict[str, Any]) -> dict[str, Any]:
    sections = {"policy": policy, "reference": reference.identity(), "objective": objective}
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


def _check_same_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, models: str) -> None:
    ids, other_ids = tokenizer.get_vocab(), other.get_vocab()
    ids = {token: id_ for token, id_ in ids.items() if token != tokenizer.pad_token or token == tokenizer.eos_token}
    token = next((token for token in sorted(ids, key=ids.__getitem__) if other_ids.get(token) != ids[token]), None)
    if token is not None:
        raise ConfigError(
            f"{models} have different tokens: {token!r} is {ids[token]} in the one and {other_ids.get(token)} in the "
            "other, so their probabilities are of different things. Give a reference with the policy's tokenizer."
        )


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

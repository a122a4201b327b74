"""The sections ``model`` and ``adapter`` of a run file."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_serializer, model_validator

from falign.errors import ConfigError
from falign.runfile.base_config import FrozenModel
from falign.runfile.members import text_or

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["AdapterConfig", "ModelConfig"]


class ModelConfig(FrozenModel):
    """The model that is aligned."""

    path: str
    """Hub name, folder, ``.gguf`` file, or ``demo:smollm2-135m-instruct``."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fastest"] = "auto"
    """``auto`` is the checkpoint's; ``fastest`` is bfloat16 if the device multiplies it natively, else float32."""
    quantization: Literal["nf4"] | None = None
    """``nf4``: 4-bit weights with double quantization and bfloat16 compute; needs an adapter."""
    attn_implementation: str = "sdpa"
    """``sdpa``, ``eager``, ``flex_attention`` or ``flash_attention_2`` to ``4``; the last ones need a GPU."""
    chat_template: str | None = None
    """A Jinja template or a file with one, instead of the tokenizer's."""
    revision: str | None = None
    trust_remote_code: bool = False
    """Run code from the model's repository."""

    def check(self) -> None:
        """Refuse an attention that does not work on this machine.

        Raises:
            ConfigError: It is unknown, or its package or device is missing.
        """
        from falign.models.execution import check_attention

        try:
            check_attention(self.attn_implementation)
        except ConfigError as error:
            raise ConfigError(f"model.{error}") from error

    def build_tokenizer(self, *, date: datetime | None = None) -> PreTrainedTokenizerBase:
        """Load the tokenizer; templates that write a date write the given one, by default today."""
        from falign.models import load_tokenizer
        from falign.models.tokenizers import fix_date

        tokenizer = load_tokenizer(
            self.path,
            chat_template=self.chat_template,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )
        if date is not None:
            fix_date(tokenizer, date)
        return tokenizer

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """Return all ids that end a completion, without loading weights."""
        from falign.models import stop_token_ids

        return stop_token_ids(self.path, tokenizer, revision=self.revision)

    def vocabulary_size(self) -> int | None:
        """Return the number of rows of the embeddings, without loading weights; None if it is unknown."""
        from falign.models.loading import vocabulary_size

        return vocabulary_size(self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def build(self, *, trains: bool = False) -> PreTrainedModel:
        """Load the weights; ``trains``: all of them will be trained."""
        from falign.models import load_model

        return load_model(
            self.path,
            dtype=self.dtype,
            quantization=self.quantization,
            attn_implementation=self.attn_implementation,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )


_FIXED_BY_INIT = frozenset({"r", "alpha", "target_modules"})
"""Fields that an adapter given as ``init`` already has."""


if TYPE_CHECKING:
    TargetModules = str | list[str]
else:
    TargetModules = text_or(list[str])


class AdapterConfig(FrozenModel):
    """A LoRA adapter; ``adapter: null`` trains all weights."""

    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: TargetModules = "all-linear"
    """``all-linear`` or names of linear modules."""
    init: str | None = None
    """Start from this adapter, a folder or a run that trained one, with its own r, alpha and target_modules."""

    @model_validator(mode="after")
    def _one_origin(self) -> AdapterConfig:
        if self.init is not None and (given := sorted(self.model_fields_set & _FIXED_BY_INIT)):
            raise ValueError(
                f"{', '.join(given)} cannot be set together with init, whose adapter has its own: leave it out"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_fields_of_init(self, handler: Any) -> dict[str, Any]:
        dropped = frozenset[str]() if self.init is None else _FIXED_BY_INIT
        return {name: value for name, value in handler(self).items() if name not in dropped}

    def build(self, model: PreTrainedModel, *, seed: int, revision: str | None = None) -> PeftModel:
        """Add the adapter to a model; the base's revision is recorded with it."""
        from falign.models import add_lora, start_from_adapter

        if self.init is not None:
            return start_from_adapter(model, self.init, dropout=self.dropout, revision=revision)
        return add_lora(
            model,
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules=self.target_modules,
            seed=seed,
            revision=revision,
        )

"""The sections ``model`` and ``adapter`` of a run file."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator

from falign.errors import ConfigError
from falign.runfile.base_config import FrozenModel
from falign.runfile.members import text_or

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["AdapterConfig", "ModelConfig"]

_BESIDE_INIT = frozenset({"init", "dropout"})
"""Fields that may stand beside ``adapter.init``, whose adapter has its own values of the others."""


class ModelConfig(FrozenModel):
    """The model that is aligned."""

    path: str
    """Hub name, folder, ``.gguf`` file, or ``demo:smollm2-135m-instruct``."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fastest"] = "auto"
    """``auto`` is the checkpoint's; ``fastest`` is bfloat16 if the device multiplies it natively, else float32."""
    quantization: Literal["nf4", "int8"] | None = None
    """``nf4``: 4-bit weights with double quantization and bfloat16 compute; ``int8``: 8-bit weights with a scale per
    row, and compute in ``dtype``. Both need an adapter."""
    attn_implementation: str = "sdpa"
    """``sdpa``, ``eager``, ``flex_attention`` or ``flash_attention_2`` to ``4``; the last ones need a GPU."""
    chat_template: str | None = None
    """A Jinja template or a file with one, instead of the tokenizer's."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, such as ``{enable_thinking: false}``; those of a row take precedence."""
    revision: str | None = None
    trust_remote_code: bool = False
    """Run code from the model's repository."""
    new_tokens: list[str] = []
    """Tokens to add, each with the mean of the other embeddings at first; an adapter trains their rows."""

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
        from falign.data.chat_template import RESERVED, reads
        from falign.models import load_tokenizer
        from falign.models.tokenizers import fix_date, fix_options

        tokenizer = load_tokenizer(
            self.path,
            chat_template=self.chat_template,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )
        self._add_tokens(tokenizer)
        if date is not None:
            fix_date(tokenizer, date)
        for name in self.chat_template_kwargs:
            if name in RESERVED:
                raise ConfigError(f"model.chat_template_kwargs.{name} is set by falign itself; leave it out.")
            if not reads(tokenizer, name):
                raise ConfigError(
                    f"model.chat_template_kwargs.{name}: the chat template does not read it; leave it out, or set "
                    "model.chat_template to a template that does."
                )
        if self.chat_template_kwargs:
            fix_options(tokenizer, self.chat_template_kwargs)
        return tokenizer

    def _add_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        from falign.models.new_tokens import add_tokens

        try:
            return add_tokens(tokenizer, self.new_tokens) if self.new_tokens else []
        except ConfigError as error:
            raise ConfigError(f"model.{error}") from error

    def new_token_ids(self) -> list[int]:
        """Return the ids of ``new_tokens``."""
        from falign.models import load_tokenizer

        if not self.new_tokens:
            return []
        remote = self.trust_remote_code
        return self._add_tokens(load_tokenizer(self.path, revision=self.revision, trust_remote_code=remote))

    def with_new_tokens(self, model: PreTrainedModel) -> PreTrainedModel:
        """Give a model of this path, in place, the rows of ``new_tokens``, and return it."""
        from falign.models.new_tokens import add_rows

        add_rows(model, self.new_token_ids())
        return model

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """Return all ids that end a completion, without loading weights."""
        from falign.models import stop_token_ids

        return stop_token_ids(self.path, tokenizer, revision=self.revision)

    def vocabulary_size(self) -> int | None:
        """Return the number of rows of the embeddings, without loading weights; None if it is unknown."""
        from falign.models.loading import vocabulary_size

        size = vocabulary_size(self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)
        return None if size is None else max([size, *(id_ + 1 for id_ in self.new_token_ids())])

    def build(self, *, trains: bool = False) -> PreTrainedModel:
        """Load the weights; ``trains``: all of them will be trained."""
        from falign.models import load_model

        model = load_model(
            self.path,
            dtype=self.dtype,
            quantization=self.quantization,
            attn_implementation=self.attn_implementation,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )
        return self.with_new_tokens(model)


if TYPE_CHECKING:
    TargetModules = str | list[str]
else:
    TargetModules = text_or(list[str])

Rank = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(gt=0)]


class AdapterConfig(FrozenModel):
    """A LoRA adapter; ``adapter: null`` trains all weights."""

    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: TargetModules = "all-linear"
    """``all-linear`` or names of linear modules; routers of experts have no adapter."""
    use_rslora: bool = False
    """Scale by α/√r instead of α/r (rsLoRA)."""
    use_dora: bool = False
    """Also train the norms of the rows of the weights (DoRA)."""
    rank_pattern: dict[str, Rank] = {}
    """Other ranks than ``r``, by endings of layer names or regular expressions."""
    alpha_pattern: dict[str, Scale] = {}
    """Other scales than ``alpha``, by the same."""
    init_lora_weights: Literal["default", "gaussian", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "eva"] = (
        "default"
    )
    """First values of the matrices: random ones, factors of the base's weights, or, with ``eva``, the directions along
    which the inputs of each layer vary in the training data."""
    modules_to_save: list[str] = []
    """Endings of names of modules that are trained as a whole, such as ``norm`` or ``lm_head``."""
    target_parameters: list[str] = []
    """Endings of names of the stacked parameters of experts, such as ``experts.down_proj``."""
    init: str | None = None
    """Start from this adapter, a folder or a run that trained one, with its own settings except ``dropout``."""

    @model_validator(mode="after")
    def _one_origin(self) -> AdapterConfig:
        if self.init is not None and (given := sorted(self.model_fields_set - _BESIDE_INIT)):
            raise ValueError(
                f"{', '.join(given)} cannot be set together with init, whose adapter has its own: leave it out"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_fields_of_init(self, handler: Any) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if self.init is None or name in _BESIDE_INIT}

    @model_validator(mode="after")
    def _together(self) -> AdapterConfig:
        experts = "target_parameters, which changes the parameters of experts"
        if self.target_parameters and (self.use_dora or self.dropout):
            field = "use_dora" if self.use_dora else "dropout"
            raise ValueError(f"{field} cannot be set together with {experts}: leave one of them out")
        if self.target_parameters and (self.starts_from_weights or self.starts_from_rows):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights} cannot be set together with {experts}: leave one of them "
                "out"
            )
        return self

    @property
    def starts_from_weights(self) -> bool:
        """True if the matrices begin as factors of the base's weights, of which a second, frozen copy is kept."""
        return self.init is None and self.init_lora_weights.startswith(("pissa", "olora"))

    @property
    def starts_from_rows(self) -> bool:
        """True if :meth:`start_from` must be called with rows of the training data."""
        return self.init is None and self.init_lora_weights == "eva"

    def check(self, *, weight_decay: float) -> None:
        """Refuse settings of the training that the adapter cannot have.

        Args:
            weight_decay: ``training.weight_decay``.

        Raises:
            ConfigError: Weight decay, with factors of the base's weights.
        """
        if weight_decay and self.starts_from_weights:
            raise ConfigError(
                f"training.weight_decay={weight_decay} with adapter.init_lora_weights={self.init_lora_weights}: the "
                "matrices begin as factors of the base's weights, and decay would pull the model away from the base: "
                "leave it out."
            )

    def check_sharding(self, *, new_tokens: bool) -> None:
        """Refuse kinds of adapters that have not been tried with weights sharded over processes.

        Args:
            new_tokens: Whether the model has new tokens, whose rows the adapter trains.

        Raises:
            ConfigError: The adapter is of such a kind; the message names the field.
        """
        kinds = {
            "model.new_tokens": new_tokens,
            "adapter.use_dora": self.use_dora,
            "adapter.modules_to_save": self.modules_to_save,
            "adapter.target_parameters": self.target_parameters,
            f"adapter.init_lora_weights={self.init_lora_weights}": self.starts_from_weights or self.starts_from_rows,
        }
        if field := next((field for field, given in kinds.items() if given), None):
            raise ConfigError(
                f"{field} under FSDP2 has not been tried: train with DDP (--launch ddp), or leave it out."
            )

    def build(
        self, model: PreTrainedModel, *, seed: int, revision: str | None = None, token_ids: Sequence[int] = ()
    ) -> PeftModel:
        """Add the adapter to a model.

        Args:
            model: The base, changed in place.
            seed: Seed of random first values.
            revision: The base's revision, recorded with the adapter.
            token_ids: Tokens whose rows of the embeddings and the head are trained.

        Raises:
            FalignError: The adapter does not fit the model.
        """
        from falign.models import add_lora, start_from_adapter

        if self.init is not None:
            return start_from_adapter(model, self.init, dropout=self.dropout, revision=revision, token_ids=token_ids)
        return add_lora(
            model,
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules=self.target_modules,
            rslora=self.use_rslora,
            dora=self.use_dora,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
            modules_to_save=self.modules_to_save,
            target_parameters=self.target_parameters,
            start="default" if self.starts_from_rows else self.init_lora_weights,
            token_ids=token_ids,
            seed=seed,
            revision=revision,
        )

    def start_from(self, model: PeftModel, rows: Sequence[Sequence[int]], *, pad_token_id: int) -> None:
        """Give a new adapter its first values from the data, if ``init_lora_weights`` asks for it.

        Args:
            model: The model that :meth:`build` returned, on its device.
            rows: Token ids of rows of the training data.
            pad_token_id: The id that fills rows.

        Raises:
            ConfigError: The rows are too short for the rank.
        """
        from falign.models.activation_start import start_from_inputs

        if self.starts_from_rows:
            start_from_inputs(model, rows, pad_token_id=pad_token_id)

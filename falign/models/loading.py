"""Tokenizers and causal language models from a name, a folder, a GGUF file or the demonstration model."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import is_offline_mode
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from falign.errors import ConfigError, ModelError, one_line
from falign.models.checkpoint_files import CheckpointFiles
from falign.models.execution import check_attention, named_device, resolve_dtype
from falign.models.patterns import check_tokenizer_patterns
from falign.models.sources import check_weights, resolve
from falign.models.staging import reading

__all__ = ["load_model", "load_tokenizer", "stored_quantization", "vocabulary_size"]

# Names of the number of layers in configurations. Only numbers larger than in any real model are compared.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_USUAL_LAYERS = 1000


def load_tokenizer(
    name_or_path: str | Path,
    *,
    chat_template: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer; without a padding token, EOS pads.

    Masks must never be derived from token values: padding and a real EOS are often the same id.

    Args:
        name_or_path: As for ``load_model``, or the folder of an adapter with a tokenizer.
        chat_template: A Jinja template, or the path of a file with one, to use instead of the tokenizer's own.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that the repository brings along.

    Raises:
        ModelError: No tokenizer there, or one without EOS.
        ConfigError: ``chat_template`` is neither a template nor a file.
    """
    folder = Path(name_or_path).expanduser()
    beside = all((folder / file).is_file() for file in ("adapter_config.json", "tokenizer_config.json"))
    name = str(folder) if beside else resolve(name_or_path)
    with reading(lambda error: _unloadable("tokenizer", name, error)):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        check_tokenizer_patterns(tokenizer, name=name)
        tokenizer.decode(tokenizer("A few words.").input_ids)  # invalid settings fail only in use
    prepare_tokenizer(tokenizer, place=name)
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
        given = str(chat_template)
        shown = given if given != tokenizer.chat_template or len(given) <= 80 else f"{given[:80]} ..."
        tokenizer.chat_template_place = f"model.chat_template={shown!r}"
    return tokenizer


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, *, place: str) -> None:
    """Make EOS the padding token of a tokenizer that has none, in place.

    Args:
        tokenizer: The tokenizer, as transformers loads it.
        place: The name of its model, for messages.

    Raises:
        ModelError: It has no EOS.
    """
    if tokenizer.eos_token is None:
        raise ModelError(f"The tokenizer of {place} has no EOS token: add `eos_token` to its tokenizer_config.json.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template_place = place  # for messages of falign.data, which runs the template


def vocabulary_size(
    name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> int | None:
    """Return the number of embedding rows from the configuration alone; None if it is not given there.

    Raises:
        ModelError: No model there.
    """
    name = resolve(name_or_path)
    with reading(lambda error: _unloadable("configuration of", name, error)):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    attn_implementation: str = "sdpa",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """Load a causal language model, in evaluation mode.

    Args:
        name_or_path: A hub name, a folder, a ``.gguf`` file, or ``demo:smollm2-135m-instruct``.
        dtype: ``auto`` (the checkpoint's own), ``float32``, ``bfloat16``, ``float16``, or ``fastest`` (bfloat16
            where the device multiplies it natively, else float32). With ``quantization``, of the other weights.
        quantization: ``nf4`` for 4-bit NormalFloat with double quantization and bfloat16 arithmetic, ``int8`` for
            8-bit weights with one scale per row, multiplied in the type of the other weights. A checkpoint that is
            stored in 4 or 8 bits by bitsandbytes is loaded as it is stored.
        attn_implementation: ``sdpa``, ``eager``, ``flex_attention`` or ``flash_attention_2`` to ``4``; the last ones
            need a GPU.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that the repository brings along.
        device: Device of the weights. By default, quantized weights go to this process's GPU, if there is one, because
            a trainer cannot move them; all others go to the CPU.

    Raises:
        ModelError: No model there, or incomplete or pickled weights, or a model that needs remote code.
        ConfigError: An unknown ``dtype``, ``quantization`` or ``device``, or an ``attn_implementation`` that cannot
            work here.
    """
    check_attention(attn_implementation)
    name = resolve(name_or_path)
    if Path(name).is_dir():
        check_weights(Path(name))
        _check_layers(Path(name))
    stored = stored_quantization(name, revision=revision)
    if stored is not None and quantization not in (None, stored):
        raise ConfigError(f"quantization={quantization!r}: {name} is stored as {stored} already; leave it out.")
    if stored is None and quantization not in (None, *QUANTIZATIONS):
        raise ConfigError(f"quantization={quantization!r} is unknown; choose 'nf4' or 'int8', or leave it out.")
    quantized = quantization is not None or stored is not None
    place = _default_device(quantized) if device is None else named_device(device)
    torch_dtype = resolve_dtype(dtype, device=place)
    # An explicit None would mean the checkpoint's own quantization.
    options = {"quantization_config": QUANTIZATIONS[quantization]()} if quantization and stored is None else {}
    with reading(lambda error: _unloadable("model", name, error)):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto" if torch_dtype is None else torch_dtype,
            attn_implementation=attn_implementation,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            device_map={"": place},
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    if info["missing_keys"]:
        raise ModelError(
            f"{name} lacks weights of {type(model).__name__}, which would be random: "
            f"{sorted(info['missing_keys'])[:4]}. Give a checkpoint of a causal language model."
        )
    if quantized:
        _keep_weights(model)
    return model


def stored_quantization(name_or_path: str | Path, *, revision: str | None = None) -> str | None:
    """Return the stored quantization: ``nf4``, ``fp4`` or ``int8`` of bitsandbytes; None for 16 or 32 bits.

    Raises:
        ModelError: No configuration there, or another quantization, which falign does not support.
    """
    name = resolve(name_or_path)
    with reading(lambda error: _unloadable("model", name, error)):
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
        stored = dict(config.get("quantization_config") or {})
    if not stored:
        return None
    if stored.get("load_in_8bit"):
        return "int8"
    if not stored.get("load_in_4bit"):
        raise ModelError(
            f"{name} is stored quantized ({stored.get('quant_method')}), and falign supports only 4 and 8 bits by "
            "bitsandbytes: give the 16-bit model, with model.quantization=nf4 or int8 if memory is short."
        )
    return str(stored.get("bnb_4bit_quant_type", "fp4"))


def _check_layers(folder: Path) -> None:
    """Refuse a configuration with more layers than there are tensors: building millions takes hours."""
    with reading(lambda error: _unloadable("model", str(folder), error)):
        config, _ = PreTrainedConfig.get_config_dict(folder)
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    layers = [(key, part[key]) for part in parts for key in _LAYERS if isinstance(part.get(key), int | float)]
    if not layers or max(number for _, number in layers) <= _USUAL_LAYERS:
        return
    with ExitStack() as stack:
        tensors = len(CheckpointFiles(folder, stack).names)
    for key, number in layers:
        if number > tensors:
            raise ModelError(
                f"{folder / 'config.json'}: {key} is {number}, and the weights are {tensors} tensors: restore the file "
                "that belongs to the weights."
            )


def _nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,  # the compute type, because FSDP flattens only equal types
    )


def _int8() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True)


QUANTIZATIONS = {"nf4": _nf4, "int8": _int8}
"""Quantizations of weights while they are loaded, with their configurations."""


def _keep_weights(model: PreTrainedModel) -> None:
    # bitsandbytes changes its layers at their first forward pass. These changes are made or prevented here, so that a
    # forward pass does not change the model, or its hash.
    from bitsandbytes.nn.modules import Linear4bit

    from falign.models.int8 import keep_int8_weights

    keep_int8_weights(model)
    for module in model.modules():
        if not isinstance(module, Linear4bit):
            continue
        # In evaluation mode on a CPU with AVX512-BF16 it repacks the weights for an inference kernel: the scales are
        # rounded to bfloat16 for good, and the kernel has no backward pass, so later training gets no gradient
        # through the layer.
        module.support_avx512bf16_for_cpu = False
        # Biases are converted in place to the type of the arithmetic.
        if module.bias is not None:
            module.bias.data = module.bias.data.to(module.compute_dtype)


def _default_device(quantized: bool) -> torch.device:
    if quantized and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _read_template(chat_template: str | Path) -> str:
    text = str(chat_template)
    if "{{" in text or "{%" in text:
        return text
    path = Path(text).expanduser()
    if "\0" in text or len(text.encode("utf-8", "replace")) > 4000 or not _is_file(path):
        raise ConfigError(f"chat_template={text[:200]!r} is neither a Jinja template nor an existing file.")
    try:
        template = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"chat_template={text!r} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    if not template.strip():
        raise ConfigError(f"chat_template={text!r} is an empty file: give one with a Jinja template.")
    return template


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for one
        return False


def _unloadable(what: str, name: str, error: Exception) -> ModelError:
    reason = one_line(error)
    if not isinstance(error, OSError | ValueError):  # the message of a KeyError is only a key
        reason = f"{type(error).__name__}: {reason}"
    if "ignore_mismatched_sizes" in reason:  # it points to a report that is not shown
        reason = "the sizes in its config.json differ from those of its weights."
    reason += "" if reason.endswith((".", "!", "?")) else "."
    if "attention implementation" in reason or "attn_implementation" in reason:
        remedy = 'Choose another: attn_implementation="eager" (in a run file `model.attn_implementation: eager`).'
    elif "trust_remote_code" in str(error):
        remedy = "Set trust_remote_code only if you trust that code."
    elif isinstance(error, SafetensorError):
        remedy = "A file of its weights is damaged: restore it from a copy."
    elif Path(name).is_dir() or not isinstance(error, OSError):
        remedy = ""  # the message of the other library must suffice
    elif is_offline_mode():
        remedy = (
            "It is not in the local hub cache and offline mode is on (HF_HUB_OFFLINE): unset it, or give a local "
            "folder, a .gguf file, or demo:smollm2-135m-instruct."
        )
    else:
        remedy = (
            "It is not a local folder: check the hub name, the connection and, for a gated model, your login, or give "
            "a local folder, a .gguf file, or demo:smollm2-135m-instruct."
        )
    return ModelError(f"Cannot load the {what} {name!r}: {reason} {remedy}".rstrip())

"""New tokens of a model: ids in its tokenizer, and rows in its embeddings and its head."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from falign.errors import ConfigError, ModelError

__all__ = ["add_rows", "add_tokens"]


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Add tokens to a tokenizer, in place, and return their ids.

    They are found in a text before it is split into other tokens, and are decoded like other text. They are not
    special tokens, which a decoder may leave out.

    Args:
        tokenizer: The tokenizer.
        tokens: The new tokens, in the order of their ids.

    Raises:
        ConfigError: A token is empty, given twice, or exists; the message names it.
    """
    known = tokenizer.get_vocab()
    for i, token in enumerate(tokens):
        if not token.strip():
            raise ConfigError(f"new_tokens.{i}={token!r}: a token has at least one visible character.")
        if token in known:
            raise ConfigError(
                f"new_tokens.{i}={token!r} exists in the tokenizer already, with the id {known[token]}: leave it out."
            )
        if token in tokens[:i]:
            raise ConfigError(f"new_tokens.{i}={token!r} is given twice: leave it out.")
    added: list[str | AddedToken] = [AddedToken(token, normalized=False) for token in tokens]
    tokenizer.add_tokens(added)
    ids = tokenizer.convert_tokens_to_ids([*tokens])
    assert isinstance(ids, list)
    return ids


@torch.no_grad()
def add_rows(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Give a model rows for new token ids, each the mean of the rows of all older tokens, in place.

    So each new token first has an average embedding and an average logit, the same on every machine. Rows with which a
    checkpoint pads its vocabulary are used before new ones are made. The weights are new tensors: those of a model that
    shares them are not changed.

    Args:
        model: The model, without adapters.
        ids: The ids, all above those of older tokens.

    Raises:
        ModelError: The embeddings or the head are quantized.
    """
    if not ids:
        return
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    for end in ends:
        if end is not None and not _weight(end).is_floating_point():
            raise ModelError(
                f"{model.name_or_path} has quantized embeddings or a quantized head, which take no new tokens: give "
                "the 16-bit model, with model.quantization=nf4 if memory is short."
            )
    size, wanted = len(_weight(ends[0])), max(ids) + 1
    older, rows = min(size, *ids), [*ids]
    if wanted > size:
        model.resize_token_embeddings(wanted, mean_resizing=False)
        # Some tokenizers have a padding token without a row, before the new ones.
        rows = sorted({*ids, *range(size, wanted)})
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    _set_mean(embeddings, older, rows)
    if head is None:
        return
    if tied:
        head.weight = embeddings.weight
    else:
        _set_mean(head, older, rows)
    bias = vars(head)["_parameters"].get("bias")
    if bias is not None:
        changed = bias.data.clone()
        changed[rows] = _mean(bias.data[:older]).to(bias.dtype)
        head.bias = nn.Parameter(changed, requires_grad=bias.requires_grad)


def _set_mean(module: nn.Module, older: int, rows: Sequence[int]) -> None:
    weight = _weight(module)
    changed = weight.data.clone()
    changed[list(rows)] = _mean(weight.data[:older]).to(weight.dtype)
    module.weight = nn.Parameter(changed, requires_grad=weight.requires_grad)


def _mean(rows: torch.Tensor) -> torch.Tensor:
    """Return the mean over the first dimension, the same on every machine: whole numbers have one sum in any order."""
    scale = 2.0**32
    return (rows.double() * scale).round().long().sum(dim=0).double() / (scale * len(rows))


def _weight(module: nn.Module) -> torch.Tensor:
    assert isinstance(module.weight, torch.Tensor)
    return module.weight

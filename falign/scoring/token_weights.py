"""Weights of completion tokens, computed from a model's activations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from falign.errors import ModelError
from falign.scoring.batch import TokenBatch
from falign.scoring.distributions import Distribution
from falign.scoring.model_parts import read_backbone, without_wrapper

__all__ = ["MapoMask", "activation_weights"]


def activation_weights(hidden_states: Sequence[Tensor], batch: TokenBatch) -> Float[Tensor, "N T"]:
    """Return falign's own weights: the mean absolute activation relative to its mean over the completion.

    ``w_t = mean_l |h_lt| / mean_t |h_lt|`` over layers l, with ``|h_lt|`` the mean over the hidden size of the absolute
    output of layer l at the position that predicts token t. The mean over a completion is 1: β keeps its meaning.

    Args:
        hidden_states: Embeddings and the output of each layer, shape (R, L, H) each.
        batch: The rows that the model read.

    Returns:
        Shape (N, T), 0 where masked; detached.
    """
    predictor = batch.predictor[batch.completion_mask]
    weights = torch.zeros(batch.completion_mask.shape, device=predictor.device)
    num_tokens = batch.completion_mask.sum(dim=-1, keepdim=True)
    layers = hidden_states[1:]  # the first entry is the embeddings
    for layer in layers:
        size = batch.scatter(layer.detach().flatten(0, 1)[predictor].float().abs().mean(dim=-1))
        weights += size * num_tokens / size.sum(dim=-1, keepdim=True)
    return weights / len(layers)


@dataclass(frozen=True)
class _Family:
    """Names of the modules in a decoder layer that adds attention, then the MLP, to its residual stream.

    Attributes:
        layers: The list of layers in the backbone.
        attention: The attention in a layer.
        norms: The norms before the attention and before the MLP.
        projections: The queries, keys and values in the attention, three modules or one for all.
        out: The output projection of the attention.
        down: The last projection of the MLP.
    """

    layers: str
    attention: str
    norms: tuple[str, str]
    projections: tuple[str, ...]
    out: str
    down: str

    def misses(self, layer: nn.Module) -> bool:
        """Return True if a layer is built differently: it lacks a module of the family or has others."""
        children = dict(layer.named_children())
        if set(children) != {self.attention, "mlp", *self.norms}:
            return True
        attention = dict(children[self.attention].named_children())
        if len(self.projections) == 3 and _rotation(children[self.attention]) is None:
            return True
        return self.down not in dict(children["mlp"].named_children()) or not {*self.projections, self.out} <= set(
            attention
        )


_FAMILIES = (
    _Family(  # Llama, Mistral, Qwen 2 and 3, SmolLM, Gemma
        "layers",
        "self_attn",
        ("input_layernorm", "post_attention_layernorm"),
        ("q_proj", "k_proj", "v_proj"),
        "o_proj",
        "down_proj",
    ),
    _Family("h", "attn", ("ln_1", "ln_2"), ("c_attn",), "c_proj", "c_proj"),  # GPT-2
)


class MapoMask:
    """The MaPO mask: the signed means of a model's activations, each scaled to [0, 1] over the completion.

    For an activation a (a place in the network) with ``a_t`` its mean over the hidden size at the position that
    predicts token t, ``ã_t = (a_t - min_t a_t) / (max_t a_t - min_t a_t)`` with extremes over the completion. The
    mask is

        ``m_t = mean_g mean_{a in g} ã_t``

    over the activations of each group g in all layers, then over four groups: ``mlp``, the neurons (the input of the
    MLP's last projection); ``attn``, queries, keys and values, queries and keys after rotary embeddings if any, and
    the input of the output projection; ``resid``, the embeddings, in each layer the residual stream before and after
    both blocks, the two normed inputs and the two blocks' outputs, and the final norm's output; ``logits``.

    An activation that is constant over the completion, as in a completion of one token, cannot be scaled: it counts
    as 1 at each token, so that the completion is weighted as without a mask.

    Memory while the model runs: one number per completion token and activation.

    Args:
        model: A causal language model in the Transformers layout, with or without adapters.
        batch: The rows that the model reads.

    Raises:
        ModelError: The layers are not built like those of Llama or GPT-2.

    Source:
        Christopoulou et al., SparsePO (arXiv:2410.05102), MaPO; the activations and groups are those of its code
        with all hooks. The code also standardizes ``a_t`` before scaling, which cancels, and rounds the extremes to
        float16, which is not done here. For one token its scale is 0/0.
    """

    def __init__(self, model: nn.Module, batch: TokenBatch) -> None:
        self.batch = batch
        self.predictor = batch.predictor[batch.completion_mask]
        backbone = read_backbone(model)
        self.family = _family(without_wrapper(model), backbone)
        self.layers: list[nn.Module] = list(getattr(backbone, self.family.layers))
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the model's activations, except the logits, while the context is open."""
        with ExitStack() as hooks:

            def before(module: nn.Module, act: Callable[[Tensor], None]) -> None:
                hooks.callback(module.register_forward_pre_hook(lambda _, args: act(args[0])).remove)

            def after(module: nn.Module, act: Callable[[Tensor], None]) -> None:
                def hook(module: nn.Module, args: Any, output: Any) -> None:
                    act(output[0] if isinstance(output, tuple) else output)

                hooks.callback(module.register_forward_hook(hook).remove)

            residual, attn = self._adder("resid"), self._adder("attn")
            before(self.layers[0].get_submodule(self.family.norms[0]), residual)  # the embeddings
            for layer in self.layers:
                attention, mlp = getattr(layer, self.family.attention), layer.get_submodule("mlp")
                for name in self.family.norms:
                    norm = layer.get_submodule(name)
                    before(norm, residual)
                    after(norm, residual)
                for block in (attention, mlp, layer):
                    after(block, residual)
                before(getattr(mlp, self.family.down), self._adder("mlp"))
                before(getattr(attention, self.family.out), attn)
                for name in self.family.projections:
                    after(getattr(attention, name), self._projections if len(self.family.projections) == 1 else attn)
                if len(self.family.projections) == 3 and getattr(attention, "use_rope", True):
                    self._rotary(attention, hooks)
            yield

    def weights(self, distribution: Distribution, *, chunk_tokens: int) -> Float[Tensor, "N T"]:
        """Return the mask from the recorded activations and the logits.

        Args:
            distribution: The model's prediction of each completion token.
            chunk_tokens: Number of positions that reach the head at once.

        Returns:
            Shape (N, T), within [0, 1], 0 where masked; detached.
        """
        head = distribution.head
        with torch.no_grad():
            chunks = distribution.hidden.split(chunk_tokens)
            self._add("resid", self._widened(distribution.hidden).mean(dim=-1))  # the output of the final norm
            self._add("logits", torch.cat([head.logits(head.embeddings(chunk)).mean(dim=-1) for chunk in chunks]))
        means = [self.sums[group] / self.counts[group] for group in self.sums]
        return torch.stack(means).mean(dim=0)

    def _adder(self, group: str) -> Callable[[Tensor], None]:
        def act(activation: Float[Tensor, "R L H"]) -> None:
            self._add(group, self._at_predictors(activation).mean(dim=-1))

        return act

    def _at_predictors(self, activation: Float[Tensor, "R L ..."]) -> Float[Tensor, "M ..."]:
        return self._widened(activation.detach().flatten(0, 1)[self.predictor.to(activation.device)])

    @staticmethod
    def _widened(values: Float[Tensor, "M ..."]) -> Float[Tensor, "M ..."]:
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def _projections(self, activation: Float[Tensor, "R L H3"]) -> None:
        for part in activation.chunk(3, dim=-1):
            self._adder("attn")(part)

    def _rotary(self, attention: nn.Module, hooks: ExitStack) -> None:
        """Record queries and keys after rotary embeddings; no module returns them, so the function is wrapped."""
        held: dict[str, Tensor] = {}
        rotate = _rotation(attention)
        assert rotate is not None  # see _Family.misses

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            angles = kwargs["position_embeddings"]
            held["cos"], held["sin"] = (self._at_predictors(each.expand(self.rows, -1, -1)) for each in angles)

        def hold(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def act(module: nn.Module, args: Any, output: Tensor) -> None:
                held[name] = self._at_predictors(output.flatten(2))

            return act

        def end(module: nn.Module, args: Any, output: Any) -> None:
            q, k = (held[name].unflatten(-1, (-1, held["cos"].shape[-1])).transpose(0, 1)[None] for name in "qk")
            for rotated in rotate(q, k, held["cos"][None], held["sin"][None]):
                self._add("attn", rotated[0].transpose(0, 1).flatten(1).mean(dim=-1))
            held.clear()

        handles = [attention.register_forward_pre_hook(begin, with_kwargs=True), attention.register_forward_hook(end)]
        for name in "qk":  # after their norm, if there is one
            source = getattr(attention, f"{name}_norm", getattr(attention, f"{name}_proj"))
            handles.append(source.register_forward_hook(hold(name)))
        for handle in handles:
            hooks.callback(handle.remove)

    @property
    def rows(self) -> int:
        """The number of rows R of the batch."""
        return self.batch.input_ids.shape[0]

    def _add(self, group: str, means: Float[Tensor, " M"]) -> None:
        mask = self.batch.completion_mask
        placed = self.batch.scatter(means.to(mask.device))
        low = placed.masked_fill(~mask, torch.inf).amin(dim=-1, keepdim=True)
        high = placed.masked_fill(~mask, -torch.inf).amax(dim=-1, keepdim=True)
        scaled = torch.where(high > low, (placed - low) / (high - low), 1.0).masked_fill(~mask, 0.0)
        self.sums[group] = self.sums.get(group, 0.0) + scaled
        self.counts[group] = self.counts.get(group, 0) + 1


def _rotation(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return an architecture's function that applies rotary embeddings to queries and keys."""
    return vars(sys.modules[type(attention).__module__]).get("apply_rotary_pos_emb")


def _family(language_model: nn.Module, backbone: nn.Module) -> _Family:
    for family in _FAMILIES:
        layers = getattr(backbone, family.layers, None)
        if isinstance(layers, nn.ModuleList) and len(layers) and not any(family.misses(layer) for layer in layers):
            return family
    raise ModelError(
        f"{type(language_model).__name__}: the MaPO mask reads activations inside the layers and supports those of "
        "Llama (also Mistral, Qwen, SmolLM, Gemma) and GPT-2. Set weighting to activations or none."
    )

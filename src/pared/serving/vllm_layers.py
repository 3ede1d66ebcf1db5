"""Building each decoder layer of a vLLM model from the layer's own values, by the code that vLLM builds all of them with.

vLLM's models make their layers through one function (`make_layers`), which calls a constructor once for each layer, and
that constructor reads sizes from the config object that all layers share. So while it makes layer i the config holds the
values of layer i, and nothing here knows any family. Families that vLLM has no code of its own for run in it as
transformers' modules, whose linear layers and attention it replaces; there the blocks are first made as everywhere in pared.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, RowParallelLinear
from vllm.model_executor.models import utils

from pared.errors import ModelError
from pared.per_layer import BIASES, HEADS, SHAPES, SKIP, SKIPPED, build_layers_
from pared.serving.vllm_config import layers_of

_TRANSFORMERS_MODELS = "vllm.model_executor.models.transformers.base"
_NOT_VALUES = (SKIP, SHAPES, HEADS, BIASES, SKIPPED)
_MISSING = object()
Make = Callable[..., nn.Module]


@contextlib.contextmanager
def values(config: PreTrainedConfig, own: Mapping[str, Any], without: Iterable[str] = ()) -> Iterator[None]:
    """While this lasts, the config holds the values of one layer, other than the sizes of parts that it does without."""
    names = [n for n in own if n not in (*_NOT_VALUES, *without) and not (own.get(SKIP) and own[n] == 0)]
    before = {n: config.__dict__.get(n, _MISSING) for n in names}
    try:
        for name in names:
            setattr(config, name, own[name])
        yield
    finally:
        for name, value in before.items():
            if value is _MISSING:
                delattr(config, name)
            else:
                setattr(config, name, value)


@contextlib.contextmanager
def built_by_themselves(config: PreTrainedConfig, compilation: Any) -> Iterator[set[str]]:
    """While a model is constructed, have each of its decoder layers built from its own values.

    Yields a set that is filled with the prefixes of parameters that no checkpoint holds, since nothing reads them.
    Raises ModelError where the model's class makes its layers in another way.
    """
    original, entries, idle, built = utils.make_layers, layers_of(config), set[str](), list[int]()

    def make_layers(num_hidden_layers: int, layer_fn: Make, prefix: str) -> tuple[int, int, nn.ModuleList]:
        def make(prefix: str) -> nn.Module:
            layer = _number(prefix)
            if layer is None or num_hidden_layers != config.num_hidden_layers:
                return layer_fn(prefix=prefix)
            built.append(layer)
            own = entries.get(layer, {})
            made = _make(layer_fn, prefix, config, own, compilation)
            idle.update(f"{prefix}.{part}" for part in _idle_parts(made, own))
            return made

        return original(num_hidden_layers, make, prefix)

    class OwnLayersModel:
        @staticmethod
        def from_config(**settings: Any) -> PreTrainedModel:
            model = AutoModel.from_config(**settings)
            build_layers_(model, entries)
            built.extend(entries)
            return model

    models = [(n, m) for n, m in list(sys.modules.items()) if n.startswith("vllm.model")]
    users = [m for _, m in models if vars(m).get("make_layers") is original]
    foreign = [m for n, m in models if n == _TRANSFORMERS_MODELS]
    for module in users:
        module.make_layers = make_layers  # type: ignore[attr-defined]
    for module in foreign:
        module.AutoModel = OwnLayersModel  # type: ignore[attr-defined]
    try:
        yield idle
    finally:
        for module in users:
            module.make_layers = original  # type: ignore[attr-defined]
        for module in foreign:
            module.AutoModel = AutoModel  # type: ignore[attr-defined]
    if not built:
        raise ModelError(
            f"vLLM builds the layers of a {config.model_type} in a way in which they can not differ",
            where=config.model_type,
            fix="prune with --shape uniform",
        )


def by_layer(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[int | None, Iterator[tuple[str, Tensor]]]]:
    """Tensors one after the other, in runs that belong to one layer (None: to no layer)."""
    return itertools.groupby(weights, key=lambda item: _number(item[0]))


def _number(name: str) -> int | None:
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def _make(layer_fn: Make, prefix: str, config: PreTrainedConfig, own: Mapping[str, Any], compilation: Any) -> nn.Module:
    hidden = config.attribute_map.get("hidden_size", "hidden_size")
    if hidden in own or HEADS in own:
        layer = _with_heads_apart(layer_fn, prefix, config, own, compilation)
    else:
        with values(config, own), _linears(own, config.hidden_size, prefix):
            layer = layer_fn(prefix=prefix)
    _check_biases(layer, own, prefix)
    for kind in own.get(SKIP, ()):
        found = _parts(layer, kind)
        if not found:
            raise ModelError(f"no {kind} is found in a {type(layer).__name__}", where=prefix)
        for name in found:
            replaced = getattr(layer, name)
            setattr(layer, name, Nothing(returns_bias=isinstance(replaced, LinearBase)))
            _forget(compilation, f"{prefix}.{name}")
    return layer


def _with_heads_apart(
    layer_fn: Make, prefix: str, config: PreTrainedConfig, own: Mapping[str, Any], compilation: Any
) -> nn.Module:
    """A layer whose class ties the heads to the hidden size: its attention is made apart from everything else.

    The layer's own hidden size is what its heads add up to, and concerns them alone; what they read and write is as wide
    as the model.
    """
    hidden = config.hidden_size
    names = [config.attribute_map.get(n, n) for n in ("hidden_size", "num_attention_heads", "num_key_value_heads")]
    # Everything else is made beside as many heads of this size as the hidden size has room for.
    with values(config, own):
        most = hidden // (config.hidden_size // config.num_attention_heads)
    whole = {**own, **{n: most for n in names[1:] if hasattr(config, n)}}
    with values(config, whole, without=names[:1]), _linears(own, hidden, prefix):
        layer = layer_fn(prefix=prefix)
    if "attention" in own.get(SKIP, ()):
        return layer
    _forget(compilation, prefix)
    with values(config, own), _linears({BIASES: own.get(BIASES, ())}, hidden, prefix, own_hidden=config.hidden_size):
        narrow = layer_fn(prefix=prefix)
    for name in _parts(layer, "attention"):
        before, after = getattr(layer, name), getattr(narrow, name)
        if HEADS in own:
            _keep_slopes(before, after, own[HEADS]["kept"])
        setattr(layer, name, after)
    return layer


def _keep_slopes(whole: nn.Module, narrow: nn.Module, kept: list[int]) -> None:
    """ALiBi: the heads that stay have the slopes that they had among all heads."""
    for a, b in zip(whole.modules(), narrow.modules(), strict=True):
        slopes = getattr(getattr(a, "impl", None), "alibi_slopes", None)
        if slopes is not None:
            index = torch.tensor(kept, device="cpu")
            b.impl.alibi_slopes = slopes[index] if isinstance(slopes, Tensor) else [slopes[i] for i in kept]  # type: ignore[union-attr]


@contextlib.contextmanager
def _linears(own: Mapping[str, Any], hidden: int, prefix: str, own_hidden: int | None = None) -> Iterator[None]:
    """While this lasts, linear layers are made as a layer's own entries say and the config can not.

    Weights that have a shape of their own are given by name: their sides are the hidden size and a width. own_hidden: make those that read, or write, a hidden size of this many channels read, or write, `hidden`.
    """
    column, row = ColumnParallelLinear.__init__, RowParallelLinear.__init__
    shapes = own.get(SHAPES, {})

    def local(arguments: Mapping[str, Any]) -> str:
        return str(arguments.get("prefix", "")).removeprefix(prefix + ".")

    def width(arguments: Mapping[str, Any], made: int) -> int:
        shape = shapes.get(local(arguments) + ".weight")
        return made if shape is None else int(shape[0] if shape[1] == hidden else shape[1])

    def column_init(self: Any, input_size: int, output_size: int, *rest: Any, **named: Any) -> None:
        column(self, hidden if input_size == own_hidden else input_size, width(named, output_size), *rest, **named)

    def row_init(self: Any, input_size: int, output_size: int, *rest: Any, **named: Any) -> None:
        if local(named) in own.get(BIASES, ()):
            rest, named = (True, *rest[1:]) if rest else (), named if rest else {**named, "bias": True}
        row(self, width(named, input_size), hidden if output_size == own_hidden else output_size, *rest, **named)

    ColumnParallelLinear.__init__, RowParallelLinear.__init__ = column_init, row_init
    try:
        yield
    finally:
        ColumnParallelLinear.__init__, RowParallelLinear.__init__ = column, row


def _check_biases(layer: nn.Module, own: Mapping[str, Any], prefix: str) -> None:
    """ModelError where a matrix that the layer's entries give a bias was made without."""
    found = {n for n, _ in layer.named_parameters()}
    if missing := [n for n in own.get(BIASES, ()) if f"{n}.bias" not in found]:
        raise ModelError(
            f"vLLM's {type(layer).__name__} can not be given the bias of {missing[0]}",
            where=prefix,
            fix="serve it with transformers, or prune with --no-add-bias",
        )


def _parts(layer: nn.Module, kind: str) -> list[str]:
    """The parts of a decoder layer that are its attention, or those that are its MLP."""
    attention = {n for n, child in layer.named_children() if any(isinstance(m, AttentionLayerBase) for m in child.modules())}
    if kind == "attention":
        return sorted(attention)
    matrices = {n for n, child in layer.named_children() if any(p.ndim > 1 for p in child.parameters())}
    return sorted(matrices - attention)


def _idle_parts(layer: nn.Module, own: Mapping[str, Any]) -> set[str]:
    """Parts of a layer that nothing reads, since what follows them is skipped: norms, whose weights were not kept."""
    if SKIPPED in own:
        return {part + "." for parts in own[SKIPPED].values() for part in parts}
    norms = [n for n, child in layer.named_children() if all(p.ndim == 1 for p in child.parameters())]
    return {n + "." for n in norms} if own.get(SKIP) else set()


def _forget(compilation: Any, prefix: str) -> None:
    """Take attention and expert layers that are not part of the model after all out of vLLM's books."""
    for name in [n for n in compilation.static_forward_context if n == prefix or n.startswith(prefix + ".")]:
        del compilation.static_forward_context[name]
    experts = getattr(compilation, "static_all_moe_layers", [])
    experts[:] = [n for n in experts if n in compilation.static_forward_context]


class Nothing(nn.Module):
    """Stands where an attention or an MLP was: what it adds to the hidden states is zero."""

    def __init__(self, *, returns_bias: bool = False) -> None:
        super().__init__()
        self.returns_bias = returns_bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs.get("hidden_states")
        if hidden is None:
            hidden = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point())
        out = torch.zeros_like(hidden)
        return (out, None) if self.returns_bias else out

"""Causal language models whose decoder blocks differ in size.

Each block is made by its own class from its own config (`per_layer_config`). Where a class ties one size to another
(GPT-2's heads to its hidden size), the modules in it that hold tensors are then made anew in the shapes that
`per_layer_shapes` gives, and arguments with an entry for each head (ALiBi slopes) are reduced to the heads that
`per_layer_heads` says are left. Matrices that `per_layer_biases` names have a bias that their class does not give them. A
block without its attention or its MLP (`skip`) has stand-ins where the parts were that `per_layer_skipped` names. Where a class derives something from a layer's number (its kind, a scale that follows the
depth), layers keep the numbers that `per_layer_numbers` gives: those before others were removed. This file needs torch
and transformers alone: per-layer checkpoints carry a copy of it,
followed by two classes, for `trust_remote_code`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

# Entries of config.json: layer -> config entries; layer -> tensor in the block -> shape; and what became of the heads:
# {"of": heads of the model, "arguments": {argument of a block: its dimension with heads}, "kept": layer -> indices}.
PER_LAYER, SHAPES, HEADS = "per_layer_config", "per_layer_shapes", "per_layer_heads"
# An entry of a layer in PER_LAYER, the kinds of sublayer that it does without; and an entry of config.json, which parts of
# a block each kind is: {kind: {part: how many things it returns, 0 for a bare tensor; null: it hands its input on}}.
SKIP, SKIPPED = "skip", "per_layer_skipped"
# layer -> the linear layers in the block (by name) that get a bias.
BIASES = "per_layer_biases"
# {"of": layers that there were, "numbers": for each layer the number that its class makes it as}.
NUMBERS = "per_layer_numbers"
# {config entry: [a value that the config class accepts, the one to build with]}, where its validators tie the entry to
# sizes that blocks have for themselves.
UNCHECKED = "per_layer_unchecked"

_APART = (SHAPES, HEADS, BIASES, SKIPPED, NUMBERS, UNCHECKED)
# layer -> its entries of PER_LAYER, and under the names in _APART those of the others.
PerLayer = dict[int, dict[str, Any]]


def split(data: Mapping[str, Any]) -> tuple[dict[str, Any], PerLayer]:
    """config.json entries without the per-layer ones, and these by layer."""
    rest = dict(data)
    entries = {int(i): dict(own) for i, own in (rest.pop(PER_LAYER, None) or {}).items()}
    for i, shapes in (rest.pop(SHAPES, None) or {}).items():
        entries.setdefault(int(i), {})[SHAPES] = {n: tuple(s) for n, s in shapes.items()}
    for i, named in (rest.pop(BIASES, None) or {}).items():
        entries.setdefault(int(i), {})[BIASES] = list(named)
    heads = rest.pop(HEADS, None) or {"kept": {}}
    for i, kept in heads["kept"].items():
        entries.setdefault(int(i), {})[HEADS] = {"kept": list(kept), "of": heads["of"], "arguments": heads["arguments"]}
    parts = rest.pop(SKIPPED, None) or {}
    for own in entries.values():
        if known := {kind: dict(parts[kind]) for kind in own.get(SKIP, ()) if kind in parts}:
            own[SKIPPED] = known
    if unchecked := rest.pop(UNCHECKED, None):
        for own in entries.values():
            own[UNCHECKED] = {k: list(v) for k, v in unchecked.items()}
    if numbered := rest.pop(NUMBERS, None):
        for i in range(len(numbered["numbers"])):
            entries.setdefault(i, {})[NUMBERS] = dict(numbered)
    return rest, entries


def join(per_layer: PerLayer) -> dict[str, Any]:
    """The entries of config.json that say this."""
    own = {str(i): {k: v for k, v in e.items() if k not in _APART} for i, e in sorted(per_layer.items())}
    out: dict[str, Any] = {PER_LAYER: {i: e for i, e in own.items() if e}}
    if shapes := {str(i): {n: list(s) for n, s in e[SHAPES].items()} for i, e in sorted(per_layer.items()) if SHAPES in e}:
        out[SHAPES] = shapes
    if heads := {i: e[HEADS] for i, e in sorted(per_layer.items()) if HEADS in e}:
        first = next(iter(heads.values()))
        kept = {str(i): h["kept"] for i, h in heads.items()}
        out[HEADS] = {"of": first["of"], "arguments": first["arguments"], "kept": kept}
    out[BIASES] = {str(i): list(e[BIASES]) for i, e in sorted(per_layer.items()) if e.get(BIASES)}
    skipped: dict[str, dict[str, Any]] = {}
    for e in per_layer.values():
        for kind, parts in e.get(SKIPPED, {}).items():
            skipped.setdefault(kind, {}).update(parts)
    out[SKIPPED] = skipped
    if numbered := next((e[NUMBERS] for e in per_layer.values() if NUMBERS in e), None):
        out[NUMBERS] = dict(numbered)
    if unchecked := _unchecked(per_layer):
        out[UNCHECKED] = unchecked
    return {k: v for k, v in out.items() if v}


def _unchecked(per_layer: PerLayer) -> dict[str, Any]:
    return next((e[UNCHECKED] for e in per_layer.values() if UNCHECKED in e), {})


def used_config(config: PreTrainedConfig, per_layer: PerLayer) -> PreTrainedConfig:
    """The config that a model is built from: with the entries that its class's validators would not accept."""
    return layer_config(config, {k: used for k, (_, used) in _unchecked(per_layer).items()})


def layer_config(config: PreTrainedConfig, entries: Mapping[str, Any]) -> PreTrainedConfig:
    """The config that one block is made from."""
    own = copy.copy(config)
    own.__dict__.pop("_heterogeneity_spec", None)
    for key, value in entries.items():
        of_skipped = SKIP in entries and type(value) is int and value == 0  # the block is made whole, and parts taken out
        if key not in (SKIP, *_APART) and not of_skipped:
            setattr(own, key, value)
    return own


def blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its name, found as the module list that has one entry for each layer.

    Raises LookupError where there is none.
    """
    config = model.config.get_text_config()
    for key in ("num_hidden_layers", "num_layers", "num_blocks"):  # some count sublayers by the first
        wanted = getattr(config, key, None)
        found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
        if found:
            return min(found, key=lambda item: item[0].count("."))
    raise LookupError(f"no list of {getattr(config, 'num_hidden_layers', None)} decoder blocks in {type(model).__name__}")


def make_block(like: nn.Module, config: PreTrainedConfig, index: int, entries: Mapping[str, Any]) -> nn.Module:
    """A decoder block of the class of `like`, in the sizes that the layer's entries give it.

    A layer's own hidden size is what its heads add up to, and concerns the parts that hold heads: a part that comes out
    in the wanted shapes with the model's hidden size is made with that. Or it is the one that the model had before it lost
    hidden channels, which is then the larger one: scales that a class derives from it stay what they were.
    """
    made = index
    if numbered := entries.get(NUMBERS):
        made, config = numbered["numbers"][index], _numbered(config, numbered["numbers"], numbered["of"])
    shapes, hidden = entries.get(SHAPES, {}), config.attribute_map.get("hidden_size", "hidden_size")
    block = _made(like, layer_config(config, entries), made)
    if entries.get(hidden, getattr(config, hidden)) < getattr(config, hidden):
        _take_fitting_parts(
            block, {**_shapes(block), **shapes}, like, layer_config(config, {**entries, hidden: getattr(config, hidden)}), made
        )
    for name in entries.get(BIASES, ()):
        give_bias_(block.get_submodule(name))
    for kind in entries.get(SKIP, ()):
        skip_(block, entries[SKIPPED][kind], index)
    now = _shapes(block)
    for name, buffer in like.named_buffers():  # what a model gives its blocks once they are made
        owner, _, leaf = name.rpartition(".")
        if owner not in dict(block.named_modules()):
            continue  # skipped
        if name not in dict(block.named_buffers()) and leaf in like.get_submodule(owner)._non_persistent_buffers_set:
            block.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    fit_(block, {n: shape for n, shape in shapes.items() if now[n] != tuple(shape)})
    if entries.get(hidden, 0) > getattr(config, hidden):
        _note_size(block, entries[hidden], getattr(config, hidden))
    for part in block.modules():
        if getattr(part, "layer_idx", None) == made:
            part.layer_idx = index  # type: ignore[assignment]  # its place in the cache
    if heads := entries.get(HEADS):
        keep_heads_(block, heads["kept"], heads["of"], heads["arguments"])
    return block.eval()


def _numbered(config: PreTrainedConfig, numbers: list[int], of: int) -> PreTrainedConfig:
    """The config as of a model of `of` layers, of which those with these numbers are left."""
    own = copy.copy(config)
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == len(numbers) and "token" not in key:
            whole, at = [], 0
            for n in range(of):
                at += at + 1 < len(numbers) and numbers[at + 1] <= n
                whole.append(value[at])
            setattr(own, key, whole)
    own.num_hidden_layers = of
    return own


def _take_fitting_parts(
    block: nn.Module, wanted: Mapping[str, tuple[int, ...]], like: nn.Module, config: PreTrainedConfig, index: int
) -> None:
    """Give a block the parts that its class, made from another config, makes in the wanted shapes."""
    try:
        plain = _made(like, config, index)
    except (ValueError, AssertionError, RuntimeError):
        return  # the class refuses these heads beside the model's hidden size
    fits = {n for n, shape in _shapes(plain).items() if wanted[n] == shape}
    for name, part in list(plain.named_children()):
        if all(f"{name}.{n}" in fits for n in part.state_dict()):
            setattr(block, name, part)


def _note_size(block: nn.Module, before: int, now: int) -> None:
    """Have modules that view their input by the hidden size which they noted note the present one.

    Not where a tensor still has a dimension of the size before: there it is heads, or an inner width.
    """
    for part in block.modules():
        sizes = {n for t in part.state_dict().values() for n in t.shape}
        if now in sizes and not any(n % before == 0 for n in sizes):
            for key, value in list(vars(part).items()):
                if type(value) is int and value == before:
                    setattr(part, key, now)


def _made(like: nn.Module, config: PreTrainedConfig, index: int) -> nn.Module:
    """A block of the class of `like`: its constructor is given the config, the layer's number, or what the config says."""
    arguments: list[Any] = []
    for p in list(inspect.signature(type(like).__init__).parameters.values())[1:]:
        if p.name == "config":
            arguments.append(config)
        elif hasattr(config, p.name):
            arguments.append(getattr(config, p.name))
        elif "type" in p.name and (kinds := [v for k, v in vars(like).items() if k.endswith("type") and isinstance(v, str)]):
            arguments.append(kinds[0])
        elif any(w in p.name for w in ("layer", "idx", "index")):
            arguments.append(index)
        elif own := [v for v in (getattr(m, p.name, None) for m in like.modules()) if isinstance(v, int | float | str)]:
            arguments.append(own[0])  # what a model gives its blocks, they or their parts keep under the same name
        else:
            break
    return type(like)(*arguments)


def _shapes(block: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in block.state_dict().items()}


def fit_(block: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Make the modules that hold the named tensors anew in other shapes, in place."""
    owners: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        owner, _, leaf = name.rpartition(".")
        owners.setdefault(owner, {})[leaf] = tuple(shape)
    for owner, wanted in owners.items():
        parent, _, leaf = owner.rpartition(".")
        module = block.get_submodule(owner)
        if owner:
            setattr(block.get_submodule(parent), leaf, _resized(module, wanted))
        else:
            _resized(module, wanted)


def _resized(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    weight = module._parameters.get("weight")
    if weight is not None and "weight" in shapes:
        bias, shape = module._parameters.get("bias") is not None, shapes["weight"]
        with torch.device(weight.device):
            if isinstance(module, nn.Linear):
                return type(module)(shape[1], shape[0], bias=bias).to(weight.dtype)
            if type(module).__name__ == "Conv1D":  # transformers' transposed linear
                return type(module)(shape[1], shape[0]).to(weight.dtype)
            if isinstance(module, nn.Conv1d) and module.groups == module.out_channels:  # each channel on its own
                n, settings = shape[0], (module.stride, module.padding, module.dilation)
                return nn.Conv1d(n, n, shape[2], *settings, groups=n, bias=bias).to(weight.dtype)  # type: ignore[arg-type]
            if type(module) is nn.LayerNorm:
                return nn.LayerNorm(shape, module.eps, bias=bias).to(weight.dtype)
    for leaf, shape in shapes.items():
        old = module.get_parameter(leaf) if leaf in module._parameters else module.get_buffer(leaf)
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            module._buffers[leaf] = new
    return module


def give_bias_(linear: nn.Module) -> None:
    """Give a linear layer without a bias one of zeros."""
    weight = linear.get_parameter("weight")
    linear.register_parameter("bias", nn.Parameter(weight.detach().new_zeros(weight.shape[0]), weight.requires_grad))


class Skipped(nn.Module):
    """Stands where a part of a block was whose output is added to the hidden states: it gives zeros.

    returns: how many things the part returned, the first of them its output; 0: that alone. Where it is handed a cache,
    one number goes into it for each token: layers tell from it how many tokens there have been.
    """

    def __init__(self, returns: int, layer: int) -> None:
        super().__init__()
        self.returns, self.layer = returns, layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                count = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
                value.update(count, count, self.layer)
        out = torch.zeros_like(hidden)
        return (out, *[None] * (self.returns - 1)) if self.returns else out


class Passed(nn.Module):
    """Stands where a part of a block was that a skipped part read from or wrote to: it hands on what it is given."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def skip_(block: nn.Module, parts: Mapping[str, int | None], layer: int) -> None:
    """Put stand-ins in the place of the named parts of a block, as far as it has them."""
    for name, returns in parts.items():
        if name in block._modules:
            setattr(block, name, Passed() if returns is None else Skipped(returns, layer))


def keep_heads_(block: nn.Module, kept: list[int], total: int, arguments: Mapping[str, int]) -> None:
    """Have a block see only some heads of the arguments that have an entry for each of `total`, in the given dimension."""
    index = torch.tensor(kept, device="cpu")

    def narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for name, dim in arguments.items():
            if kwargs.get(name) is not None:
                kwargs = {**kwargs, name: _heads(kwargs[name], dim, index, total)}
        return args, kwargs

    block.register_forward_pre_hook(narrow, with_kwargs=True)


def _heads(value: Tensor, dim: int, index: Tensor, total: int) -> Tensor:
    # A dimension may hold the heads of every sequence of a batch, one sequence behind the other.
    apart = value.unflatten(dim, (-1, total))
    return apart.index_select(dim + 1, index.to(value.device)).flatten(dim, dim + 1)


def build_layers_(model: PreTrainedModel, per_layer: PerLayer) -> None:
    """Replace the blocks that have entries of their own, and tables that follow from the hidden size that blocks are made for."""
    prefix, layers = blocks(model)
    for i, entries in sorted(per_layer.items()):
        layers[i] = make_block(layers[i], model.config, i, entries)
    hidden = model.config.attribute_map.get("hidden_size", "hidden_size")
    if max((e.get(hidden, 0) for e in per_layer.values()), default=0) > getattr(model.config, hidden):
        config = layer_config(model.config, {hidden: max(e.get(hidden, 0) for e in per_layer.values())})
        for name, part in list(model.named_modules()):
            tables = bool(part._buffers) and not part.state_dict()  # rotary frequencies
            if tables and not name.startswith(prefix) and "config" in inspect.signature(type(part).__init__).parameters:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, type(part)(config=config))


class PerLayerConfigMixin:
    """For a subclass of a config class: carries the per-layer entries, and lets the model's own code read global values."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        rest, per_layer = split(config_dict)
        loaded = super().from_dict(rest, **kwargs)  # type: ignore[misc]
        attach(loaded[0] if isinstance(loaded, tuple) else loaded, per_layer)
        return loaded

    def validate(self) -> None:
        unchecked = getattr(self, UNCHECKED, None) or {}
        for key, (accepted, _) in unchecked.items():
            setattr(self, key, accepted)
        try:
            super().validate()  # type: ignore[misc]
        finally:
            for key, (_, used) in unchecked.items():
                setattr(self, key, used)

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()  # type: ignore[misc]
        # Permission to read global values is for the live object: in config.json it would let a stock transformers
        # build uniform layers without a word.
        data.pop("allow_global_per_layer_attribute_access", None)
        return {**data, **{k: accepted for k, (accepted, _) in data.get(UNCHECKED, {}).items()}}


def attach(config: PreTrainedConfig, per_layer: PerLayer) -> None:
    """Make a config carry the per-layer entries."""
    config.allow_global_per_layer_attribute_access = True
    # First of all: transformers leaves out entries of a layer that say what the whole model's say.
    for key, (_, used) in _unchecked(per_layer).items():
        setattr(config, key, used)
    for key, value in join(per_layer).items():
        setattr(config, key, value)


class PerLayerModelMixin:
    """For a subclass of a model class whose config is a PerLayerConfigMixin: builds the blocks in their own sizes."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _, per_layer = split(config.to_dict())
        build_layers_(self, per_layer)  # type: ignore[arg-type]
        for i in per_layer:
            block = blocks(self)[1][i]  # type: ignore[arg-type]
            if not any(p.is_meta for p in block.parameters()):
                block.apply(self._init_weights)  # type: ignore[attr-defined]

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers leaves out a family's renaming of tensors for custom code; the blocks here are the family's own.
        return False

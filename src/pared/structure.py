"""The structure of a model: which axes its tensors have, how many units there are, and how a config says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedConfig

from pared.axes import Signature, count, parse

# transformers' own attribute names (every config maps its spelling to them) and what pared calls the axis.
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_hidden_layers",
    "vocab_size",
)


@dataclass(frozen=True)
class Proof:
    """What the proof of one axis gave: the largest difference of logits between cutting and masking.

    stock: whether the family's own config can say the result; otherwise the per-layer form carries it.
    tail: of layers, only those may go that have none of another kind behind them.
    """

    axis: str
    holds: bool
    difference: float | None = None
    reason: str = ""
    stock: bool = True
    tail: bool = False


@dataclass(frozen=True)
class Layout:
    """The structure of one model: which axes each tensor has, how many units, and what has been proved.

    tensors: module-level name -> signature; shapes: name -> shape. layer_sizes[i]: axis -> units in block i;
    sizes: the axes that the whole model shares. keys: axis -> the config key that says its size.
    parents: nested axis -> its parent. tied: a tensor's name -> the name of the tensor that it shares.
    head_arguments: arguments of a block with an entry for each head -> the dimension that they stand in.
    kept_heads: layers that have lost heads of these already -> those that are left, by their first index.
    fixed_layers: layers that can not go, because the model's class tells the kinds of its layers by their number.
    """

    model_type: str
    prefix: str
    num_layers: int
    tensors: dict[str, Signature]
    shapes: dict[str, tuple[int, ...]]
    sizes: dict[str, int]
    layer_sizes: tuple[dict[str, int], ...]
    keys: dict[str, str]
    parents: dict[str, str]
    tied: dict[str, str]
    consumers: dict[str, int]
    head_arguments: dict[str, int] = field(default_factory=dict)
    kept_heads: dict[int, list[int]] = field(default_factory=dict)
    fixed_layers: frozenset[int] = frozenset()
    proofs: dict[str, Proof] = field(default_factory=dict)

    def layer_of(self, name: str) -> int | None:
        """The block that a tensor belongs to, None outside of the blocks."""
        if not name.startswith(self.prefix + "."):
            return None
        return int(name[len(self.prefix) + 1 :].split(".", 1)[0])

    def block_tensors(self, layer: int) -> list[str]:
        start = f"{self.prefix}.{layer}."
        return [n for n in self.tensors if n.startswith(start)]

    def local(self, name: str) -> str:
        """A block tensor's name inside its block."""
        return name[len(self.prefix) + 1 :].split(".", 1)[1]

    def sizes_at(self, layer: int | None) -> dict[str, int]:
        """Units of every axis that tensors of this block (None: outside of the blocks) can name."""
        return self.sizes if layer is None else {**self.sizes, **self.layer_sizes[layer]}

    def holders(self, axis: str, layer: int | None) -> list[str]:
        """Tensors of a block (None: outside of the blocks) that have an axis."""
        names = [n for n in self.tensors if self.layer_of(n) is None] if layer is None else self.block_tensors(layer)
        return [n for n in names if n not in self.tied and axis in self.tensors[n].axes]

    def before_another_kind(self) -> frozenset[int]:
        """Layers that have one with other tensors somewhere behind them."""
        kinds = [tuple(self.local(n) for n in self.block_tensors(i)) for i in range(self.num_layers)]
        return frozenset(i for i in range(self.num_layers) if any(k != kinds[i] for k in kinds[i:]))

    def prunable(self, axis: str, *, stock: bool = False) -> bool:
        """Whether removing units of an axis is proved. stock: in the family's own config, not only in the per-layer form."""
        return axis in self.proofs and self.proofs[axis].holds and (self.proofs[axis].stock or not stock)

    def parameters(self, name: str, sizes: Mapping[str, int] | None = None) -> int:
        """Entries of one tensor, of the model as it is or under other axis sizes."""
        at = self.sizes_at(self.layer_of(name)) if sizes is None else sizes
        return count(self.tensors[name], at, self.shapes[name])


def sizes_of(config: PreTrainedConfig, keys: Mapping[str, str]) -> dict[str, int]:
    """Units of every axis as a config says them."""
    heads = _value(config, HEADS) or 1
    # Where "query" has a key of its own, one KV head serves all of them.
    kv = 1 if keys.get("query") == HEADS else _value(config, KV_HEADS) or heads
    sizes = {"hidden": _value(config, HIDDEN), "vocab": _value(config, VOCAB), "kv": kv, "query": heads // kv}
    sizes["d"] = (_value(config, HEAD_DIM) if keys.get("d") == HEAD_DIM else None) or sizes["hidden"] // heads
    for axis, key in keys.items():
        if axis not in sizes:
            value = _value(config, key)
            if value is not None:
                sizes[axis] = value
    return sizes


def resize(config: PreTrainedConfig, keys: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The config entries that say these axis sizes: {config key: value}. Axes that no key counts are passed over."""
    out: dict[str, Any] = {}
    if "kv" in sizes or "query" in sizes:
        now = sizes_of(config, keys)
        kv, query = sizes.get("kv", now["kv"]), sizes.get("query", now["query"])
        out[raw_key(config, HEADS)] = kv * query
        if "kv" in keys:
            out[raw_key(config, KV_HEADS)] = kv
        if keys.get("d") == HEAD_DIM:
            out[HEAD_DIM] = now["d"]
    if "hidden" in sizes:
        out[raw_key(config, HIDDEN)] = sizes["hidden"]
        if keys.get("d") == HEAD_DIM:
            out[HEAD_DIM] = sizes_of(config, keys)["d"]
    for axis, n in sizes.items():
        if axis not in ("kv", "query", "hidden", "d", "layer") and axis in keys:
            out[raw_key(config, keys[axis])] = n
    return out


def block_entries(config: PreTrainedConfig, keys: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The config entries that a block of these sizes is made from: `resize`, and a hidden size that its heads add up to
    where heads have no size of their own. The modules that hold hidden channels are given their shapes afterwards."""
    out = resize(config, keys, {a: n for a, n in sizes.items() if a != "hidden"})
    if "d" not in keys and {"kv", "query"} <= sizes.keys() and sizes.get("d"):
        out[raw_key(config, HIDDEN)] = sizes["kv"] * sizes["query"] * sizes["d"]
    return out


def keep_layers(data: Mapping[str, Any], kept: list[int], total: int) -> dict[str, Any]:
    """config.json entries with every list that has one entry for each layer reduced to the kept layers.

    Lists of token ids and of bounds may happen to be as long as the model; they are left alone.
    """

    def per_layer(key: str, value: Any) -> bool:
        listed = isinstance(value, list) and len(value) == total and "token" not in key
        return listed and not any(isinstance(x, float) for x in value)

    return {k: [v[i] for i in kept] if per_layer(k, v) else v for k, v in data.items()}


def raw_key(config: PreTrainedConfig, name: str) -> str:
    """A config's own spelling of one of transformers' attribute names."""
    return config.attribute_map.get(name, name)


def _value(config: PreTrainedConfig, name: str) -> Any:
    return getattr(config, name, None)


def with_signatures(layout: Layout, chosen: Mapping[str, str]) -> Layout:
    """The layout with other signatures for the named tensors of every block (names inside the block)."""
    tensors = {
        n: parse(chosen[layout.local(n)]) if layout.layer_of(n) is not None and layout.local(n) in chosen else s
        for n, s in layout.tensors.items()
    }
    return replace(layout, tensors=tensors)

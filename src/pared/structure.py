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
    """What the proof of one axis gave: the largest difference of logits between cutting and masking."""

    axis: str
    holds: bool
    difference: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Layout:
    """The structure of one model: which axes each tensor has, how many units, and what has been proved.

    tensors: module-level name -> signature; shapes: name -> shape. layer_sizes[i]: axis -> units in block i;
    sizes: the axes that the whole model shares. keys: axis -> the config key that says its size.
    parents: nested axis -> its parent. tied: a tensor's name -> the name of the tensor that it shares.
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

    def prunable(self, axis: str) -> bool:
        return axis in self.proofs and self.proofs[axis].holds

    def parameters(self, name: str, sizes: Mapping[str, int] | None = None) -> int:
        """Entries of one tensor, of the model as it is or under other axis sizes."""
        at = self.sizes_at(self.layer_of(name)) if sizes is None else sizes
        return count(self.tensors[name], at, self.shapes[name])


def sizes_of(config: PreTrainedConfig, keys: Mapping[str, str]) -> dict[str, int]:
    """Units of every axis as a config says them."""
    heads = _value(config, HEADS) or 1
    kv = _value(config, KV_HEADS) or heads
    sizes = {"hidden": _value(config, HIDDEN), "vocab": _value(config, VOCAB), "kv": kv, "query": heads // kv}
    sizes["d"] = (_value(config, HEAD_DIM) if keys.get("d") == HEAD_DIM else None) or sizes["hidden"] // heads
    for axis, key in keys.items():
        if axis not in sizes:
            value = _value(config, key)
            if value is not None:
                sizes[axis] = value
    return sizes


def resize(config: PreTrainedConfig, keys: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The config entries that say these axis sizes: {config key: value}."""
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
        if axis not in ("kv", "query", "hidden", "d", "layer"):
            out[raw_key(config, keys[axis])] = n
    return out


def keep_layers(data: Mapping[str, Any], kept: list[int], total: int) -> dict[str, Any]:
    """config.json entries with every list that has one entry for each layer reduced to the kept layers."""
    return {k: [v[i] for i in kept] if isinstance(v, list) and len(v) == total else v for k, v in data.items()}


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

"""The structure of a model: which axes its tensors have, how many units there are, and how a config says so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from transformers import PreTrainedConfig

from pared.axes import Signature, count, parse
from pared.errors import ModelError

# transformers' own attribute names (every config maps its spelling to them) and what pared calls the axis.
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_hidden_layers",
    "vocab_size",
)
TOP_K, GROUPS, TOP_GROUPS = "num_experts_per_tok", "n_group", "topk_group"
# What a block is made of besides its residual stream; the words are those of transformers' `per_layer_config`.
SUBLAYERS = ("attention", "mlp")
# How configs spell the number of experts that a token visits where they do not map it to transformers' name.
_LAYERS = re.compile(r"(n|num)_(hidden_)?(layers?|blocks?)")
_RUN_OF_LAYERS = re.compile(r"(n|num)_[a-z]+_layers")
_FIRST_LAYERS = re.compile(r"first_k_\w+|(n|num)_dense_layers")
_LAST_LAYERS = re.compile(r"(n|num)_kv_shared_layers")
_HIDDEN = re.compile(r"(embedding|embed|hidden|model)_(dim|size)|d_model|n_embd")
_TOP_K = re.compile(r"(experts?|moe)\w*(per_tok|top_?k$|_k$)|top_?k_experts$")


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
    fixed_layers: layers that can not go: others read their keys and values, or the kinds of layers follow from their number.
    sublayers: kind ("attention", "mlp") -> the parts of a block that it is made of, as `per_layer_skipped` says them; a
    layer that has it has one unit of an axis of that name.
    follows: axis -> (the axis whose size it must have, times a factor), where one config key says both.
    block_hidden: the hidden size that blocks are made for, where the model has lost hidden channels in the per-layer form.
    scales_follow_hidden: whether embeddings, or what enters the head, are multiplied with what follows from the hidden size.
    numbers: the number that each layer is made as, where it is another than its place, of `numbered_of` layers.
    biases: layer -> the matrices in it that have a bias which their class does not give them, in the per-layer form.
    added: tensors that the model did not have before this run: biases of zeros, to be fitted.
    runs: axis -> equal runs of units that have to keep as many each. least: axis -> the fewest units that can stay.
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
    sublayers: dict[str, dict[str, int | None]] = field(default_factory=dict)
    follows: dict[str, tuple[str, int]] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    least: dict[str, int] = field(default_factory=dict)
    block_hidden: int | None = None
    scales_follow_hidden: bool = False
    biases: dict[int, list[str]] = field(default_factory=dict)
    added: frozenset[str] = frozenset()
    numbers: tuple[int, ...] = ()
    numbered_of: int = 0
    proofs: dict[str, Proof] = field(default_factory=dict)

    def layer_of(self, name: str) -> int | None:
        """The block that a tensor belongs to, None outside of the blocks."""
        if not name.startswith(self.prefix + "."):
            return None
        return int(name[len(self.prefix) + 1 :].split(".", 1)[0])

    def block_tensors(self, layer: int) -> list[str]:
        start = f"{self.prefix}.{layer}."
        return [n for n in self.tensors if n.startswith(start)]

    def remaining(self, names: list[str], sizes: Mapping[str, int]) -> list[str]:
        """Those of a block's tensors that are left where `sizes` has no unit of some sublayers."""
        gone = {part for kind, parts in self.sublayers.items() if sizes.get(kind) == 0 for part in parts}
        return [n for n in names if self.local(n).split(".", 1)[0] not in gone] if gone else names

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

    def with_followers(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Sizes, and those that follow from them."""
        led = {a: factor * sizes[leader] for a, (leader, factor) in self.follows.items() if leader in sizes}
        return {**sizes, **led}

    def parameters(self, name: str, sizes: Mapping[str, int] | None = None) -> int:
        """Entries of one tensor, of the model as it is or under other axis sizes."""
        at = self.sizes_at(self.layer_of(name)) if sizes is None else sizes
        return count(self.tensors[name], at, self.shapes[name])


def sublayer_of(axis: str) -> str | None:
    """The sublayer that units of an axis are in; None for what whole blocks share."""
    if axis in ("kv", "query"):
        return "attention"
    return "mlp" if axis.endswith("ffn") or axis == "expert" else None


def sizes_of(config: PreTrainedConfig, keys: Mapping[str, str]) -> dict[str, int]:
    """Units of every axis as a config says them."""
    heads = _value(config, HEADS) or 1
    # Where "query" has a key of its own, one KV head serves all of them.
    kv = 1 if keys.get("query") == HEADS else _value(config, KV_HEADS) or heads
    sizes = {"hidden": _value(config, HIDDEN), "vocab": _value(config, VOCAB), "kv": kv, "query": max(1, heads // kv)}
    sizes["layer"] = layer_total(config)
    sizes["d"] = (_value(config, HEAD_DIM) if keys.get("d") == HEAD_DIM else None) or sizes["hidden"] // heads
    for axis, key in keys.items():
        if axis not in sizes:
            key, factor = size_key(config, key)
            value = _value(config, key)
            if value is not None and factor is not None:
                sizes[axis] = int(value * factor)
    return sizes


def size_key(config: PreTrainedConfig, text: str) -> tuple[str, Fraction | None]:
    """The config key of an axis, and what its value is multiplied with: "key", "key * other key" or "key / number"."""
    key, times, other = text.partition(" * ")
    if times:
        value = _value(config, other)
        return key, None if value is None else Fraction(value)
    key, _, part = text.partition(" / ")
    return key, Fraction(1, int(part or 1))


def resize(config: PreTrainedConfig, keys: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The config entries that say these axis sizes: {config key: value}. Axes that no key counts are passed over.

    A key may be a product, "moe_intermediate_size * n_shared_experts", of which the first factor is the size that
    changes, or a part, "intermediate_size / 2". Raises ModelError where axes that share a key want different values of it.
    """
    out: dict[str, Any] = {}
    if "kv" in sizes or "query" in sizes:
        now = sizes_of(config, keys)
        kv, query = sizes.get("kv", now["kv"]), sizes.get("query", now["query"])
        out[raw_key(config, HEADS)] = kv * query
        if "kv" in keys:
            out[raw_key(config, KV_HEADS)] = kv
        if keys.get("d") == HEAD_DIM:
            out[HEAD_DIM] = sizes.get("d", now["d"])
    if "hidden" in sizes:
        out.update(dict.fromkeys(hidden_keys(config), sizes["hidden"]))
        if keys.get("d") == HEAD_DIM:
            out[HEAD_DIM] = sizes_of(config, keys)["d"]
    for axis, n in sizes.items():
        if axis not in ("kv", "query", "hidden", "d", "layer") and axis in keys:
            key, factor = size_key(config, keys[axis])
            value, left = divmod(Fraction(n), factor or 1)
            if left or out.setdefault(raw_key(config, key), value) != value:
                raise ModelError(f"the config can not express this shape: {key} can not be {n} for {axis} alone")
    return out


def experts_per_token(config: PreTrainedConfig) -> int | None:
    """How many experts a token visits, at most; None where the config names no such number."""
    key = top_k_key(config)
    value = None if key is None else _value(config, key)
    return max(value) if isinstance(value, list) else value


def top_k_key(config: PreTrainedConfig) -> str | None:
    """The config's own key for the number of experts that a token visits."""
    data = config.to_dict()
    found = [raw_key(config, TOP_K), *(k for k in data if _TOP_K.search(k))]
    return next((k for k in found if _is_count(data.get(k))), None)


def _is_count(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return bool(numbers) and all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in numbers)


def expert_runs(config: PreTrainedConfig) -> int:
    """Groups of experts of a router that chooses groups first; 1 where it does not."""
    groups = _value(config, GROUPS)
    return groups if _is_count(groups) and _is_count(_value(config, TOP_GROUPS)) else 1


def least_experts(config: PreTrainedConfig) -> int:
    """The fewest experts with which the router works: each token visits so many, out of the groups that it chooses.

    A group is worth what its best two experts are (DeepSeek V3, arXiv:2412.19437, 2.1.2), so it has two or more.
    """
    top_k, groups = experts_per_token(config) or 1, expert_runs(config)
    return top_k if groups == 1 else groups * max(2, -(-top_k // _value(config, TOP_GROUPS)))


def block_entries(
    config: PreTrainedConfig, keys: Mapping[str, str], sizes: Mapping[str, int], hidden: int | None = None
) -> dict[str, Any]:
    """The config entries that a block of these sizes is made from: `resize`, and a hidden size that its heads add up to
    where heads have no size of their own, or else the given one. The modules that hold hidden channels are given their
    shapes afterwards."""
    out = resize(config, keys, {a: n for a, n in sizes.items() if a != "hidden"})
    if "d" not in keys and {"kv", "query"} <= sizes.keys() and sizes.get("d"):
        out[raw_key(config, HIDDEN)] = sizes["kv"] * sizes["query"] * sizes["d"]
    elif hidden is not None:
        out[raw_key(config, HIDDEN)] = hidden
    return out


def config_entries(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config is made from: its config.json, with counts and lists as the class itself holds them (some count
    layers otherwise on disk)."""
    data: dict[str, Any] = config.to_dict()
    own = {k: getattr(config, k, v) for k, v in data.items() if isinstance(v, int | list) and not isinstance(v, bool)}
    return {**data, **{k: v for k, v in own.items() if type(v) is type(data[k])}}


def layer_keys(config: PreTrainedConfig) -> list[str]:
    """The entries that say how many decoder blocks there are, the first being what the blocks are counted by."""
    data, key = config.to_dict(), raw_key(config, LAYERS)
    total = getattr(config, LAYERS, None)
    if total is None:
        return []
    also = [k for k, v in config_entries(config).items() if _LAYERS.fullmatch(k) and k != key and _is_count(v)]
    if key in data:
        return [key, *(k for k in also if getattr(config, k) == total)]
    return [k for k in also if total % getattr(config, k) == 0][:1]  # a computed number: sublayers, say


def hidden_keys(config: PreTrainedConfig) -> list[str]:
    """The entries that say the hidden size: transformers' own, and others of such a name and the same value."""
    key, hidden = raw_key(config, HIDDEN), getattr(config, HIDDEN, None)
    return [key, *(k for k in config.to_dict() if k != key and _HIDDEN.fullmatch(k) and getattr(config, k, None) == hidden)]


def layer_total(config: PreTrainedConfig) -> int:
    """Decoder blocks, as the config counts them."""
    keys = layer_keys(config)
    return int(getattr(config, keys[0] if keys else LAYERS))


def layer_runs(config: PreTrainedConfig) -> dict[str, int]:
    """Entries that count runs of layers, one behind the other, which add up to all layers: {key: layers}."""
    found = {k: v for k, v in config_entries(config).items() if _RUN_OF_LAYERS.fullmatch(k) and isinstance(v, int)}
    found = {k: v for k, v in found.items() if k not in layer_keys(config)}
    return found if len(found) > 1 and sum(found.values()) == layer_total(config) else {}


def with_layers(config: PreTrainedConfig, data: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    """Config entries that say the kept layers, in this order: their number, runs of them, how many of the first or the
    last are of a kind, and lists with one entry for each."""
    out = keep_layers(data, kept, layer_total(config)) | {k: len(kept) for k in layer_keys(config)}
    start = 0
    for key, n in layer_runs(config).items():
        out[key] = sum(start <= i < start + n for i in kept)
        start += n
    total = layer_total(config)
    for key, n in out.items():
        if isinstance(n, int) and not isinstance(n, bool) and 0 < n <= total:
            if _FIRST_LAYERS.fullmatch(key):
                out[key] = sum(i < n for i in kept)
            elif _LAST_LAYERS.fullmatch(key):
                out[key] = sum(i >= total - n for i in kept)
    return out


def keep_layers(data: Mapping[str, Any], kept: list[int], total: int) -> dict[str, Any]:
    """config.json entries with every list that has one entry for each layer reduced to the kept layers.

    Lists of token ids and of bounds may happen to be as long as the model; they are left alone.
    """

    def per_layer(key: str, value: Any) -> bool:
        listed = isinstance(value, list) and len(value) == total and "token" not in key
        return listed and not (len(value) <= 2 and any(isinstance(x, float) for x in value))

    return {k: [v[i] for i in kept] if per_layer(k, v) else v for k, v in data.items()}


def raw_key(config: PreTrainedConfig, name: str) -> str:
    """A config's own spelling of one of transformers' attribute names."""
    return config.attribute_map.get(name, name)


def _value(config: PreTrainedConfig, name: str) -> Any:
    return getattr(config, name, None)


def with_signatures(layout: Layout, chosen: Mapping[tuple[str, str], str]) -> Layout:
    """The layout with other signatures for tensors of its blocks: (name inside the block, present signature) -> another."""
    tensors = {
        n: parse(chosen.get((layout.local(n), s.text), s.text)) if layout.layer_of(n) is not None else s
        for n, s in layout.tensors.items()
    }
    return replace(layout, tensors=tensors)

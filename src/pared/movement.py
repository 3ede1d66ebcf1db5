"""What moves: sizes of a config changed one at a time, the tensor dimensions that follow, and what they are tried as."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from pared import modeling
from pared.axes import Signature, count, parse
from pared.errors import ModelError
from pared.miniature import Miniature, axis_of_key
from pared.structure import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    VOCAB,
    layer_keys,
    layer_runs,
    raw_key,
    size_key,
    sizes_of,
)


@dataclass(frozen=True)
class Sample:
    """One small config: its axis sizes and the shapes that they gave."""

    sizes: dict[str, int]
    shapes: dict[str, tuple[int, ...]]


def size_keys(small: Miniature, base: PreTrainedConfig) -> dict[str, str]:
    """axis -> config key, for every key whose change moves some tensor dimension."""
    known = {raw_key(base, k) for k in (HIDDEN, HEADS, KV_HEADS, VOCAB)} | {*layer_keys(base), *layer_runs(base)}
    keys: dict[str, str] = {"hidden": HIDDEN, "vocab": VOCAB}
    shapes, data = shapes_of(base), base.to_dict()
    for key in [*data, HEAD_DIM]:
        value = data.get(key)
        if key in known or isinstance(value, bool) or not (value is None or isinstance(value, int)):
            continue
        if value is None and not any(w in key for w in ("inner", "ffn", "intermediate", HEAD_DIM)):
            continue
        step = 8 if key == HEAD_DIM or "dim" in key or "size" in key or value is None else 2
        if _moves(small, {key: (value or 48) + step}, shapes):
            keys["d" if key == HEAD_DIM else axis_of_key(key)] = key
    kv = getattr(base, KV_HEADS, None)
    if kv and "kv" not in keys and _moves(small, {raw_key(base, KV_HEADS): 2 * kv if kv == 1 else kv // 2}, shapes):
        keys["kv"] = KV_HEADS
    return keys


def _moves(small: Miniature, changes: dict[str, int | None], shapes: dict[str, tuple[int, ...]] | None) -> bool:
    """Whether other config entries give the same tensors other shapes."""
    try:
        moved = shapes_of(small.make(**changes))
    except modeling.REJECTED:
        return False
    return moved is not None and shapes is not None and moved.keys() == shapes.keys() and moved != shapes


def _perturbations(base: PreTrainedConfig, keys: Mapping[str, str]) -> Iterator[dict[str, int]]:
    heads, kv = raw_key(base, HEADS), raw_key(base, KV_HEADS)
    now = sizes_of(base, keys)
    yield {raw_key(base, HIDDEN): 2 * now["hidden"]}
    yield {raw_key(base, VOCAB): now["vocab"] + 16}
    if "kv" in keys:
        yield {heads: now["query"] * now["kv"] // 2, kv: max(1, now["kv"] // 2)}
        yield {heads: now["kv"] * 3, kv: now["kv"]}
        yield {heads: now["kv"] * 4, kv: now["kv"] * 2}
        yield {heads: now["kv"] * now["query"] * 2, kv: now["kv"] * 2}
    else:
        yield {heads: 2 * now["kv"] * now["query"]}
    for axis, key in keys.items():
        if axis not in ("hidden", "vocab", "kv") and key != HEADS:
            step = 8 if key == HEAD_DIM else (24 if now.get(axis, 0) >= 16 else 2)
            key, factor = size_key(base, key)
            yield {key: int((now.get(axis, 48) + step) / (factor or 1))}


def readings(config: PreTrainedConfig, base: PreTrainedConfig, keys: dict[str, str]) -> Iterator[dict[str, str]]:
    """The ways in which the heads of a model may be counted; the first that explains every tensor is taken."""
    yield keys
    for axis, key in keys.items():
        if axis.endswith("ffn"):
            yield {**keys, axis: f"{key} / 2"}  # two halves of the width that the config says
    if "d" in keys and not config.to_dict().get(HEAD_DIM):
        # Parts of the class follow a head size that the config does not name, others the hidden size.
        yield {a: k for a, k in keys.items() if a != "d"}
    if "kv" not in keys and "d" not in keys and getattr(base, HEADS, None):
        yield {**keys, "query": HEADS}  # one KV head for all query heads, though no key counts it


def samples(small: Miniature, base: PreTrainedConfig, left_open: dict[str, int], keys: dict[str, str]) -> list[Sample]:
    shapes = shapes_of(base) or {}
    seen = [Sample(sizes_of(base, keys), shapes)]
    for changes in _perturbations(base, keys):
        try:
            changed = small.make(**{**left_open, **changes})
        except modeling.REJECTED:
            continue
        moved = shapes_of(changed)
        if moved is not None and moved.keys() == shapes.keys():
            seen.append(Sample(sizes_of(changed, keys), moved))
    return seen


def expressions(keys: Mapping[str, str]) -> list[tuple[str, Signature]]:
    """Everything that a dimension is tried as, the likelier first; those of equal size are told apart later on."""
    widths = [a for a in keys if a not in ("hidden", "vocab", "kv", "query", "d")]
    heads = [
        "(kv query d)",
        "(kv d)",
        "[kv query d | kv d | kv d]",
        "(kv [query d | d | d])",
        "[kv d | kv d]",
        "(kv 2 d)",
        "(kv query 2 d)",
    ]
    texts = ["hidden", "vocab", *widths, *heads, "(kv query)", "kv", "[vocab | 1]", "[hidden | hidden | hidden]"]
    for w in widths:
        texts += [f"[{w} | {w}]", f"({w} 2)", f"(layer {w})"]
        # So many experts that every token visits are one wide MLP.
        texts += [f"({c} {w})" for c in widths if "shared" in keys[c] and w.endswith("ffn") and not c.endswith("ffn")]
    return [(t, parse(t)) for t in [*texts, "d"]]


def size_of(signature: Signature, sizes: Mapping[str, int]) -> int | None:
    return count(signature, sizes, (1,)) if signature.axes <= sizes.keys() else None


def shapes_of(config: PreTrainedConfig) -> dict[str, tuple[int, ...]] | None:
    """Tensor shapes under a config, None where the class does not accept it."""
    try:
        return {k: tuple(v.shape) for k, v in modeling.skeleton(config).state_dict().items()}
    except ModelError:
        return None

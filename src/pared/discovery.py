"""Discovery: a signature for every tensor, found by perturbing the config's sizes and by silencing units.

No architecture is named here. A small instance of the model's own class is built on the meta device again and
again, each time with one size of its config changed; the tensor dimensions that move, and by how much, tell which
axes they hold. Sizes that move together (GPT-2's heads and its hidden size) are told apart by what falls silent when a
unit of a consumer's input does (`pared.silence`). Where several layouts remain, the proof decides.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pared import modeling
from pared.axes import Fixed, Name, Signature, names, parse, size
from pared.errors import ModelError
from pared.miniature import Miniature, find_miniature, kind_keys, kinds_of
from pared.movement import Sample, expressions, readings, samples, size_keys, size_of
from pared.per_layer import BIASES, NUMBERS, PerLayer, layer_config, used_config
from pared.per_layer import HEADS as KEPT_HEADS
from pared.scales import follow_hidden
from pared.silence import Tied, head_arguments, tied_axes
from pared.structure import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    Layout,
    expert_runs,
    least_experts,
    raw_key,
    size_key,
    sizes_of,
)


@dataclass(frozen=True)
class Discovered:
    """Signatures of a small instance: for each tensor every candidate, the preferred one first.

    unexplained: tensors with a dimension that moves with the config as no known layout does, and how that is said.
    kinds: of each layer, as `kinds_of` gives them.
    head_arguments: arguments of a block that have an entry for each head -> the dimension that they stand in.
    scales_follow_hidden: as in Layout.
    """

    config: PreTrainedConfig
    keys: dict[str, str]
    candidates: dict[str, list[str]]
    unexplained: dict[str, str]
    kinds: tuple[Any, ...] = ()
    head_arguments: dict[str, int] = field(default_factory=dict)
    scales_follow_hidden: bool = False


def discover(config: PreTrainedConfig, per_layer: PerLayer | None = None) -> tuple[Layout, Discovered]:
    """The unproved layout of a model with this config, and the small instance on which it can be proved."""
    found = _probe(miniature_of(config))
    return assemble(config, per_layer or {}, found, modeling.skeleton(config, per_layer)), found


@lru_cache(maxsize=8)
def _miniature(model_type: str, text: str) -> Miniature:
    config, _ = modeling.make_config({**json.loads(text), "model_type": model_type})
    return find_miniature(config, kinds_of(modeling.skeleton(config), kind_keys(config)))


def miniature_of(config: PreTrainedConfig) -> Miniature:
    """The way to make small instances of this model that hold every kind of its blocks."""
    return _miniature(config.model_type, json.dumps(config.to_dict(), default=str))


def assemble(config: PreTrainedConfig, per_layer: PerLayer, found: Discovered, model: PreTrainedModel) -> Layout:
    """Carry the signatures of the small instance over to the model itself, and check them against every shape."""
    config = used_config(config, per_layer)
    prefix, layers = modeling.blocks(model)
    start = prefix + "."
    added = {i: [f"{n}.bias" for n in own.get(BIASES, ())] for i, own in per_layer.items()}
    kinds = [
        (tuple(n for n in names if n not in added.get(i, ())), *rest)
        for i, (names, *rest) in enumerate(kinds_of(model, kind_keys(model.config)))
    ]
    by_kind: dict[tuple[Any, str], set[str]] = {}
    for n, c in found.candidates.items():
        if n.startswith(start):
            number, local = n[len(start) :].split(".", 1)
            for kind in (found.kinds[int(number)], None):
                by_kind.setdefault((kind, local), set()).add(c[0])
    tensors: dict[str, Signature] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in model.state_dict().items():
        shapes[name] = tuple(value.shape)
        if name.startswith(start):
            number, local = name[len(start) :].split(".", 1)
            options = by_kind.get((kinds[int(number)], local)) or by_kind.get((None, local), set())
        else:
            options = set(found.candidates.get(name, ())[:1])
        signature = parse(next(iter(options))) if len(options) == 1 else None
        if signature is None or (not name.startswith(start) and signature.axes & {"kv", "query", "d"}):
            signature = parse(" ".join("_" * value.ndim))
        tensors[name] = signature
    for bias in (n for i, own in added.items() for n in (f"{start}{i}.{local}" for local in own) if n in tensors):
        tensors[bias] = parse(_split(tensors[bias.removesuffix("bias") + "weight"].text)[0])
    around = {n: s for n, s in tensors.items() if not n.startswith(start)}
    said = sizes_of(config, found.keys)
    for n, s in around.items():
        # What a layout of the small instance does not account for here (a table with rows for every layer) is left whole.
        if any(
            d != Fixed(None) and names(d) <= said.keys() and size(d, said) != m for d, m in zip(s.dims, shapes[n], strict=True)
        ):
            tensors[n] = around[n] = parse(" ".join("_" * len(shapes[n])))
    named = {"hidden", "vocab"}.union(*(s.axes for s in around.values()))
    outside = {a: n for a, n in said.items() if a in named} | _implied(around, shapes)
    # Beside layers with attention, what others hold as many of as there are heads (gates of a recurrence) is not heads.
    headless = [not any("d" in tensors[n].axes for n in tensors if n.startswith(f"{start}{i}.")) for i in range(len(layers))]
    headless = headless if not all(headless) else [False] * len(layers)
    layer_sizes = []
    for i in range(len(layers)):
        for n in tensors if headless[i] else ():
            if n.startswith(f"{start}{i}.") and tensors[n].axes & {"kv", "query"}:
                tensors[n] = _without_heads(tensors[n])
        own = {n: s for n, s in tensors.items() if n.startswith(f"{start}{i}.")}
        # Some families say the sizes of their layers apart by themselves.
        native = config.per_layer_config[i] if getattr(config, "is_heterogeneous", False) else config
        said = sizes_of(layer_config(native, per_layer.get(i, {})), found.keys)
        # A layer without experts has none, whatever the config says of the others.
        here = {"kv", "query", "d"}.union(*(s.axes for s in own.values())) - outside.keys()
        if headless[i]:
            here -= {"kv", "query"}
        layer_sizes.append({a: n for a, n in {**said, **_implied(own, shapes)}.items() if a in here})
    hidden = raw_key(config, HIDDEN)
    sharing = getattr(config, "kv_sharing_modes", None) or []  # layers whose keys and values later ones read
    numbered = next((own[NUMBERS] for own in per_layer.values() if NUMBERS in own), None)
    layout = Layout(
        model_type=config.model_type,
        prefix=prefix,
        num_layers=len(layers),
        tensors=tensors,
        shapes=shapes,
        sizes=outside,
        layer_sizes=tuple(layer_sizes),
        keys=found.keys,
        parents=_parents(tensors.values()),
        tied=dict(getattr(model, "all_tied_weights_keys", {}) or {}),
        consumers=_input_dims(model),
        head_arguments=found.head_arguments,
        scales_follow_hidden=found.scales_follow_hidden,
        follows=_followers(config, found.keys),
        runs={"expert": expert_runs(config)} if expert_runs(config) > 1 else {},
        least={"expert": least_experts(config)} if "expert" in found.keys else {},
        fixed_layers=frozenset(i for i, mode in enumerate(sharing) if mode == "store"),
        block_hidden=max((own[hidden] for own in per_layer.values() if hidden in own), default=None)
        if "d" in found.keys
        else None,
        numbers=tuple(numbered["numbers"]) if numbered else (),
        numbered_of=numbered["of"] if numbered else 0,
        biases={i: list(own[BIASES]) for i, own in per_layer.items() if BIASES in own},
        kept_heads={i: own[KEPT_HEADS]["kept"] for i, own in per_layer.items() if KEPT_HEADS in own},
    )
    _check_shapes(layout)
    return layout


def _without_heads(signature: Signature) -> Signature:
    dims = zip(_split(signature.text), signature.dims, strict=True)
    return parse(" ".join("_" if names(node) & {"kv", "query"} else text for text, node in dims))


def _implied(tensors: Mapping[str, Signature], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes read from the dimensions that an axis is alone in: what a config leaves open, or says for another layer."""
    out: dict[str, int] = {}
    for name, signature in tensors.items():
        for dim, node in enumerate(signature.dims):
            if isinstance(node, Name) and node.name not in ("kv", "query", "d"):
                out.setdefault(node.name, shapes[name][dim])
    return out


def _check_shapes(layout: Layout) -> None:
    for name, signature in layout.tensors.items():
        shape = layout.shapes[name]
        total = 1
        for n in shape:
            total *= n
        sizes = layout.sizes_at(layout.layer_of(name))
        if len(signature.dims) != len(shape) or not signature.axes <= sizes.keys() or layout.parameters(name) != total:
            raise ModelError(
                f"{name} has shape {list(shape)}, which the layout {signature.text!r} does not account for",
                where=f"model type {layout.model_type!r}",
            )


def _parents(signatures: Iterable[Signature]) -> dict[str, str]:
    """Nested axes: query heads always inside KV groups; any axis that never stands without `expert`."""
    parents = {"query": "kv"}
    seen: dict[str, bool] = {}
    for s in signatures:
        for axis in s.axes - {"hidden", "expert"}:
            seen[axis] = seen.get(axis, True) and "expert" in s.axes
    parents.update({a: "expert" for a, always in seen.items() if always})
    return parents


def _followers(config: PreTrainedConfig, keys: Mapping[str, str]) -> dict[str, tuple[str, int]]:
    """Axes that one config key says together: the later ones, which are made from the first, follow it."""
    leaders: dict[str, str] = {}
    out: dict[str, tuple[str, int]] = {}
    for axis, key in keys.items():
        key, factor = size_key(config, key)
        leader = leaders.setdefault(raw_key(config, key), axis)
        if leader != axis and axis.endswith("ffn"):
            out[axis] = leader, int(factor or 1)
    return out


def _input_dims(model: nn.Module) -> dict[str, int]:
    """For each weight that is multiplied with activations, the dimension that the input runs along."""
    out: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            out[f"{name}.weight"] = 1
        elif type(module).__name__ == "Conv1D":  # transformers' own transposed linear of GPT-2's time
            out[f"{name}.weight"] = 0
        else:
            for leaf, p in module.named_parameters(recurse=False):
                if p.ndim == 3:
                    out[f"{name}.{leaf}" if name else leaf] = 1 if getattr(module, "is_transposed", False) else 2
    return out


def _probe(small: Miniature) -> Discovered:
    """Perturb every size of the config and explain what moves."""
    base = small.make()
    keys = size_keys(small, base)
    # Sizes that a config leaves open get one of their own here, or they could not be told from what they follow.
    left_open = {k: 80 for k in keys.values() if getattr(base, k, None) is None and k not in (HEAD_DIM, KV_HEADS)}
    base = small.make(**left_open) if left_open else base
    best = min(
        (_explain(base, read, samples(small, base, left_open, read)) for read in readings(small.config, base, keys)),
        key=lambda found: len(found.unexplained),
    )
    used = {a for texts in best.candidates.values() for a in parse(texts[0]).axes}
    best = replace(best, keys={a: k for a, k in best.keys.items() if a in used or not a.endswith("ffn")})
    tied = tied_axes(base, assemble(base, {}, best, modeling.skeleton(base)), best.candidates)
    arguments = head_arguments(small, base) if getattr(base, HEADS, None) else {}
    return replace(
        best,
        candidates=_narrowed(best, tied),
        unexplained=_left(best, tied),
        head_arguments=arguments,
        scales_follow_hidden=follow_hidden(small),
    )


def _narrowed(found: Discovered, tied: Tied) -> dict[str, list[str]]:
    """Candidates with what was found out about some dimensions: (tensor, dimension) -> texts."""
    out = {}
    for name, texts in found.candidates.items():
        dims = (
            [list(dict.fromkeys(column)) for column in zip(*(_split(t) for t in texts), strict=True)] if texts != [""] else []
        )
        dims = [tied.get((name, dim), options) for dim, options in enumerate(dims)]
        out[name] = [" ".join(c) for c in itertools.product(*dims)]
    return out


def _split(text: str) -> list[str]:
    """The texts of a signature's dimensions."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([") - (c in ")]")
        if c == " " and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _left(found: Discovered, tied: Tied) -> dict[str, str]:
    return {n: why for n, why in found.unexplained.items() if not any(name == n for name, _ in tied)}


def _explain(base: PreTrainedConfig, keys: dict[str, str], seen: list[Sample]) -> Discovered:
    model = modeling.skeleton(base)
    start = modeling.blocks(model)[0] + "."
    inside = [(t, e) for t, e in expressions(keys) if "layer" not in e.axes]
    candidates: dict[str, list[str]] = {}
    unexplained: dict[str, str] = {}
    for name, shape in seen[0].shapes.items():
        dims: list[list[str]] = []
        tried = inside if name.startswith(start) else expressions(keys)
        for dim in range(len(shape)):
            values = [s.shapes[name][dim] for s in seen]
            fits = [t for t, e in tried if [size_of(e, s.sizes) for s in seen] == values]
            if not fits and len(set(values)) > 1:
                unexplained[name] = f"dimension {dim} of {name} moves with the config as no known layout does"
            dims.append(fits or ["_"])
        candidates[name] = [" ".join(c) for c in itertools.product(*dims)]
    keys, candidates = _apart_from_experts(keys, candidates)
    return Discovered(base, keys, candidates, unexplained, tuple(kinds_of(model, kind_keys(base))))


def _apart_from_experts(keys: dict[str, str], candidates: dict[str, list[str]]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Widths that experts share with an MLP beside or instead of them get an axis of their own there.

    The config says both with one number, but which channels stay is chosen anew in each expert, and in that MLP.
    """
    keys = dict(keys)
    texts = [t for options in candidates.values() for t in options]
    for axis in [a for a in keys if a.endswith("ffn") and any({a, "expert"} <= parse(t).axes for t in texts)]:
        products = {rf"\({c} {axis}\)": f"{keys[axis]} * {keys[c]}" for c in keys if any(f"({c} {axis})" in t for t in texts)}
        for pattern, key in {**products, rf"\b{axis}\b": keys[axis]}.items():
            apart = {n for n, o in candidates.items() for t in o if "expert" not in parse(t).axes and re.search(pattern, t)}
            if apart:
                new = next(n for n in ("shared_ffn", "dense_ffn", f"shared_{axis}") if n not in keys)
                keys[new] = key
                candidates = {n: [re.sub(pattern, new, t) for t in o] if n in apart else o for n, o in candidates.items()}
    return keys, candidates

"""Discovery: a signature for every tensor, found by perturbing the config's sizes.

No architecture is named here. A small instance of the model's own class is built on the meta device again and
again, each time with one size of its config changed; the tensor dimensions that move, and by how much, tell which
axes they hold. Where a fused dimension admits several layouts all are kept as candidates, and the proof decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pared import modeling
from pared.axes import Name, Signature, count, parse
from pared.errors import ModelError
from pared.structure import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB, Layout, keep_layers, raw_key, sizes_of

# Other sizes keep their config key as the axis name, but for these, which the field has shorter words for.
AXIS_OF_KEY = {
    "intermediate_size": "ffn",
    "n_inner": "ffn",
    "ffn_dim": "ffn",
    "moe_intermediate_size": "expert_ffn",
    "shared_expert_intermediate_size": "shared_ffn",
    "num_local_experts": "expert",
    "num_experts": "expert",
    "n_routed_experts": "expert",
    "moe_num_experts": "expert",
}


@dataclass(frozen=True)
class Sample:
    """One tiny config: its axis sizes and the shapes that they gave."""

    sizes: dict[str, int]
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Discovered:
    """Signatures of a tiny instance: for each tensor every candidate, the preferred one first."""

    config: PreTrainedConfig
    keys: dict[str, str]
    candidates: dict[str, list[str]]
    unexplained: dict[str, str]


def discover(config: PreTrainedConfig, per_layer: modeling.PerLayer | None = None) -> tuple[Layout, Discovered]:
    """The unproved layout of a model with this config, and the tiny instance on which it can be proved."""
    model = modeling.skeleton(config, per_layer)
    _, layers = modeling.blocks(model)
    variants = _variants(model, layers)
    for n in (2, 3, 4, 6, 8, 12):
        n = min(n, len(layers))
        if set(variants[:n]) == set(variants) or n == len(layers):
            break
    else:
        raise ModelError("the kinds of blocks of this model are too many to prove", where=f"model type {config.model_type!r}")
    found = _probe(config, n)
    return assemble(config, per_layer or {}, found, model), found


def assemble(config: PreTrainedConfig, per_layer: modeling.PerLayer, found: Discovered, model: PreTrainedModel) -> Layout:
    """Carry the signatures of the tiny instance over to the model itself, and check them against every shape."""
    prefix, layers = modeling.blocks(model)
    text = {n: c[0] for n, c in found.candidates.items()}
    tiny_prefix = prefix + "."
    by_local: dict[str, set[str]] = {}
    for n, s in text.items():
        if n.startswith(tiny_prefix):
            by_local.setdefault(n[len(tiny_prefix) :].split(".", 1)[1], set()).add(s)
    tensors: dict[str, Signature] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in model.state_dict().items():
        shapes[name] = tuple(value.shape)
        if name.startswith(tiny_prefix):
            options = by_local.get(name[len(tiny_prefix) :].split(".", 1)[1], set())
        else:
            options = {text[name]} if name in text else set()
        if len(options) != 1:
            options = {" ".join("_" * value.ndim)}
        tensors[name] = parse(next(iter(options)))
    implied = _implied_sizes(tensors, shapes, found.keys)
    global_sizes = sizes_of(config, found.keys)
    layer_sizes = tuple(
        {**implied, **sizes_of(modeling.layer_config(config, per_layer.get(i, {})), found.keys)} for i in range(len(layers))
    )
    shared = {"hidden", "vocab"}
    layout = Layout(
        model_type=config.model_type,
        prefix=prefix,
        num_layers=len(layers),
        tensors=tensors,
        shapes=shapes,
        sizes={a: n for a, n in global_sizes.items() if a in shared},
        layer_sizes=tuple({a: n for a, n in s.items() if a not in shared} for s in layer_sizes),
        keys=found.keys,
        parents=_parents(tensors.values()),
        tied=dict(getattr(model, "all_tied_weights_keys", {}) or {}),
        consumers=_input_dims(model),
    )
    _check_shapes(layout)
    return layout


def _implied_sizes(
    tensors: Mapping[str, Signature], shapes: Mapping[str, tuple[int, ...]], keys: Mapping[str, str]
) -> dict[str, int]:
    """Sizes that a config leaves open (GPT-2's n_inner), read from the dimensions that they are alone in."""
    out: dict[str, int] = {}
    for name, signature in tensors.items():
        for dim, node in enumerate(signature.dims):
            if isinstance(node, Name) and node.name in keys:
                out.setdefault(node.name, shapes[name][dim])
    return {a: n for a, n in out.items() if a not in ("kv", "query", "d")}


def _check_shapes(layout: Layout) -> None:
    for name, signature in layout.tensors.items():
        shape = layout.shapes[name]
        total = 1
        for n in shape:
            total *= n
        if len(signature.dims) != len(shape) or layout.parameters(name) != total:
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


def _variants(model: PreTrainedModel, layers: nn.ModuleList) -> list[tuple[Any, ...]]:
    """What kind of block each layer is: its tensors and its entry in every per-layer list of the config."""
    data = model.config.to_dict()
    lists = [v for v in data.values() if isinstance(v, list) and len(v) == len(layers)]
    return [(tuple(layer.state_dict()), *(str(v[i]) for v in lists)) for i, layer in enumerate(layers)]


def tiny_config(config: PreTrainedConfig, layers: int, **sizes: int | None) -> PreTrainedConfig:
    """A config of the same class and flags with small sizes."""
    total = config.num_hidden_layers
    data = keep_layers(config.to_dict(), list(range(layers)), total)
    data = {
        k: v
        for k, v in data.items()
        if k not in ("quantization_config", "auto_map", "torch_dtype", "dtype", modeling.PER_LAYER)
    }
    heads, kv = getattr(config, HEADS, None), getattr(config, KV_HEADS, None)
    grouped = bool(kv) and kv != heads
    small: dict[str, Any] = {
        raw_key(config, HIDDEN): 96,
        raw_key(config, VOCAB): 128,
        raw_key(config, LAYERS): layers,
        raw_key(config, HEADS): 4 if not grouped or kv == 1 else 8,
        "max_position_embeddings": 64,
        "head_dim": 16,
    }
    if kv:
        small[raw_key(config, KV_HEADS)] = min(4, kv) if kv == 1 else 4
    small.update({k: None for k in data if k.endswith("_token_id")})
    for key in AXIS_OF_KEY:
        if isinstance(value := data.get(key), int):
            small[key] = min(value, 4) if AXIS_OF_KEY[key] == "expert" else 80
    for key, value in data.items():
        if key.endswith("sliding_window") and value:
            small[key] = 8
        if key in ("num_experts_per_tok", "moe_k") and value:
            small[key] = min(value, 2)
        if key.startswith("rope_") and isinstance(value, dict):
            data[key] = _plain_rope(value)
    data["max_position_embeddings"] = 64
    wanted = {**data, **small, **sizes}
    try:
        return type(config).from_dict(wanted)
    except AttributeError:  # head_dim is computed, and can not be set
        return type(config).from_dict({k: v for k, v in wanted.items() if k != HEAD_DIM})


def _plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings without length scaling, whose factor lists depend on the head size."""
    if any(isinstance(v, dict) for v in rope.values()):
        return {k: _plain_rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    return {k: v for k, v in rope.items() if k in ("rope_theta", "partial_rotary_factor")} | {"rope_type": "default"}


def _shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]] | None:
    """Tensor shapes under a config, None where the class does not accept it."""
    try:
        return {k: tuple(v.shape) for k, v in modeling.skeleton(config).state_dict().items()}
    except ModelError:
        return None


def _probe(config: PreTrainedConfig, layers: int) -> Discovered:
    """Perturb every size of the config and explain what moves."""
    base_config = tiny_config(config, layers)
    base_shapes = {k: tuple(v.shape) for k, v in modeling.skeleton(base_config).state_dict().items()}
    keys = _size_keys(config, layers, base_config, base_shapes)
    open_keys = {k: 80 for k in keys.values() if getattr(base_config, k, None) is None and k != HEAD_DIM and k != KV_HEADS}
    if open_keys:
        base_config = tiny_config(config, layers, **open_keys)
        base_shapes = {k: tuple(v.shape) for k, v in modeling.skeleton(base_config).state_dict().items()}
    samples = [Sample(sizes_of(base_config, keys), base_shapes)]
    for changes in _perturbations(base_config, keys):
        try:
            changed = tiny_config(config, layers, **{**open_keys, **changes})
        except modeling.REJECTED:
            continue
        shapes = _shapes(changed)
        if shapes is not None and shapes.keys() == base_shapes.keys():
            samples.append(Sample(sizes_of(changed, keys), shapes))
    expressions = _expressions(keys)
    candidates: dict[str, list[str]] = {}
    unexplained: dict[str, str] = {}
    for name, shape in base_shapes.items():
        dims: list[list[str]] = []
        for dim in range(len(shape)):
            values = [s.shapes[name][dim] for s in samples]
            fits = [t for t, e in expressions if [_size_of(e, s.sizes) for s in samples] == values]
            if not fits and len(set(values)) > 1:
                unexplained[name] = f"dimension {dim} of {name} moves with the config as no known layout does"
            dims.append(fits or ["_"])
        candidates[name] = [" ".join(c) for c in itertools.product(*dims)]
    return Discovered(base_config, keys, candidates, unexplained)


def _size_of(signature: Signature, sizes: Mapping[str, int]) -> int | None:
    return count(signature, sizes, (1,)) if signature.axes <= sizes.keys() else None


def _size_keys(
    config: PreTrainedConfig, layers: int, base: PreTrainedConfig, base_shapes: dict[str, tuple[int, ...]]
) -> dict[str, str]:
    """axis -> config key, for every key whose change moves some tensor dimension of the blocks."""
    known = {raw_key(config, k): k for k in (HIDDEN, HEADS, KV_HEADS, LAYERS, VOCAB)}
    keys: dict[str, str] = {"hidden": HIDDEN, "vocab": VOCAB}
    data = base.to_dict()
    for key in [*data, HEAD_DIM]:
        value = data.get(key)
        if key in known or isinstance(value, bool) or not (value is None or isinstance(value, int)):
            continue
        if value is None and not any(w in key for w in ("inner", "ffn", "intermediate", HEAD_DIM)):
            continue
        changed = (value or 48) + (8 if key == HEAD_DIM or "dim" in key or "size" in key or value is None else 2)
        try:
            shapes = _shapes(tiny_config(config, layers, **{key: changed}))
        except modeling.REJECTED:
            continue
        if shapes is None or shapes.keys() != base_shapes.keys() or shapes == base_shapes:
            continue
        keys["d" if key == HEAD_DIM else AXIS_OF_KEY.get(key, key)] = key
    if data.get(raw_key(config, KV_HEADS)) is not None:
        keys["kv"] = KV_HEADS
    return keys


def _perturbations(base: PreTrainedConfig, keys: Mapping[str, str]) -> Iterator[dict[str, int]]:
    heads, kv = raw_key(base, HEADS), raw_key(base, KV_HEADS)
    now = sizes_of(base, keys)
    yield {raw_key(base, HIDDEN): 192}
    yield {raw_key(base, VOCAB): 144}
    if "kv" in keys:
        yield {heads: now["query"] * now["kv"] // 2, kv: max(1, now["kv"] // 2)}
        yield {heads: now["kv"] * 3, kv: now["kv"]}
        yield {heads: now["kv"] * 4, kv: now["kv"] * 2}
    else:
        yield {heads: 2 * now["kv"]}
    for axis, key in keys.items():
        if axis not in ("hidden", "vocab", "kv"):
            step = 8 if key == HEAD_DIM else (24 if now.get(axis, 0) >= 16 else 2)
            yield {key: now.get(axis, 48) + step}


def _expressions(keys: Mapping[str, str]) -> list[tuple[str, Signature]]:
    """Everything that a dimension is tried as, the likelier first; those of equal size are told apart by the proof."""
    widths = [a for a in keys if a not in ("hidden", "vocab", "kv", "d")]
    texts = ["hidden", "vocab", *widths]
    if "d" in keys:
        texts += ["(kv query d)", "(kv d)", "[kv query d | kv d | kv d]", "(kv [query d | d | d])", "[kv d | kv d]", "(kv 2 d)"]
    texts += ["(kv query)", "kv"]
    for w in widths:
        texts += [f"[{w} | {w}]", f"({w} 2)"]
    texts += ["d"] if "d" in keys else []
    return [(t, parse(t)) for t in texts]

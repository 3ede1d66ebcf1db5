"""Miniatures: small random instances of a model's own class, on which its structure is found out and proved."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pared import modeling
from pared.errors import ModelError
from pared.per_layer import HEADS, PER_LAYER, SHAPES
from pared.structure import (
    GROUPS,
    HEAD_DIM,
    HIDDEN,
    KV_HEADS,
    TOP_GROUPS,
    TOP_K,
    VOCAB,
    config_entries,
    expert_runs,
    hidden_keys,
    layer_runs,
    layer_total,
    raw_key,
    top_k_key,
    with_layers,
)
from pared.structure import HEADS as NUM_HEADS

# Sizes of FFNs keep their config key as the axis name, but for these, which the field has shorter words for.
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
_NOT_MODEL = ("quantization_config", "auto_map", "torch_dtype", "dtype", PER_LAYER, SHAPES, HEADS)
_LENGTH_SCALING = ("linear", "dynamic", "yarn", "longrope", "llama3", "su", "mrope", "ntk")
# Several copies of a miniature are held during a proof.
_MOST_PARAMETERS = 300_000_000
_MOST_TO_INITIALISE = 30_000_000
_VOCABULARY, _POSITIONS, _TOKENS = 128, 64, 12


@dataclass(frozen=True)
class Scale:
    """One way to shrink a config. head_dim: "set" to 16, "keep" what it says, or "wide": keep it and let hidden follow.

    by: "parts", each size to a small one of its own, or "ratio", all heads and widths by one power of two. computed:
    whether entries that the class computes when it is made, and does not declare, are left to it.
    """

    head_dim: str
    by: str
    special_tokens: bool
    computed: bool = False


SCALES = [Scale(d, by, t) for t in (False, True) for d, by in (("set", "parts"), ("keep", "parts"), ("wide", "parts"))] + [
    Scale("keep", "ratio", t) for t in (False, True)
]
SCALES += [replace(scale, computed=True) for scale in SCALES if not scale.special_tokens]


@dataclass(frozen=True)
class Miniature:
    """A way to make small configs of one class that build and run: which layers are kept, and at what scale."""

    config: PreTrainedConfig
    layers: tuple[int, ...]
    scale: Scale

    def make(self, **sizes: int | None) -> PreTrainedConfig:
        """A small config with the given entries changed. Raises what the config class raises on entries that do not fit."""
        return _shrink(self.config, self.layers, self.scale, sizes)


def find_miniature(config: PreTrainedConfig, kinds: Iterable[Any]) -> Miniature:
    """The smallest instance that holds every kind of block of the model, builds, and gives finite logits.

    kinds: of each layer of the model, as `kinds_of` gives them. ModelError where there is none.
    """
    wanted, keys = list(kinds), kind_keys(config)
    reasons: dict[str, None] = {}
    complete = False
    for layers in _choices(wanted):
        if complete:
            break  # it holds every kind and does not run: more layers would not either
        for scale in SCALES if _computed(config) else [s for s in SCALES if not s.computed]:
            small = Miniature(config, layers, scale)
            try:
                made = small.make()
                built = modeling.skeleton(made)
                if sum(p.numel() for p in built.parameters()) > _MOST_PARAMETERS:
                    raise ModelError("its parts can not be made small")
                got = kinds_of(built, keys)
                alone = len(set(got)) == len(got) and len(set(wanted)) < len(wanted)
                if set(wanted) - set(got) or alone or (wanted[-1] in wanted[-2:-1] and len(got) > 1 and got[-1] != got[-2]):
                    # Another scale does not bring them back. (The last kind, and one at least, come twice: a layer can go.)
                    reasons["some kinds of blocks are missing in it"] = None
                    break
                complete = True
                check_runs(made)
                return small
            except (*modeling.REJECTED, ModelError, RuntimeError, IndexError, NotImplementedError, AssertionError) as error:
                reasons[f"{error.what if isinstance(error, ModelError) else error}".splitlines()[0]] = None
    raise ModelError(
        f"no small instance of this model can be made to prove its structure on: {next(reversed(reasons), 'it has no layers')}",
        where=f"model type {config.model_type!r}",
    )


def _choices(kinds: list[Any]) -> Iterator[tuple[int, ...]]:
    """Sets of layers to keep, the smaller first: from the front, or one of each kind."""
    first_of_each = tuple(sorted({k: i for i, k in reversed(list(enumerate(kinds)))}.values()))
    seen: set[tuple[int, ...]] = set()
    for n in (2, 3, 4, 6, 8, 12):
        front = tuple(range(min(n, len(kinds))))
        spread = tuple(sorted({*first_of_each, *front[: max(0, n - len(first_of_each))]}))
        for layers in (front, spread):
            if layers and len(layers) <= max(n, 2) and layers not in seen:
                seen.add(layers)
                yield layers


def kind_keys(config: PreTrainedConfig) -> list[str]:
    """The config's lists with the kind of each layer. Kinds have names or are a flag; numbers are sizes or indices."""
    total = layer_total(config)
    return [
        k
        for k, v in config_entries(config).items()
        if isinstance(v, list) and len(v) == total and all(isinstance(x, str | bool) for x in v)
    ]


def kinds_of(model: PreTrainedModel, keys: Iterable[str]) -> list[tuple[Any, ...]]:
    """What kind of block each layer is: its tensors, and its entry in the named lists of the config."""
    _, layers = modeling.blocks(model)
    lists = [getattr(model.config, k) or [] for k in keys]
    lists.append([run for run, n in layer_runs(model.config).items() for _ in range(n)])
    return [(tuple(layer.state_dict()), *(str(v[i : i + 1]) for v in lists)) for i, layer in enumerate(layers)]


def _shrink(config: PreTrainedConfig, layers: tuple[int, ...], scale: Scale, sizes: dict[str, int | None]) -> PreTrainedConfig:
    data = with_layers(config, {k: v for k, v in config_entries(config).items() if k not in _NOT_MODEL}, list(layers))
    if scale.computed:
        data = {k: v for k, v in data.items() if k not in _computed(config)}
    small = _ratio(config, data) if scale.by == "ratio" else _parts(config, data, scale)
    small[raw_key(config, VOCAB)] = _VOCABULARY
    small |= _experts(config, data)
    for key, value in data.items():
        if key.endswith("_token_id"):
            small[key] = (min(1, value) if isinstance(value, int) else value) if scale.special_tokens else None
        elif key.endswith("sliding_window") and value:
            small[key] = 8
        elif "vocab_size" in key and isinstance(value, int) and value > _VOCABULARY:
            small[key] = _VOCABULARY
        elif key.startswith("rope_") and isinstance(value, dict):
            small[key] = _plain_rope(value)
        elif isinstance(value, dict) and key in config.sub_configs:  # parts for other modalities
            small[key] = {k: min(v, 1) if k in ("num_hidden_layers", "num_blocks", "depth") else v for k, v in value.items()}
    if raw_key(config, "max_position_embeddings") in data:
        small[raw_key(config, "max_position_embeddings")] = _POSITIONS
    wanted = {**data, **small, **sizes}
    wanted |= dict.fromkeys(hidden_keys(config), wanted[raw_key(config, HIDDEN)])
    if isinstance(computed := getattr(type(config), HEAD_DIM, None), property) and computed.fset is None:
        wanted.pop(HEAD_DIM, None)
    return type(config).from_dict(wanted)


def _computed(config: PreTrainedConfig) -> set[str]:
    """Entries that the class does not declare and yet has."""
    declared = {f.name for f in fields(config)} if is_dataclass(config) else set()
    return {k for k in config.to_dict() if declared and k not in declared}


def _experts(config: PreTrainedConfig, data: dict[str, Any]) -> dict[str, Any]:
    """A few experts, of which a token visits two. Routers that choose groups first get two groups, and leave one out
    where the model's leave any: with four experts in each, some can go."""
    small: dict[str, Any] = {}
    counts = {k: v for k, v in data.items() if AXIS_OF_KEY.get(k) == "expert" and isinstance(v, int)}
    key = top_k_key(config) or raw_key(config, TOP_K)
    if counts and not isinstance(data.get(key), list):
        small[key] = min(data.get(key) or 2, 2)
    if (groups := expert_runs(config)) > 1:
        chosen = 1 if getattr(config, TOP_GROUPS) < groups else 2
        small |= {raw_key(config, GROUPS): 2, raw_key(config, TOP_GROUPS): chosen}
        return small | {k: 2 * min(v // groups, 4) for k, v in counts.items()}
    return small | {k: min(v, 6) for k, v in counts.items()}


def _parts(config: PreTrainedConfig, data: dict[str, Any], scale: Scale) -> dict[str, Any]:
    heads, kv = getattr(config, NUM_HEADS, None), getattr(config, KV_HEADS, None)
    grouped = bool(kv) and kv != heads
    n = 4 if not grouped or kv == 1 else 8
    small: dict[str, Any] = {raw_key(config, HIDDEN): 96, raw_key(config, NUM_HEADS): n}
    if scale.head_dim == "set":
        small[HEAD_DIM] = 16
    elif scale.head_dim == "wide" and heads:
        small[raw_key(config, HIDDEN)] = n * (getattr(config, HIDDEN) // heads)
    if kv:
        small[raw_key(config, KV_HEADS)] = min(4, kv) if kv == 1 else 4
    small.update({k: 80 for k, v in data.items() if _is_width(k) and isinstance(v, int) and v > 0})
    small.update({k: [80] * len(v) for k, v in data.items() if _is_width(k) and isinstance(v, list)})
    return small


def _is_width(key: str) -> bool:
    """Whether a config key says the width of an FFN."""
    return axis_of_key(key).endswith("ffn")


_WIDTH = re.compile(r"intermediate_size|ffn_hidden_size|ffn_dim|ffn_size|ff_dim|dim_ff|n_inner|inner_dim|dff")


def axis_of_key(key: str) -> str:
    """What pared calls the axis whose size a config key says: widths of FFNs end in "ffn", the others are called as the key."""
    named = AXIS_OF_KEY.get(key)
    if named is None and _WIDTH.search(key) and "factor" not in key:
        named = _WIDTH.sub("ffn", key)
        named = named if named.endswith("ffn") else f"{named}_ffn"
    return named or key


def _ratio(config: PreTrainedConfig, data: dict[str, Any]) -> dict[str, Any]:
    """Heads and widths by one power of two, so that what is said of one in terms of another stays true."""
    widths = {raw_key(config, HIDDEN), *(k for k in AXIS_OF_KEY if AXIS_OF_KEY[k] != "expert"), "mamba_d_ssm", "lru_width"}
    scaled = {
        k: v
        for k, v in data.items()
        if isinstance(v, int) and v > 1 and (k in widths or k.endswith(("heads", "n_head", "groups")))
    }
    hidden = scaled.get(raw_key(config, HIDDEN), 0)
    by = max(1, math.gcd(*scaled.values())) if scaled else 1
    by = min(by & -by, max(1, hidden // 128))
    by = 1 << (by.bit_length() - 1)
    # Two of everything have to stay, or nothing could be removed.
    while by > 1 and any(v // by < 2 for v in scaled.values()):
        by //= 2
    return {k: v // by for k, v in scaled.items()}


def _plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings without length scaling, whose factor lists depend on the head size."""
    if any(isinstance(v, dict) for v in rope.values()):
        return {k: _plain_rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    plain = {} if rope.get("rope_type") not in _LENGTH_SCALING else {"rope_type": "default"}
    return {k: v for k, v in rope.items() if not isinstance(v, list)} | plain


def probe_ids(rows: int = 2) -> Tensor:
    """Token ids int64 [rows, length] that every miniature knows, none of them special."""
    return torch.randint(3, 120, (rows, _TOKENS), generator=torch.Generator().manual_seed(2))


def check_runs(config: PreTrainedConfig) -> None:
    """ModelError unless the random instance of this config gives logits that mean something."""
    with torch.no_grad():
        check_logits(random_model(config)(input_ids=probe_ids(), use_cache=False).logits)


def check_logits(logits: Tensor) -> None:
    """ModelError where logits could hide what a tensor does: not finite, or all alike."""
    if not torch.isfinite(logits).all() or float(logits.std()) < 1e-3:
        raise ModelError("the random instance gives no meaningful logits")


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The random instance of a config, the same each time; not to be changed."""
    return _random(config.model_type, json.dumps(config.to_dict(), default=str))


@lru_cache(maxsize=4)
def _random(model_type: str, text: str) -> PreTrainedModel:
    config, _ = modeling.make_config({**json.loads(text), "model_type": model_type})
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        return _filled(modeling.skeleton(config, dtype=torch.float32).to_empty(device="cpu"))
    finally:
        torch.random.set_rng_state(state)


def _constants(model: PreTrainedModel) -> dict[str, float]:
    """Parameters with one entry for each channel that their class sets all to one number: what they scale expects that."""
    names = [n for n, p in model.named_parameters() if p.ndim == 1 and not n.endswith(("weight", "bias"))]
    if not names or sum(p.numel() for p in model.parameters()) > _MOST_TO_INITIALISE:
        return {}
    with modeling.hf_quiet():
        made = dict(AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).named_parameters())
    return {n: float(v) for n in names if (v := made[n].detach().min()) == made[n].detach().max() and v != 0}


def _filled(model: PreTrainedModel) -> PreTrainedModel:
    """Weights of a size at which every part matters to the logits (fresh initialisation is near zero)."""
    own = _constants(model)
    for name, p in model.named_parameters():
        with torch.no_grad():
            if p.ndim >= 2:
                p.normal_(0, p.shape[-1] ** -0.5)
            elif name in own:
                p.normal_(own[name], 0.1 * abs(own[name]))
            else:
                p.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
    for name, b in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if b.is_floating_point() and leaf not in model.get_submodule(owner)._non_persistent_buffers_set:
            with torch.no_grad():
                b.normal_(0, 0.1)
    model.tie_weights()
    for module in model.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    with torch.no_grad():
        for p in model.parameters():
            p._is_hf_initialized = True  # type: ignore[attr-defined]
    modeling.init_(model, model.modules())
    return model.eval()

"""The census: what can be removed from every type of causal language model that transformers knows, and why not the rest."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pared import modeling
from pared.discovery import miniature_of
from pared.errors import ModelError, ParedError
from pared.miniature import AXIS_OF_KEY, probe_ids, random_model
from pared.proof import proved_layout
from pared.structure import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, Proof


@dataclass(frozen=True)
class Entry:
    """One model type. outside: why it is not a decoder-only language model; failed: why no layout was found."""

    model_type: str
    proofs: dict[str, Proof] = field(default_factory=dict)
    outside: str = ""
    failed: str = ""


def model_types() -> list[str]:
    """Every model type that transformers registers a causal language model for."""
    return sorted(t for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if t in CONFIG_MAPPING)


def take_census(types: Iterable[str] | None = None) -> Iterator[Entry]:
    """Discover and prove each type, on the structure that its default config describes."""
    for model_type in model_types() if types is None else types:
        yield examine(model_type)


def examine(model_type: str) -> Entry:
    """One entry of the census."""
    config = None
    try:
        config = CONFIG_MAPPING[model_type]()
        if why := _outside(config):
            return Entry(model_type, outside=why)
        config, per_layer = modeling.make_config(_complete(config).to_dict())
        if not _causal(config):
            return Entry(model_type, outside=_ENCODER)
        if _half(config):
            return Entry(model_type, outside=_DECODER)
        return Entry(model_type, proved_layout(config, per_layer).proofs)
    except (ParedError, *modeling.REJECTED, *_BROKEN) as error:
        if config is None and (why := _outside(CONFIG_MAPPING[model_type])):
            return Entry(model_type, outside=why)
        if getattr(config, "is_decoder", None) is False:
            return Entry(model_type, outside=_ENCODER)
        text = (error.what if isinstance(error, ParedError) else str(error)).strip().splitlines() or [""]
        return Entry(model_type, failed=text[0] if isinstance(error, ParedError) else f"{type(error).__name__}: {text[0]}")


_DECODER = "the decoder of an encoder-decoder: parts of its blocks read what an encoder gives"
_ENCODER = "an encoder with a language-model head: its tokens see those behind them"
# What classes raise that can not be built or run at all here.
_BROKEN = (RuntimeError, IndexError, ImportError, AssertionError, NotImplementedError)


def _outside(config: PreTrainedConfig | type[PreTrainedConfig]) -> str:
    if getattr(config, "is_encoder_decoder", False) or hasattr(config, "encoder_layers"):
        return "an encoder-decoder"
    parts = {**config.sub_configs, **getattr(config, "sub_configs_defaults", {})}
    if "text_config" in parts:
        text = getattr(config, "text_config", None) or parts["text_config"]
        return f"a wrapper of several modalities; its text part is {getattr(text, 'model_type', 'a type of its own')!r}"
    return ""


def _complete(config: PreTrainedConfig) -> PreTrainedConfig:
    """A default config whose class leaves entries open that it can not do without: they are filled in as checkpoints do."""
    for fill in (None, _sizes, _open_counts):
        try:
            modeling.skeleton(config)
            return config
        except ModelError as error:
            refused = error
        if fill is not None:
            for part in (getattr(config, name) for name in config.sub_configs):
                if part is not None and not hasattr(part, "rope_theta"):
                    part.rope_theta = 10000.0
            for key, value in fill(config).items():
                if not getattr(config, key, 0) and value:
                    setattr(config, key, value)
            config = type(config).from_dict(config.to_dict())
    try:
        modeling.skeleton(config)
    except ModelError:
        raise refused from None
    return config


def _sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """What checkpoints say of heads, experts, and the layers' kinds."""
    data = config.to_dict()
    heads, layers = getattr(config, HEADS, None), getattr(config, LAYERS, None)
    kinds = getattr(config, "layer_types", None) or (["full_attention"] * layers if layers else [])
    fill: dict[str, Any] = {
        HEAD_DIM: getattr(config, HIDDEN) // heads if heads else None,
        KV_HEADS: heads,
        "layer_types": kinds,
    }
    fill["rope_parameters"] = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in kinds}
    fill |= {k: 8 for k in data if AXIS_OF_KEY.get(k) == "expert"}
    fill |= {k: 2 for k in data if k.endswith(("per_tok", "per_token"))}
    return fill | {k: 1 for k in data if "shared_experts" in k or k.endswith("_group")}


def _open_counts(config: PreTrainedConfig) -> dict[str, Any]:
    """Small numbers for what the class says to be one or none: one KV head of an indexer, a head size, a budget of tokens."""
    hints = {k: str(h) for c in reversed(type(config).__mro__) for k, h in vars(c).get("__annotations__", {}).items()}
    opened = [
        k for k, v in config.to_dict().items() if v is None and hints.get(k) == "int | None" and not k.endswith("token_id")
    ]

    def number(key: str) -> int:
        if key.endswith("kv_heads"):
            return 1
        if key.endswith("head_dim"):
            return int(getattr(config, HEAD_DIM, 64) or 64)
        return 4

    return {k: number(k) for k in opened}


def _causal(config: PreTrainedConfig) -> bool:
    """Whether a miniature's logits at a position are free of later tokens."""
    model = random_model(miniature_of(config).make())
    ids = probe_ids(1)
    other = ids.clone()
    other[:, -1] += 1
    with torch.no_grad():
        one, two = (model(input_ids=i, use_cache=False).logits[:, :-1] for i in (ids, other))
    return bool(torch.allclose(one, two, atol=1e-5))


def _half(config: PreTrainedConfig) -> bool:
    """Whether blocks have weights that matter only where an encoder gives hidden states."""
    model = random_model(miniature_of(config).make())
    block = modeling.blocks(model)[1][-1]
    if "encoder_hidden_states" not in inspect.signature(type(block).forward).parameters:
        return False
    weights = list(block.parameters())
    with torch.enable_grad():
        for w in weights:
            w.requires_grad_(True)
        logits = model(input_ids=probe_ids(1), use_cache=False).logits
        found = torch.autograd.grad(logits.sum(), weights, allow_unused=True)
    for w in weights:
        w.requires_grad_(False)
    return any(g is None for g in found)

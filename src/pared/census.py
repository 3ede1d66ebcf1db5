"""The census: what can be removed from every type of causal language model that transformers knows, and why not the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

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
    try:
        config = CONFIG_MAPPING[model_type]()
        if why := _outside(config):
            return Entry(model_type, outside=why)
        config, per_layer = modeling.make_config(_complete(config).to_dict())
        if not _causal(config):
            return Entry(model_type, outside="an encoder with a language-model head: its tokens see those behind them")
        return Entry(model_type, proved_layout(config, per_layer).proofs)
    except ParedError as error:
        return Entry(model_type, failed=error.what.splitlines()[0])
    except (*modeling.REJECTED, RuntimeError, IndexError, ImportError, AssertionError, NotImplementedError) as error:
        text = str(error).strip().splitlines()
        return Entry(model_type, failed=f"{type(error).__name__}: {text[0] if text else ''}")


def _outside(config: PreTrainedConfig) -> str:
    if getattr(config, "is_encoder_decoder", False) or hasattr(config, "encoder_layers"):
        return "an encoder-decoder"
    if "text_config" in config.sub_configs:
        text = getattr(config, "text_config", None)
        return f"a wrapper of several modalities; its text part is {getattr(text, 'model_type', 'a type of its own')!r}"
    return ""


def _complete(config: PreTrainedConfig) -> PreTrainedConfig:
    """A default config whose class leaves sizes open that it can not do without: they are filled in as checkpoints do."""
    try:
        modeling.skeleton(config)
        return config
    except ModelError:
        heads, layers = getattr(config, HEADS, None), getattr(config, LAYERS, None)
        fill = {HEAD_DIM: getattr(config, HIDDEN) // heads if heads else None, KV_HEADS: heads}
        fill |= {"layer_types": ["full_attention"] * layers if layers else None}
        fill |= {k: 8 for k in config.to_dict() if AXIS_OF_KEY.get(k) == "expert"}
        fill |= {k: 2 for k in config.to_dict() if k.endswith(("per_tok", "per_token"))}
        for key, value in fill.items():
            if getattr(config, key, 0) is None and value:
                setattr(config, key, value)
        return type(config).from_dict(config.to_dict())


def _causal(config: PreTrainedConfig) -> bool:
    """Whether a miniature's logits at a position are free of later tokens."""
    model = random_model(miniature_of(config).make())
    ids = probe_ids(1)
    other = ids.clone()
    other[:, -1] += 1
    with torch.no_grad():
        one, two = (model(input_ids=i, use_cache=False).logits[:, :-1] for i in (ids, other))
    return bool(torch.allclose(one, two, atol=1e-5))

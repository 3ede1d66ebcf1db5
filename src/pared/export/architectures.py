"""Which architecture of llama.cpp a model is written as, under which names its tensors go, and what is said about its sizes.

`llama`, with one size for all blocks, and `deci`, with sizes of their own, hold any model whose blocks compute what
Llama's do; that is not believed by a model's name but proved (`pared.export.graph`). Families with an architecture of their
own in llama.cpp are data here: what its code assumes about them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from pared import modeling
from pared.errors import ModelError, ParedError
from pared.export import graph
from pared.export.graph import Sizes, interleave
from pared.miniature import find_miniature, kind_keys, kinds_of, probe_ids, random_model
from pared.per_layer import PerLayer, layer_config

TOLERANCE = 1e-4
_NO_FFN = 32  # channels of zeros: of a block without an FFN, llama.cpp would drop the attention
_FIX = "serve it with transformers or vLLM"


@dataclass(frozen=True)
class Family:
    """What llama.cpp assumes about a family with an architecture of its own.

    norm_offset: its norms multiply by 1 + weight, and the file holds the sum. activation: how the name of it begins.
    tied: whether its embeddings have to be, or may not be. windows: it has sliding ones. scale: whether attention is scaled
    and capped as llama.cpp does it. biases: the matrices that have one. entries: those beyond the common ones.
    """

    name: str
    norm_offset: bool = False
    activation: str = "silu"
    tied: bool | None = None
    heads_fill_hidden: bool = False
    windows: bool = False
    scale: Callable[[PreTrainedConfig], bool] = lambda c: True
    biases: tuple[str, ...] = ()
    entries: Callable[[PreTrainedConfig], dict[str, Any]] = lambda c: {}


def _scaled_by_head_dim(config: PreTrainedConfig) -> bool:
    # llama.cpp knows Gemma's 27B models, which scale otherwise, by their number of layers.
    return float(config.query_pre_attn_scalar) == config.head_dim and config.num_hidden_layers not in (46, 62)


def _gemma2(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


FAMILIES: dict[str, Family] = {
    "qwen2": Family("qwen2", heads_fill_hidden=True, biases=("q_proj", "k_proj", "v_proj")),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", norm_offset=True, activation="gelu", tied=True),
    "gemma2": Family(
        "gemma2",
        norm_offset=True,
        activation="gelu",
        tied=True,
        windows=True,
        scale=lambda c: _scaled_by_head_dim(c) and bool(c.attn_logit_softcapping) and bool(c.final_logit_softcapping),
        entries=_gemma2,
    ),
    "gemma3_text": Family(
        "gemma3",
        norm_offset=True,
        activation="gelu",
        windows=True,
        scale=lambda c: _scaled_by_head_dim(c) and not c.attn_logit_softcapping and not c.final_logit_softcapping,
    ),
    "olmo2": Family("olmo2", tied=False, heads_fill_hidden=True),
}


@dataclass(frozen=True)
class Target:
    """How a model is written: architecture, sizes of the blocks that are, entries under the architecture's name, names."""

    arch: str
    blocks: list[Sizes]
    layers: list[int]
    entries: dict[str, Any]
    family: Family | None
    head_dim: int
    extra: dict[str, Tensor] = field(default_factory=dict)

    def block(self, own: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
        """The tensors of block `index` of the file from those of the model's block, by local names."""
        if self.family is not None:
            return dict(_renamed(own, f"model.layers.{index}.", self.arch, len(self.blocks), self.family.norm_offset))
        return _llama_block(own, index, self.blocks[index], self.head_dim, len(self.blocks))

    def rest(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors outside of the blocks, by the model's names."""
        offset = self.family is not None and self.family.norm_offset
        out = dict(_renamed(state, "", self.arch, len(self.blocks), offset))
        if self.family is not None and self.family.tied is False:
            out.setdefault("output.weight", out["token_embd.weight"])
        return {**out, **self.extra}


def choose(config: PreTrainedConfig, per_layer: PerLayer, model: PreTrainedModel) -> Target:
    """How to write a model. model: its skeleton. ModelError with the reason where llama.cpp can not say what it is."""
    try:
        sizes, head_dim = block_sizes(config, per_layer, model), _head_dim(config)
    except AttributeError as error:
        raise ModelError(f"its blocks are not those of a llama: {error}", where=config.model_type, fix=_FIX) from error
    layers = [i for i, s in enumerate(sizes) if s.heads or s.ffn]  # a block that is neither adds nothing
    kept = [sizes[i] for i in layers]
    uniform = len(set(sizes)) == 1 and all((sizes[0].heads, sizes[0].ffn))
    family = FAMILIES.get(config.model_type)
    reason = _unfit(family, config, model, uniform) if family else None
    if family is not None and reason is None:
        return Target(
            family.name, kept, layers, _entries(config, kept, head_dim, uniform) | _own(family, config), family, head_dim
        )
    try:
        _no_windows(config)
        prove_llama(config)
        extra = _frequencies(config, model, head_dim)
    except ModelError as error:
        what = f"{reason}; and {error.what}" if reason else error.what
        raise ModelError(what, where=f"model type {config.model_type!r}", fix=error.fix or _FIX) from error
    kept = [_written(s, first=i == 0) for i, s in enumerate(kept)]
    arch = "llama" if uniform else "deci"
    return Target(arch, kept, layers, _entries(config, kept, head_dim, uniform), None, head_dim, extra)


def block_sizes(config: PreTrainedConfig, per_layer: PerLayer, model: PreTrainedModel) -> list[Sizes]:
    """The sizes of every block, by its own config and by whether it has the parts at all."""
    out = []
    for i, block in enumerate(modeling.blocks(model)[1]):
        own = layer_config(config, per_layer.get(i, {}))
        names = set(block.state_dict())
        heads = int(own.num_attention_heads)
        attention = any("attn" in n or "attention" in n for n in names if n.split(".")[0] not in _NORMS)
        ffn = any(n.startswith("mlp.") for n in names)
        kv = int(getattr(own, "num_key_value_heads", None) or heads)
        out.append(
            Sizes(heads if attention else 0, kv if attention else 0, int(getattr(own, "intermediate_size", 0)) if ffn else 0)
        )
    return out


_NORMS = ("input_layernorm", "post_attention_layernorm")


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _written(sizes: Sizes, *, first: bool) -> Sizes:
    """Sizes of what is written for a block: zeros stand where llama.cpp needs a part that is not there."""
    heads, kv = (
        (sizes.heads, sizes.kv_heads) if sizes.heads else (int(first), int(first))
    )  # the first block tells the head size
    return Sizes(heads, kv, sizes.ffn or _NO_FFN)


def _unfit(family: Family, config: PreTrainedConfig, model: PreTrainedModel, uniform: bool) -> str | None:
    """Why llama.cpp's own architecture for a family does not hold this model; None where it does."""
    tied = bool(getattr(model, "all_tied_weights_keys", None))
    if not uniform:
        return f"llama.cpp's {family.name} has one size for all blocks"
    if family.heads_fill_hidden and config.num_attention_heads * _head_dim(config) != config.hidden_size:
        return f"llama.cpp's {family.name} wants heads that fill the hidden size"
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if not str(activation).startswith(family.activation):
        return f"llama.cpp's {family.name} has {family.activation}, and this model {activation}"
    if family.tied and not tied:
        return f"llama.cpp's {family.name} wants tied embeddings"
    if not family.scale(config):
        return f"llama.cpp's {family.name} scales and caps attention otherwise"
    for name in (n for block in modeling.blocks(model)[1] for n in block.state_dict() if n.endswith(".bias")):
        if (owner := name.split(".")[-2]) not in family.biases:
            return f"llama.cpp's {family.name} has no bias in {owner}"
    if not family.windows and _windowed(config):
        return f"llama.cpp's {family.name} has no sliding window"
    ropes = _ropes(config)
    if any(str(r.get("rope_type", "default")) not in ("default", "linear") for r in ropes.values()):
        return f"pared does not write this rope scaling for llama.cpp's {family.name}"
    return None


def _ropes(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    return rope if all(isinstance(v, dict) for v in rope.values()) and rope else {"full_attention": rope}


def _windowed(config: PreTrainedConfig) -> bool:
    """Whether some layer sees less than all positions before a token."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    some = "sliding_attention" in kinds if kinds else bool(getattr(config, "use_sliding_window", True))
    return window is not None and some and 0 < int(window) < int(config.max_position_embeddings)


def _no_windows(config: PreTrainedConfig) -> None:
    if _windowed(config):
        what = f"a sliding window of {config.sliding_window} tokens, which llama.cpp's llama does not have"
        raise ModelError(what, fix=f'with "sliding_window": null in config.json all tokens are seen; or {_FIX}')


def _entries(config: PreTrainedConfig, blocks: list[Sizes], head_dim: int, uniform: bool) -> dict[str, Any]:
    def size(values: list[int]) -> int | list[int]:
        return values[0] if uniform else values

    full = _ropes(config)["full_attention"]
    out: dict[str, Any] = {
        "block_count": len(blocks),
        "context_length": int(config.max_position_embeddings),
        "embedding_length": int(config.hidden_size),
        "feed_forward_length": size([s.ffn for s in blocks]),
        "head_count": size([s.heads for s in blocks]),
        "head_count_kv": size([s.kv_heads for s in blocks]),
        "key_length": head_dim,
        "value_length": head_dim,
        "layer_norm_rms_eps": float(config.rms_norm_eps),
        "rope_dimension_count": head_dim,
        "rope_freq_base": float(full.get("rope_theta", 10000.0)),
        "vocab_size": int(config.vocab_size),
    }
    return out


def _own(family: Family, config: PreTrainedConfig) -> dict[str, Any]:
    """Entries that a family has beyond the common ones."""
    out = family.entries(config)
    ropes = _ropes(config)
    if factor := ropes["full_attention"].get("factor"):
        out |= {"rope_scaling_type": "linear", "rope_scaling_factor": float(factor)}
    if family.windows:
        out["sliding_window"] = int(config.sliding_window or config.max_position_embeddings)
        out["sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
        if "sliding_attention" in ropes:
            out["rope_freq_base_swa"] = float(ropes["sliding_attention"]["rope_theta"])
    return out


def _frequencies(config: PreTrainedConfig, model: PreTrainedModel, head_dim: int) -> dict[str, Tensor]:
    """Rope frequencies that are not the plain ones, as what the plain ones are divided by: read off the model's own module."""
    inv_freq, scale = rotary(model)
    kind = str(_ropes(config)["full_attention"].get("rope_type", "default"))
    if scale != 1.0 or kind in ("dynamic", "longrope") or len(inv_freq) * 2 != head_dim:
        raise ModelError(f"its rotary embedding ({kind}) is none that llama.cpp's llama computes from stored frequencies")
    base = float(_ropes(config)["full_attention"].get("rope_theta", 10000.0))
    plain = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    factors = (plain / inv_freq.double()).float()
    return {} if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else {"rope_freqs.weight": factors}


def rotary(model: PreTrainedModel) -> tuple[Tensor, float]:
    """The model's frequencies [head_dim / 2] and the factor on its sines and cosines."""
    for module in model.modules():
        if "inv_freq" in module._buffers:
            if module.get_buffer("inv_freq").is_meta:
                modeling.fill_buffers(model, module)
            return module.get_buffer("inv_freq"), float(getattr(module, "attention_scaling", 1.0))
    raise ModelError("it has no rotary embedding, and llama.cpp's llama has no other")


def prove_llama(config: PreTrainedConfig) -> None:
    """ModelError unless a small random instance of the model's class gives the logits of llama.cpp's llama graph."""
    if getattr(config, "sliding_window", None) is not None:  # one that reaches over all positions; a miniature's would not
        config, _ = modeling.make_config({**config.to_dict(), "sliding_window": None})
    try:
        keys = kind_keys(config)
        small = find_miniature(config, kinds_of(modeling.skeleton(config), keys)).make()
        model = random_model(small)
        head_dim = _head_dim(small)
        sizes = block_sizes(small, {}, model)
        state = {n: t.float() for n, t in outside(model).items()}
        tensors = dict(_renamed(state, "", "llama", len(sizes), False))
        for i, block in enumerate(modeling.blocks(model)[1]):
            tensors |= _llama_block(block.state_dict(), i, sizes[i], head_dim, len(sizes))
        with torch.no_grad():
            got = graph.logits(tensors, sizes, head_dim, float(small.rms_norm_eps), rotary(model)[0], probe_ids())
            want = model(input_ids=probe_ids(), use_cache=False).logits
    except (ParedError, AttributeError, RuntimeError, KeyError, ValueError) as error:
        what = error.what if isinstance(error, ParedError) else str(error)
        raise ModelError(f"its blocks are not those of llama.cpp's llama: {what}", fix=_FIX) from error
    difference = float((got - want).abs().max() / want.abs().max())
    if difference > TOLERANCE:
        raise ModelError(
            f"its blocks are not those of llama.cpp's llama: logits of a small random instance differ by {difference:.1g}",
            fix=_FIX,
        )


def outside(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters outside of the blocks that are saved: a tied head is not."""
    prefix = modeling.blocks(model)[0] + "."
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    return {n: t for n, t in model.state_dict().items() if not n.startswith(prefix) and n not in tied}


def _llama_block(own: Mapping[str, Tensor], index: int, sizes: Sizes, head_dim: int, blocks: int) -> dict[str, Tensor]:
    """A block's tensors by the names and in the forms of `llama` and `deci`: projections apart, rows in rotary pairs."""
    parts: dict[str, Tensor] = {}
    for name, tensor in own.items():
        owner, _, leaf = name.rpartition(".")
        if owner.endswith(".qkv_proj"):
            rows = [sizes.heads * head_dim, sizes.kv_heads * head_dim, sizes.kv_heads * head_dim]
            split = dict(zip(("q_proj", "k_proj", "v_proj"), tensor.split(rows), strict=True))
        elif owner.endswith(".gate_up_proj"):
            split = dict(zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True))
        else:
            parts[name] = tensor
            continue
        parts |= {f"{owner.rpartition('.')[0]}.{n}.{leaf}": t for n, t in split.items()}
    out = dict(_renamed(parts, f"model.layers.{index}.", "llama", blocks, False))
    begin = f"blk.{index}."
    for name in (f"{begin}attn_{n}.{leaf}" for n in "qk" for leaf in ("weight", "bias")):
        if name in out:
            out[name] = interleave(out[name], head_dim)
    some = next(iter(own.values()))
    hidden = next(t.shape[0] for n, t in out.items() if n.endswith("_norm.weight"))

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=some.dtype, device=some.device)

    if sizes.heads and f"{begin}attn_q.weight" not in out:
        width, kv = sizes.heads * head_dim, sizes.kv_heads * head_dim
        out |= {f"{begin}attn_q.weight": zeros(width, hidden), f"{begin}attn_k.weight": zeros(kv, hidden)}
        out |= {f"{begin}attn_v.weight": zeros(kv, hidden), f"{begin}attn_output.weight": zeros(hidden, width)}
        out.setdefault(f"{begin}attn_norm.weight", zeros(hidden))
    if sizes.ffn and f"{begin}ffn_up.weight" not in out:
        out |= {f"{begin}ffn_{n}.weight": zeros(sizes.ffn, hidden) for n in ("gate", "up")}
        out |= {f"{begin}ffn_down.weight": zeros(hidden, sizes.ffn)}
        out.setdefault(f"{begin}ffn_norm.weight", zeros(hidden))
    if not sizes.heads:
        out.pop(f"{begin}attn_norm.weight", None)
    return out


def _renamed(
    state: Mapping[str, Tensor], prefix: str, arch: str, blocks: int, norm_offset: bool
) -> Iterator[tuple[str, Tensor]]:
    """Tensors by their names in a file of the architecture, as the gguf package knows them. ModelError where it has none."""
    import gguf

    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(number, blocks)
    for name, tensor in state.items():
        found = names.get_name(prefix + name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"{prefix + name} has no place in llama.cpp's {arch}", fix=_FIX)
        yield found, tensor.float() + 1 if norm_offset and found.endswith("norm.weight") else tensor

"""ChatGLM-6B, the first one: a prefix language model with 2-D rotary positions, as an ordinary transformers model in one file.

The formula is that of the published checkpoint (THUDM/chatglm-6b); GLM is Du et al., arXiv:2103.10360. A prompt is

    context ... [gMASK] <bos>

Its tokens up to <bos> see each other in both directions; what follows sees everything before it. Every token has two
positions: its place in the context and 0, or, from <bos> on, the place of [gMASK] and a count from 1. Each turns one half
of every head. A row without <bos> is read as all continuation, as text in the model's own training is.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

# Releases of transformers differ in what they call the cache of an output; a forward pass here takes both names.
_CACHE = "cache" if "cache" in inspect.signature(BaseModelOutputWithPast).parameters else "past_key_values"
# Where a cache remembers the positions of its last token, for a caller that passes none.
_LAST = "_chatglm_6b_last_positions"


class ChatGLM6BConfig(PreTrainedConfig):
    """Sizes of the first ChatGLM; the defaults are those of ChatGLM-6B.

    residual_scale: what the residual is multiplied with, sqrt(2 * layers) of the model as it was trained. It is said
    here because it stays what it was where layers are removed.
    """

    model_type = "chatglm_6b"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 130528
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 28
    num_attention_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "gelu_pytorch_tanh"
    residual_scale: float = 56**0.5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 3
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    mask_token_id: int | None = 130000
    gmask_token_id: int | None = 130001
    tie_word_embeddings: bool = False


def first(found: Tensor) -> tuple[Tensor, Tensor]:
    """found, bool [b, s] -> the column of the first True of each row [b, 1], and whether there is one [b, 1]."""
    return found.int().argmax(-1, keepdim=True), found.any(-1, keepdim=True)


def positions(ids: Tensor, real: Tensor, *, bos: int | None, gmask: int | None = None, mask: int | None = None) -> Tensor:
    """The two positions of every token: int64 [b, 2, s]. ids [b, s]; real, bool [b, s]: False for padding.

    A block position of 0 means context, of 1 or more continuation, of -1 padding.
    """
    index = real.long().cumsum(-1) - 1

    def find(token: int | None) -> tuple[Tensor, Tensor]:
        return first((ids == token) & real if token is not None else torch.zeros_like(real))

    start, started = find(bos)
    length = torch.where(started, index.gather(-1, start), 0)  # of the context
    columns = torch.arange(ids.shape[-1], device=ids.device)
    follows = (columns >= start) | ~started
    # The blank that is filled in; a prompt that has none has it at its end.
    blank = (length - 1).clamp(min=0)
    for token in (mask, gmask):
        at, there = find(token)
        blank = torch.where(there & started, index.gather(-1, at), blank)
    place = torch.where(follows, blank, index)
    block = torch.where(follows, index - length + 1, 0)
    return torch.stack([place.masked_fill(~real, 0), block.masked_fill(~real, -1)], dim=1)


def rotary(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 [b, 1, s, head_dim], of positions [b, 2, s]: each turns one half of a head."""
    n = head_dim // 2
    steps = torch.arange(0, n, 2, dtype=torch.float32, device=position_ids.device) / n
    # The model was made with frequencies in half precision, and has learnt what they are.
    frequencies = (1.0 / theta**steps).half().float()
    angles = position_ids[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)  # [b, 2, s, n]
    angles = torch.cat([angles[:, 0], angles[:, 1]], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [b, heads, s, d]: the pairs are (i, i + d/4) within each half of d."""
    one, other = x.unflatten(-1, (2, -1)).chunk(2, dim=-1)
    return x * cos + torch.cat([-other, one], dim=-1).flatten(-2) * sin


def eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """query [b, heads, q, d], key and value [b, heads, k, d], additive mask [b, 1, q, k] -> [b, q, heads, d]."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ChatGLM6BAttention(nn.Module):
    def __init__(self, config: ChatGLM6BConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        # The published code divides by the layer's number and multiplies with it again before the softmax.
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        inner = config.num_attention_heads * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * inner)
        self.dense = nn.Linear(inner, config.hidden_size)

    def forward(
        self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """x [b, q, hidden], additive mask [b, 1, q, k], cos and sin [b, 1, q, head_dim]."""
        fused = self.query_key_value(x).view(*x.shape[:-1], -1, 3 * self.head_dim).transpose(1, 2)
        query, key, value = fused.chunk(3, dim=-1)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out, weights = attend(self, query, key, value, mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.dense(out.reshape(*x.shape[:-1], -1)), weights


class ChatGLM6BMLP(nn.Module):
    def __init__(self, config: ChatGLM6BConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.act_fn(self.dense_h_to_4h(x)))


class ChatGLM6BLayer(GradientCheckpointingLayer):
    def __init__(self, config: ChatGLM6BConfig, layer_idx: int) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = ChatGLM6BAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = ChatGLM6BMLP(config)

    def forward(
        self, hidden_states: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None, **kwargs: Any
    ) -> Tensor:
        entered = self.input_layernorm(hidden_states)
        attended, _ = self.attention(entered, mask, cos, sin, cache=cache, **kwargs)
        # What is carried on is the normalised input, not the input.
        between = self.post_attention_layernorm(entered * self.residual_scale + attended)
        return between * self.residual_scale + self.mlp(between)


class ChatGLM6BPreTrainedModel(PreTrainedModel):
    config: ChatGLM6BConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLM6BLayer"]
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": ChatGLM6BLayer, "attentions": ChatGLM6BAttention}


class ChatGLM6BModel(ChatGLM6BPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: ChatGLM6BConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLM6BLayer(config, i) for i in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.word_embeddings = value

    def positions(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Both positions of every token, int64 [b, 2, s], of token ids [b, s] and a padding mask [b, s]."""
        real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        marks = {"bos": self.config.bos_token_id, "gmask": self.config.gmask_token_id, "mask": self.config.mask_token_id}
        return positions(ids, real, **marks)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """position_ids [b, 2, s], as `positions` gives; by default they are found from the tokens, or from the cache."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        hidden = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        seen = int(cache.get_seq_length()) if cache is not None else 0
        if position_ids is None:
            position_ids = self._find_positions(input_ids, hidden, attention_mask, cache, seen)
        if position_ids.shape[-2:] != (2, hidden.shape[1]):
            raise ValueError(f"position_ids are [batch, 2, length] here, not {list(position_ids.shape)}")
        allowed = self._allowed(hidden, attention_mask, position_ids, cache, seen)
        mask = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
        mask = mask.masked_fill(~allowed, torch.finfo(hidden.dtype).min)
        cos, sin = (t.to(hidden.dtype) for t in rotary(position_ids, self.config.head_dim, self.config.rope_theta))
        for layer in self.layers:
            hidden = layer(hidden, mask, cos, sin, cache=cache, **kwargs)
        if cache is not None:
            setattr(cache, _LAST, (seen + position_ids.shape[-1], position_ids[..., -1:]))
        named: dict[str, Any] = {_CACHE: cache}
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(hidden), **named)

    def _find_positions(
        self, ids: Tensor | None, hidden: Tensor, attention_mask: Tensor | None, cache: Cache | None, seen: int
    ) -> Tensor:
        if seen:
            at, last = getattr(cache, _LAST, (0, hidden))
            if at != seen or last.shape[0] != hidden.shape[0]:
                raise ValueError("the cache was changed since its last use: pass position_ids [batch, 2, length]")
            steps = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
            return torch.stack([last[:, 0].expand(-1, len(steps)), last[:, 1] + steps], dim=1)
        padding = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        if ids is None:
            # Embeddings alone do not say where the context ends.
            ids = torch.full(hidden.shape[:2], -1, device=hidden.device)
        return self.positions(ids, padding)

    def _allowed(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Cache | None, seen: int
    ) -> Tensor:
        """Who sees whom: bool [b, 1, q, k]. Everybody sees what came before, and the whole context."""
        mask = create_causal_mask(self.config, hidden, attention_mask, cache, allow_is_causal_skip=False)
        allowed = mask if mask.dtype == torch.bool else mask == 0
        context = position_ids[:, 1] == 0
        if attention_mask is not None and attention_mask.ndim == 2:
            context = context & attention_mask[:, -context.shape[1] :].bool()
        whole = torch.zeros(context.shape[0], allowed.shape[-1], dtype=torch.bool, device=hidden.device)
        whole[:, seen : seen + context.shape[1]] = context
        return allowed | whole[:, None, None]


class ChatGLM6BForCausalLM(ChatGLM6BPreTrainedModel, GenerationMixin):
    """The decoder with its language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLM6BConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLM6BModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, s, vocab]; with labels [b, s] also the mean next-token loss."""
        out = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=past_key_values if cache is None else cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            **{_CACHE: getattr(out, _CACHE)},
        )

    # -- generation: two positions for every token ---------------------------------------------------------------------

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        ids = model_kwargs.get("input_ids")
        ids = inputs_tensor if ids is None or ids.shape[1] == 0 else ids
        if ids.is_floating_point():
            ids = torch.full(ids.shape[:2], -1, device=ids.device)
        return self.transformer.positions(ids, model_kwargs.get("attention_mask"))

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        before = model_kwargs["position_ids"]
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        # Both were counted on; but all of a continuation stands at one place.
        updated["position_ids"][:, 0, before.shape[-1] :] = before[:, 0, -1:]
        return updated

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:  # type: ignore[override]
        # Releases of transformers differ in which dimension of three they take for the batch.
        position_ids = kwargs.pop("position_ids", None)
        ids, kwargs = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)  # type: ignore[misc]
        if position_ids is not None:
            kwargs["position_ids"] = position_ids.repeat_interleave(expand_size, dim=0)
        return ids, kwargs

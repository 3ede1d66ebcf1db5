"""The first ChatGLM-6B as it was published (model type "chatglm"): it becomes a class of our own, tensors as they are."""

from __future__ import annotations

from typing import Any

from pared.checkpoint import Checkpoint
from pared.errors import ModelError
from pared.importing.published import Conversion, Move, Settings

NAMES = "ChatGLM-6B"


def recognises(config: dict[str, Any]) -> bool:
    return config.get("model_type") == "chatglm" and "inner_hidden_size" in config


def convert(checkpoint: Checkpoint) -> Conversion:
    """What becomes of each tensor. ModelError for settings that the published formula does not have."""
    settings = Settings(checkpoint)
    hidden, ffn = settings.size("hidden_size"), settings.size("inner_hidden_size")
    layers, heads, vocab = settings.size("num_layers"), settings.size("num_attention_heads"), settings.size("vocab_size")
    if hidden % heads or hidden // heads % 4:
        raise ModelError(f"{heads} heads do not fit {hidden} channels", where=checkpoint.path / "config.json")
    settings.only("position_encoding_2d", True, why="positions of one dimension were never published")
    settings.only("pre_seq_len", None, why="a trained prefix stands before every text; import the model that it was trained on")
    settings.only("quantization_bit", 0, None, why="the weights are quantised; import the unquantised checkpoint")
    tied = settings.flag("tie_word_embeddings", default=False)
    # The first revision left these two to the defaults of its code.
    blanks = {
        "mask_token_id": settings.optional("mask_token_id", 150000),
        "gmask_token_id": settings.optional("gmask_token_id", 150001),
    }
    config = {
        "model_type": "chatglm_6b",
        "architectures": ["ChatGLM6BForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": hidden // heads,
        "hidden_act": "gelu_pytorch_tanh",
        "residual_scale": (2 * layers) ** 0.5,
        "max_position_embeddings": settings.size("max_sequence_length", default=2048),
        "layer_norm_eps": settings.number("layernorm_epsilon", default=1e-5),
        "tie_word_embeddings": tied,
        **settings.tokens("bos_token_id", "eos_token_id", "pad_token_id"),
        **blanks,
    }
    settings.ignore("prefix_projection")
    settings.finish()
    for name in ("bos_token_id", "mask_token_id", "gmask_token_id"):
        if type(config[name]) is not int or not 0 <= config[name] < vocab:
            raise ModelError(
                f"{name} is {config[name]!r}, which is no token of {vocab}: without it the prompt can not be told apart",
                where=checkpoint.path / "config.json",
                fix="put the id that the tokenizer gives it there",
            )
    return Conversion(
        family="ChatGLM-6B",
        config=config,
        moves=tuple(_moves(hidden, ffn, layers, vocab, absent=tied and "lm_head.weight" not in checkpoint.tensors)),
        derived=r"transformer\.layers\.\d+\.attention\.rotary_emb\.inv_freq",
        notes=("A prompt ends with [GMASK] and BOS; without a BOS in a text all of it is read as continuation.",),
    )


def _moves(hidden: int, ffn: int, layers: int, vocab: int, *, absent: bool) -> list[Move]:
    shapes: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (vocab, hidden)}
    if not absent:
        shapes["lm_head.weight"] = (vocab, hidden)
    matrices = {"attention.query_key_value": (3 * hidden, hidden), "attention.dense": (hidden, hidden)}
    matrices |= {"mlp.dense_h_to_4h": (ffn, hidden), "mlp.dense_4h_to_h": (hidden, ffn)}
    norms = [f"transformer.layers.{i}.{n}_layernorm" for i in range(layers) for n in ("input", "post_attention")]
    for norm in (*norms, "transformer.final_layernorm"):
        shapes |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    for i in range(layers):
        for name, shape in matrices.items():
            shapes |= {f"transformer.layers.{i}.{name}.weight": shape, f"transformer.layers.{i}.{name}.bias": shape[:1]}
    return [Move(name, shape, (name,)) for name, shape in shapes.items()]

"""Random checkpoints in the exact shape of a published model, written one layer at a time.

    python benchmarks/shapes.py llama-2-7b DIR [--layers N] [--vocab N] [--config-only]

Weights are normal, of a size at which every part of a block matters; the tokenizer is that of the model that ships with
pared, whose ids lie within any of the vocabularies. --config-only writes config.json alone, which is all that
`pared prune --dry-run` needs.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TOKENIZER = Path(__file__).resolve().parents[1] / "src" / "pared" / "data" / "storyteller"
_LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0}

# name -> entries of a LlamaConfig: https://huggingface.co/meta-llama
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "llama-3.1-70b": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "llama-3.1-405b": {
        **_LLAMA_3,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
    },
}


def write_config(path: Path, shape: dict[str, Any]) -> Any:
    """config.json alone."""
    from transformers import LlamaConfig

    path.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16", tie_word_embeddings=False)
    config.save_pretrained(path)
    return config


def write_checkpoint(path: Path, shape: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> int:
    """A checkpoint with one shard for each layer and one for the rest. Returns its bytes."""
    config = write_config(path, shape)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, path / name)
    h, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = config.num_key_value_heads * config.head_dim
    q = config.num_attention_heads * config.head_dim
    generator = torch.Generator().manual_seed(0)

    def weight(out: int, inner: int) -> torch.Tensor:
        return torch.randn(out, inner, generator=generator).mul_(inner**-0.5).to(dtype)

    block = {"self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, q)}
    block |= {"mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f)}
    weight_map: dict[str, str] = {}
    total = 0
    for i in range(layers + 1):
        if i == layers:
            tensors = {n: weight(config.vocab_size, h) for n in ("model.embed_tokens.weight", "lm_head.weight")}
            tensors["model.norm.weight"] = torch.ones(h, dtype=dtype)
        else:
            tensors = {f"model.layers.{i}.{n}.weight": weight(*s) for n, s in block.items()}
            norms = ("input_layernorm", "post_attention_layernorm")
            tensors |= {f"model.layers.{i}.{n}.weight": torch.ones(h, dtype=dtype) for n in norms}
        name = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, path / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--config-only", action="store_true")
    args = parser.parse_args()
    other = {"num_hidden_layers": args.layers, "vocab_size": args.vocab}
    shape = SHAPES[args.shape] | {name: n for name, n in other.items() if n}
    if args.config_only:
        write_config(args.path, shape)
    else:
        print(f"{write_checkpoint(args.path, shape) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

"""Speed in llama.cpp: prefill and decode, memory, of dense and pruned shapes of one random Llama.

    python benchmarks/serving_llamacpp.py [--out benchmarks/results/serving-llamacpp]

The model: a random Llama (hidden 512, 8 layers, FFN 1408, 8 heads and 4 KV heads of 64, vocabulary 4096).
What is measured is the shape: which units go is drawn at random. One thread; processor time, which other programs on the
machine do not stretch; the least of several runs. Prefill: a prompt of 256 tokens at once; decode: 32 tokens after it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pared
from pared.evaluate.report import Subject
from pared.export import export_gguf
from pared.export.llamacpp import Engine

PROMPT, DECODE, RUNS = 256, 32, 5
SIZES = dict(vocab_size=4096, hidden_size=512, num_hidden_layers=8, intermediate_size=1408, max_position_embeddings=1024)
HEADS = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=64)
UNIFORM: dict[str, Any] = {"shape": "uniform", "structures": ("kv", "ffn")}
PER_LAYER: dict[str, Any] = {"shape": "per-layer", "structures": ("kv", "ffn"), "allocate": "global"}
DEPTH: dict[str, Any] = {"shape": "uniform", "structures": ("layer",)}

ROWS: list[tuple[str, float, dict[str, Any]]] = [
    ("dense", 0.0, {}),
    *((f"uniform {r:.0%}, FFN in 32s", r, {**UNIFORM, "align": 32}) for r in (0.2, 0.3, 0.5)),
    ("uniform 30%, FFN in 1s", 0.3, {**UNIFORM, "align": 1}),
    ("uniform 30%, FFN alone, in 32s", 0.3, {**UNIFORM, "structures": ("ffn",), "align": 32}),
    *((f"per-layer {r:.0%}, FFN in 32s", r, {**PER_LAYER, "align": 32}) for r in (0.3, 0.5)),
    *((f"layers {r:.0%}", r, DEPTH) for r in (0.25, 0.5)),
]


def measure(path: Path) -> tuple[float, float]:
    """Tokens per second of processor time: prefill, decode."""
    ids = torch.randint(3, 4096, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    prefill, decode = [], []
    with Engine(path, context=512, exact=False) as engine:
        for _ in range(RUNS + 1):
            engine.forget()
            begun = time.process_time()
            choice = int(engine.feed(ids, 0, all_logits=False)[0].argmax())
            between = time.process_time()
            for i in range(DECODE):
                choice = int(engine.feed([choice], PROMPT + i, all_logits=False)[0].argmax())
            prefill.append(PROMPT / (between - begun))
            decode.append(DECODE / (time.process_time() - between))
    return max(prefill[1:]), max(decode[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving-llamacpp"))
    parser.add_argument("--types", default="f16,q8_0,q4_0")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).save_pretrained(folder / "dense")
        ids = torch.randint(3, 4096, (2, 16))
        for label, share, settings in ROWS:
            model = folder / "dense"
            if share:
                model = folder / label
                how = {"criterion": "random", "compensate": "none", "calibration": ids, "of": "block-params"}
                pared.prune(folder / "dense", out=model, remove=share, **how, **settings)
            counts = Subject.open(model).counts
            row: dict[str, Any] = {"row": label, "params": counts.params, "block_params": counts.block_params}
            for kind in args.types.split(","):
                done = export_gguf(model, folder / "row.gguf", quantize=kind, overwrite=True)
                prefill, decode = measure(done.path)
                row[kind] = {"bytes": done.nbytes, "prefill": prefill, "decode": decode, "narrow": len(done.narrow)}
            rows.append(row)
            print(label, row, file=sys.stderr, flush=True)
    args.out.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
    args.out.with_suffix(".md").write_text(table(rows, args.types.split(",")))


def table(rows: list[dict[str, Any]], kinds: list[str]) -> str:
    """Markdown: blocks' parameters removed, and for each type megabytes, prefill and decode against dense."""
    dense = rows[0]
    head = ["shape", "blocks removed", *(f"{k}: MB, prefill, decode" for k in kinds)]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(head) - 1)]
    for r in rows:
        cells = [r["row"], f"{1 - r['block_params'] / dense['block_params']:.1%}"]
        for k in kinds:
            times = [f"{r[k][w]:.0f}/s ({r[k][w] / dense[k][w]:.2f}x)" for w in ("prefill", "decode")]
            wide = f" ({r[k]['narrow']} matrices kept fp16)" if r[k]["narrow"] else ""
            cells.append(f"{r[k]['bytes'] / 1e6:.1f}{wide}, " + ", ".join(times))
        lines.append("| " + " | ".join(cells) + " |")
    about = (__doc__ or "").split("\n\n")[2].replace("\n", " ")
    return f"# Speed in llama.cpp\n\n{about}\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

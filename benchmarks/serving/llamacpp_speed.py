"""Requests a second, time to the first token and for each further one in llama.cpp, dense against pruned shapes.

    python benchmarks/serving/llamacpp_speed.py [--out benchmarks/results/serving-llamacpp-batches]

The model: a random Llama (hidden 512, 8 layers, FFN 1408, 8 heads and 4 KV heads of 64, vocabulary 4096).
What is measured is the shape: which units go is drawn at random. B sequences are run together in one batch of llama.cpp:
their prompts of 32 tokens at once (the time to the first token), then 16 tokens each, step by step. The dense model and the
pruned one are loaded in one process and take turns, run by run. One thread; processor time, which other programs on the
machine do not stretch. Numbers are medians, those against dense (and in brackets the least and the most) are ratios of
neighbouring runs. Cache: of 64 sequences of 48 tokens, in fp16.

Writes OUT.md and OUT.json, which a run goes on from: rows that are in it are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pared
from pared.evaluate.report import Subject
from pared.export import export_gguf
from pared.export.llamacpp import Engine

PROMPT, TOKENS, VOCAB = 32, 16, 4096
RUNS = {1: 9, 8: 5, 64: 3}  # batch -> pairs of runs that count
SIZES = dict(vocab_size=VOCAB, hidden_size=512, num_hidden_layers=8, intermediate_size=1408, max_position_embeddings=1024)
HEADS = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=64)
UNIFORM: dict[str, Any] = {"shape": "uniform", "structures": ("kv", "ffn")}
PER_LAYER: dict[str, Any] = {"shape": "per-layer", "structures": ("kv", "ffn"), "allocate": "global"}
DEPTH: dict[str, Any] = {"shape": "uniform", "structures": ("layer",)}

ROWS: dict[str, dict[str, Any]] = {
    **{f"uniform {r:.0%}, FFN in 32s": {**UNIFORM, "remove": r, "align": 32} for r in (0.2, 0.3, 0.5)},
    "uniform 30%, FFN in 1s": {**UNIFORM, "remove": 0.3, "align": 1},
    "uniform 30%, FFN alone, in 32s": {**UNIFORM, "structures": ("ffn",), "remove": 0.3, "align": 32},
    **{f"per-layer {r:.0%}, FFN in 32s": {**PER_LAYER, "remove": r, "align": 32} for r in (0.3, 0.5)},
    **{f"layers {r:.0%}": {**DEPTH, "remove": r} for r in (0.25, 0.5)},
}


def run(engine: Engine, batch: int) -> dict[str, float]:
    """Serve a batch once: seconds of processor time for all of it, to its first tokens, and for each step after."""
    ids = torch.randint(3, VOCAB, (batch, PROMPT), generator=torch.Generator().manual_seed(batch)).tolist()
    engine.forget()
    begun = time.process_time()
    choice = engine.feed_together(ids, 0).argmax(-1)
    first = time.process_time() - begun
    for i in range(TOKENS - 1):
        choice = engine.feed_together([[int(c)] for c in choice], PROMPT + i).argmax(-1)
    total = time.process_time() - begun
    return {"time": total, "first": first, "each": (total - first) / (TOKENS - 1)}


def compare(dense: Path, pruned: Path) -> dict[str, Any]:
    """Runs in turns, for each batch: medians of both, and ratios of rates, pruned to dense."""
    out: dict[str, Any] = {}
    settings: dict[str, Any] = {"context": PROMPT + TOKENS, "sequences": max(RUNS), "exact": False}
    with Engine(dense, **settings) as a, Engine(pruned, **settings) as b:
        for batch, runs in RUNS.items():
            pairs = [(run(a, batch), run(b, batch)) for _ in range(runs + 1)][1:]
            medians = [{k: median(p[i][k] for p in pairs) for k in ("time", "first", "each")} for i in (0, 1)]
            ratios = {k: sorted(x[k] / y[k] for x, y in pairs) for k in ("time", "first", "each")}
            out[str(batch)] = {"dense": medians[0], "pruned": medians[1], "ratios": ratios}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "serving-llamacpp-batches")
    parser.add_argument("--types", default="f16,q8_0,q4_0")
    parser.add_argument("--minutes", type=float, default=60, help="begin no row after this time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kept, begun = args.out.with_suffix(".json"), time.monotonic()
    rows: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "dense"
        LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).save_pretrained(source)
        kinds = args.types.split(",")
        dense = {k: export_gguf(source, Path(name) / f"dense-{k}.gguf", quantize=k) for k in kinds}
        whole = Subject.open(source).counts
        calibration = torch.randint(3, VOCAB, (2, 16))
        for label, settings in ROWS.items():
            if label in rows or time.monotonic() - begun > 60 * args.minutes:
                continue
            path = Path(name) / label
            how = {"criterion": "random", "compensate": "none", "calibration": calibration, "of": "block-params"}
            pared.prune(source, out=path, **how, **settings)
            counts = Subject.open(path).counts
            row: dict[str, Any] = {"removed": 1 - counts.block_params / whole.block_params}
            for kind in kinds:
                done = export_gguf(path, Path(name) / "row.gguf", quantize=kind, overwrite=True)
                sizes = {"bytes": done.nbytes, "dense_bytes": dense[kind].nbytes, "narrow": len(done.narrow)}
                cache = {"cache": counts.kv_cache * 2 * 64 * (PROMPT + TOKENS)}
                cache["dense_cache"] = whole.kv_cache * 2 * 64 * (PROMPT + TOKENS)
                row[kind] = {**sizes, **cache, **compare(dense[kind].path, done.path)}
            rows[label] = row
            print(label, row, file=sys.stderr, flush=True)
            kept.write_text(json.dumps({r: rows[r] for r in ROWS if r in rows}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(report({r: rows[r] for r in ROWS if r in rows}))


def report(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: a table for each type of weights."""
    about = " ".join((__doc__ or "").split("\n\n")[2].split())
    kinds = [k for k in next(iter(rows.values())) if k != "removed"]
    return "\n\n".join(["# Serving speed in llama.cpp", about, *(table(rows, k) for k in kinds)]) + "\n"


def table(rows: dict[str, dict[str, Any]], kind: str) -> str:
    head = ["shape", "blocks removed", "weights, MB", "cache, MB"]
    head += [f"{b} at once: requests/s, first token ms, each further ms, rate against dense" for b in RUNS]
    lines = [f"## {kind}", "", "| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(head) - 1)]

    def cells(got: dict[str, float], batch: int, against: str) -> str:
        return f"{batch / got['time']:.1f}, {got['first'] * 1e3:.0f}, {got['each'] * 1e3:.1f}, {against}"

    first = next(iter(rows.values()))[kind]
    dense = {
        b: {k: median(r[kind][str(b)]["dense"][k] for r in rows.values()) for k in ("time", "first", "each")} for b in RUNS
    }
    sizes = [f"{first['dense_bytes'] / 1e6:.1f}", f"{first['dense_cache'] / 1e6:.1f}"]
    lines.append("| " + " | ".join(["dense", "0.0%", *sizes, *(cells(dense[b], b, "1.00") for b in RUNS)]) + " |")
    for label, row in rows.items():
        r = row[kind]
        wide = f" ({r['narrow']} matrices kept fp16)" if r["narrow"] else ""
        parts = [label, f"{row['removed']:.1%}", f"{r['bytes'] / 1e6:.1f}{wide}", f"{r['cache'] / 1e6:.1f}"]
        for b in RUNS:
            ratios = r[str(b)]["ratios"]["time"]
            parts.append(cells(r[str(b)]["pruned"], b, f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"))
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

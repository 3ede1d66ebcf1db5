"""Requests a second, time to the first token and time for each further one in vLLM on a CPU, dense and pruned.

    make vllm-test    # or only its environment: make .venv-vllm/.installed
    .venv-vllm/bin/python benchmarks/serving/vllm_speed.py [--out benchmarks/results/serving-vllm.md]

The model: a random Llama of 41M parameters (hidden 512, 12 layers, 8 query and 4 KV heads of 64, FFN 1536, vocabulary 8192,
tied, fp32): speed does not depend on what the weights say. Pruned by random scores, the per-layer rows by L2 norms so that
layers differ; the amount is of the blocks' parameters.
Every row is a process of its own with vLLM's engine in it (no compilation, no prefix cache, one thread). B requests of 32
random prompt tokens arrive at once and get 24 tokens each; after a run for warming up, the run with the most requests a
second counts. All times are CPU time of the process, which is what passes on a machine with nothing else to do: other
work was going on while these were taken. Memory is the process's peak (VmHWM), of which vLLM itself takes most.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCHES, PROMPT, TOKENS, VOCAB = (1, 8, 64), 32, 24, 8192
# Row -> how it is pruned (None: not at all).
ROWS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "uniform 20%, multiples of 64": {"remove": 0.2, "align": 64},
    "uniform 30%, multiples of 64": {"remove": 0.3, "align": 64},
    "uniform 50%, multiples of 64": {"remove": 0.5, "align": 64},
    "uniform 30%, any width": {"remove": 0.3, "align": 1},
    "uniform 30%, FFN alone": {"remove": 0.3, "align": 64, "structures": ("ffn",)},
    "per-layer 20%": {"remove": 0.2, "shape": "per-layer", "criterion": "l2"},
    "per-layer 30%": {"remove": 0.3, "shape": "per-layer", "criterion": "l2"},
    "per-layer 50%": {"remove": 0.5, "shape": "per-layer", "criterion": "l2"},
    "depth 20%": {"remove": 0.2, "structures": ("layer",)},
    "depth 30%": {"remove": 0.3, "structures": ("layer",)},
    "depth 50%": {"remove": 0.5, "structures": ("layer",)},
}
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def make_checkpoint(row: str, folder: Path) -> dict[str, Any]:
    """Write the checkpoint of a row to folder/out, and say what it is."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pared.run import prune

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        num_hidden_layers=12,
        intermediate_size=1536,
        vocab_size=VOCAB,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    source, out = folder / "dense", folder / "out"
    settings = ROWS[row]
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):  # so that layers differ, where they may
            layer.mlp.gate_proj.weight.mul_(1 + 0.05 * i)
            layer.self_attn.q_proj.weight.mul_(2 - 0.05 * i)
    model.save_pretrained(out if settings is None else source)
    removed = 0.0
    if settings is not None:
        done = prune(
            source, out=out, **{"of": "block-params", "criterion": "random", "compensate": "none", "seed": 0, **settings}
        )
        removed = done.plan.removed
    return {"removed": removed, "bytes": sum(f.stat().st_size for f in out.glob("*.safetensors"))}


def measure(path: str, repeat: int) -> dict[str, Any]:
    """Serve each batch, in this process. Seconds; bytes."""
    from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt

    from pared.evaluate.speed import peak_memory_bytes

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=path,
            dtype="float32",
            gpu_memory_utilization=0.2,
            max_model_len=256,
            max_num_seqs=max(BATCHES),
            max_num_batched_tokens=1024,
            enable_prefix_caching=False,
            enforce_eager=True,
            skip_tokenizer_init=True,
        )
    )
    rng, number = random.Random(0), 0
    out: dict[str, Any] = {}
    for batch in BATCHES:
        best: dict[str, float] = {}
        for run in range(repeat + 1):
            started = time.process_time()
            first: dict[str, float] = {}
            last: dict[str, float] = {}
            for _ in range(batch):
                number += 1
                prompt = TokensPrompt(prompt_token_ids=[rng.randrange(3, VOCAB) for _ in range(PROMPT)])
                params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
                engine.add_request(str(number), prompt, params)
            while engine.has_unfinished_requests():
                for answer in engine.step():
                    now = time.process_time() - started
                    first.setdefault(answer.request_id, now)
                    last[answer.request_id] = now
            spent = time.process_time() - started
            got = {
                "rate": batch / spent,
                "first": sum(first.values()) / batch,
                "each": sum(last[r] - first[r] for r in first) / batch / (TOKENS - 1),
            }
            if run and got["rate"] > best.get("rate", 0.0):
                best = got
        out[str(batch)] = best
    return {"batches": out, "peak": peak_memory_bytes()}


def table(rows: dict[str, dict[str, Any]], batch: int) -> str:
    dense = rows["dense"]["batches"][str(batch)]
    lines = [
        f"## {batch} request{'s' if batch > 1 else ''} at once",
        "",
        "| | blocks removed | weights, MB | requests/s | against dense | first token, ms | each further, ms | peak memory, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        got = row["batches"][str(batch)]
        lines.append(
            f"| {name} | {row['removed']:.1%} | {row['bytes'] / 1e6:.0f} | {got['rate']:.2f} | {got['rate'] / dense['rate']:.2f} "
            f"| {got['first'] * 1e3:.0f} | {got['each'] * 1e3:.1f} | {row['peak'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def reading(rows: dict[str, dict[str, Any]]) -> str:
    """What the numbers say: of the share of the blocks that went, how much came back as speed."""

    def gain(name: str, batch: int) -> float:
        """Time of a request against dense, as a share saved."""
        return 1 - rows["dense"]["batches"][str(batch)]["rate"] / rows[name]["batches"][str(batch)]["rate"]

    shapes = {s: [n for n in rows if n.startswith(s) and n != "dense"] for s in ("uniform", "per-layer", "depth")}
    lines = []
    for batch in BATCHES:
        parts = [
            f"{shape} {sum(gain(n, batch) / rows[n]['removed'] for n in names) / len(names):.2f}"
            for shape, names in shapes.items()
            if names
        ]
        lines.append(f"- at {batch}: " + ", ".join(parts))
    return (
        "## What pays\n\nTime saved for each share of the blocks' parameters removed (1.00: 30% fewer parameters, 30% less time; "
        "the mean over the rows of a shape):\n\n" + "\n".join(lines)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "serving-vllm.md")
    parser.add_argument("--rows", default=";".join(ROWS), help="names of rows, with a semicolon between two")
    parser.add_argument("--kept", type=Path, help="JSON of rows that were measured; a run adds to it, and goes on from it")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--notes", type=Path, help="text to put under the tables: what a reader should see in them")
    parser.add_argument("--worker", nargs=2, metavar=("PATH", "REPEAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker[0], int(args.worker[1]))))
        return
    kept: dict[str, dict[str, Any]] = json.loads(args.kept.read_text()) if args.kept and args.kept.exists() else {}
    for row in args.rows.split(";"):
        if row in kept:
            continue
        with tempfile.TemporaryDirectory() as folder:
            facts = make_checkpoint(row, Path(folder))
            done = subprocess.run(
                [sys.executable, __file__, "--worker", f"{folder}/out", str(args.repeat)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
            )
        kept[row] = {**facts, **json.loads(done.stdout.splitlines()[-1])}
        print(row, kept[row], file=sys.stderr, flush=True)
        if args.kept:
            args.kept.write_text(json.dumps(kept))
    rows = {row: kept[row] for row in args.rows.split(";")}
    protocol = (__doc__ or "").split("\n\n")[2].strip()
    tables = "\n\n".join(table(rows, batch) for batch in BATCHES)
    notes = f"\n\n{args.notes.read_text().strip()}" if args.notes else ""
    text = f"# Serving speed in vLLM\n\n{protocol}\n\n{tables}\n\n{reading(rows)}{notes}\n"
    args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

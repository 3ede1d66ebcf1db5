"""Requests a second, time to the first token and time for each further one in vLLM on a CPU, dense and pruned.

    make vllm-test    # or only its environment: make .venv-vllm/.installed
    .venv-vllm/bin/python benchmarks/serving/vllm_speed.py [--out benchmarks/results/serving-vllm]

The model: a random Llama of 41M parameters (hidden 512, 12 layers, 8 query and 4 KV heads of 64, FFN 1536, vocabulary 8192,
tied, fp32): speed does not depend on what the weights say. Pruned by random scores, the per-layer rows by L2 norms so that
layers differ; the amount is of the blocks' parameters.
B requests of 32 random prompt tokens arrive at once and get 16 tokens each (no compilation, no prefix cache, one thread).
The dense model and a pruned one are each served by a process with vLLM's engine in it, and the two take turns, run by run,
after one run each for warming up: so both meet the same load from whatever else the machine does. Times are CPU time of the
process, which is what passes on a machine with nothing else to do; numbers are medians over the runs, and those against
dense are the median (and in brackets the least and the most) of the ratios of neighbouring runs. Memory is the process's
peak (VmHWM), of which vLLM itself takes most.

Writes OUT.md and OUT.json, which a run goes on from: rows that are in it are not measured again.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from vllm_speed_report import write

from pared.serving.vllm_cpu import ENVIRONMENT

BATCHES, PROMPT, TOKENS, VOCAB = (1, 8, 64), 32, 16, 8192
# Row -> how it is pruned.
ROWS: dict[str, dict[str, Any]] = {
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


def make_dense(folder: Path) -> Path:
    """Write the dense checkpoint to folder/dense."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):  # so that layers differ, where they may
            layer.mlp.gate_proj.weight.mul_(1 + 0.05 * i)
            layer.self_attn.q_proj.weight.mul_(2 - 0.05 * i)
    model.save_pretrained(folder / "dense")
    return folder / "dense"


def make_pruned(source: Path, out: Path, settings: dict[str, Any]) -> float:
    """Write a pruned checkpoint; returns the share of the blocks' parameters that went."""
    from pared.run import prune

    how = {"of": "block-params", "criterion": "random", "compensate": "none", "seed": 0, **settings}
    return prune(source, out=out, **how).plan.removed


def stored(path: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(f.stat().st_size for f in path.glob("*.safetensors"))


class Server:
    """vLLM with one checkpoint in a process of its own, which serves a batch each time it is told to."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        )

    def run(self, batch: int) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:  # vLLM may say something first
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("vLLM's process ended; its words are above")


@contextmanager
def serving(path: Path) -> Iterator[Server]:
    server = Server(path)
    try:
        yield server
    finally:
        assert server.process.stdin is not None
        server.process.stdin.close()
        server.process.wait(60)


def work(path: str) -> None:
    """Serve batches of the sizes that come in, a line each. Seconds of CPU time; bytes."""
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
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    for line in sys.stdin:
        batch, first, last = int(line), dict[str, float](), dict[str, float]()
        started = time.process_time()
        for _ in range(batch):
            number += 1
            prompt = TokensPrompt(prompt_token_ids=[rng.randrange(3, VOCAB) for _ in range(PROMPT)])
            engine.add_request(str(number), prompt, params)
        while engine.has_unfinished_requests():
            for answer in engine.step():
                now = time.process_time() - started
                first.setdefault(answer.request_id, now)
                last[answer.request_id] = now
        got = {
            "time": (time.process_time() - started) / batch,
            "first": sum(first.values()) / batch,
            "each": sum(last[r] - first[r] for r in first) / batch / (TOKENS - 1),
            "peak": peak_memory_bytes(),
        }
        print(json.dumps(got), flush=True)


def compare(dense: Server, pruned: Server, repeat: int) -> dict[str, Any]:
    """Runs in turns, for each batch. Seconds a request, medians; ratios of rates, pruned to dense."""
    out: dict[str, Any] = {}
    for batch in BATCHES:
        pairs = [(dense.run(batch), pruned.run(batch)) for _ in range(repeat + 1)][1:]
        medians = [{k: median(p[i][k] for p in pairs) for k in ("time", "first", "each")} for i in (0, 1)]
        ratios = sorted(a["time"] / b["time"] for a, b in pairs)
        out[str(batch)] = {"dense": medians[0], "pruned": medians[1], "ratios": ratios}
    out["peak"] = {"dense": dense.run(1)["peak"], "pruned": pruned.run(1)["peak"]}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "serving-vllm")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60, help="begin no row after this time")
    parser.add_argument("--worker", metavar="PATH", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return
    kept, begun = args.out.with_suffix(".json"), time.monotonic()
    done: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        source = make_dense(Path(name))
        with serving(source) as dense:
            for row, settings in ROWS.items():
                if row in done or time.monotonic() - begun > 60 * args.minutes:
                    continue
                path = Path(name) / row
                removed = make_pruned(source, path, settings)
                with serving(path) as pruned:
                    measured = compare(dense, pruned, args.repeat)
                done[row] = {"removed": removed, "bytes": stored(path), "dense_bytes": stored(source), **measured}
                print(row, done[row], file=sys.stderr, flush=True)
                kept.write_text(json.dumps({r: done[r] for r in ROWS if r in done}, indent=1) + "\n")
    write({r: done[r] for r in ROWS if r in done}, BATCHES, (__doc__ or "").split("\n\n")[2], args.out.with_suffix(".md"))


if __name__ == "__main__":
    main()

"""What the default method costs: time against a plain forward pass, memory against what has to be held.

    python benchmarks/cost.py [--layers 16] [--windows 32] [--out benchmarks/results/cost.md]

The work: a random Llama (hidden 1024, 16 heads, FFN 2816, vocabulary 32000, fp32) loses 20% of its blocks under default
effort, calibrated on windows of 512 random tokens, 8 at a time; nothing is written. From 64 windows on that
reconstructs, and tries a narrower residual stream. The plain forward pass is that of the resident model over the same
tokens, logits included; without them it grows with the layers as the method does. Each row is a process of its own with one
thread; CPU time excludes the imports, memory is the process's peak (VmHWM) less that of a process that only imports the
libraries. Of several runs in turn the least CPU time and the highest peak count.

What has to be held is one block's weights, the second moments of its consumers' and producers' inputs with their targets
(C and X, in the float64 that they are solved in) and the two streams of hidden states.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from memory import measured

from pared.budget.trials import ENOUGH

HIDDEN, FFN, HEADS, VOCABULARY, LENGTH, BATCH = 1024, 2816, 16, 32000, 512, 8
IDS = "ids.safetensors"
MODES = {
    "imports": "imports alone",
    "blocks": "the same without the head",
    "forward": "plain forward pass, resident",
    "default": "default effort, uniform",
    "wide": "the same, hidden channels kept",
    "closed": "the same, without reconstruction",
}
# What the rows under default effort leave out; below ENOUGH windows there is nothing of it to leave out.
LEFT_OUT: dict[str, dict[str, object]] = {
    "default": {},
    "wide": {"narrow": False},
    "closed": {"narrow": False, "reconstruct": 0},
}


def work(mode: str, path: str) -> dict[str, float]:
    """Run one mode in this process; CPU seconds and peak bytes."""
    import torch

    torch.set_num_threads(1)
    import transformers
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM  # noqa: F401, transformers imports a model's code when it is asked for

    from pared.evaluate.speed import peak_memory_bytes
    from pared.run import prune

    ids = load_file(Path(path) / IDS)["ids"]
    if mode in ("forward", "blocks"):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    started, cpu = time.perf_counter(), time.process_time()
    if mode in ("forward", "blocks"):
        run = model if mode == "forward" else model.model
        with torch.inference_mode():
            for rows in ids.split(BATCH):
                run(input_ids=rows, use_cache=False)
    elif mode in LEFT_OUT:
        prune(path, remove=0.2, calibration=ids, batch=BATCH, dry_run=True, **LEFT_OUT[mode])
    return {
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - cpu,
        "peak": peak_memory_bytes(),
    }


def make_work(path: Path, layers: int, windows: int) -> None:
    """Write the random checkpoint, and the tokens beside it."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        intermediate_size=FFN,
        vocab_size=VOCABULARY,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    ids = torch.randint(0, VOCABULARY, (windows, LENGTH), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, path / IDS)


def held(windows: int) -> dict[str, int]:
    """Bytes of what has to be held."""
    block = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)
    # C and X of o_proj, of down_proj, and of what q, k, v and what gate, up read.
    moments = 8 * (2 * HIDDEN * HIDDEN + FFN * FFN + HIDDEN * FFN + 2 * 2 * HIDDEN * HIDDEN)
    return {"block": block, "moments": moments, "streams": 2 * 4 * windows * LENGTH * HIDDEN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cost.md")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--worker", nargs=2, metavar=("MODE", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(*args.worker)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_work(Path(folder), args.layers, args.windows)
        rows = measured(__file__, [m for m in MODES if not LEFT_OUT.get(m) or args.windows >= ENOUGH], folder, args.repeat)
    parts = held(args.windows)
    least, plain, blocks = sum(parts.values()), rows["forward"]["cpu"], rows["blocks"]["cpu"]
    lines = [
        "| work | CPU seconds | / plain forward pass | / without the head | peak memory, MB | / what has to be held |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for mode, row in rows.items():
        peak = row["peak"] - rows["imports"]["peak"]
        if mode != "imports":
            of_held = f"{peak / least:.2f}" if mode in LEFT_OUT else "—"
            lines.append(
                f"| {MODES[mode]} | {row['cpu']:.1f} | {row['cpu'] / plain:.2f} | {row['cpu'] / blocks:.2f} | {peak / 1e6:.0f} | {of_held} |"
            )
    purpose, *protocol = (__doc__ or "").strip().split("\n\n")[2:]
    text = "\n\n".join(
        [
            "# Cost of the default method",
            purpose,
            *protocol,
            f"{args.layers} layers, {args.windows} windows, {args.repeat} runs. Held, MB: "
            + ", ".join(f"{k} {v / 1e6:.0f}" for k, v in parts.items())
            + ".",
            "\n".join(lines),
        ]
    )
    args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""Memory and time of Taylor scores, block by block against the resident model.

    python benchmarks/memory.py [--out benchmarks/results/memory.md]

The work: a random Llama (hidden 1024, 16 layers, FFN 2816, vocabulary 32000, fp32), first-order Taylor scores of KV
groups and FFN channels on 10 windows of 128 random tokens. Each row is a process of its own with one thread; memory is
the process's peak (VmHWM) less that of a process that only imports the libraries, CPU time excludes the imports. Of
several runs in turn the least CPU time and the highest peak count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

MODES = {
    "imports": "imports alone",
    "resident": "plain forward and backward over the resident model",
    "taylor": "pared, criterion taylor",
    "l2": "pared, criterion l2",
    "obs": "pared, criterion obs",
    "default": "pared prune with default effort (nothing written)",
}


def work(mode: str, path: str) -> dict[str, float]:
    """Run one mode in this process; CPU seconds and peak bytes."""
    import torch

    torch.set_num_threads(1)
    import transformers

    from pared.calibration import Batch
    from pared.criteria import get_criterion
    from pared.estimate import estimate
    from pared.evaluate.speed import peak_memory_bytes
    from pared.run import prune
    from pared.source import Source
    from pared.stream import Stream

    ids = torch.randint(0, 32000, (10, 128), generator=torch.Generator().manual_seed(0))
    batches = [Batch(row, None) for row in ids.split(2)]
    started, cpu = time.perf_counter(), time.process_time()
    if mode == "resident":
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.train()
        for row in ids.split(2):
            (model(input_ids=row, labels=row, use_cache=False).loss / 5).backward()
    elif mode != "imports":
        if mode == "default":
            prune(path, remove=0.2, calibration=ids, batch=2, dry_run=True)
        else:
            source = Source.open(path)
            stream = Stream(source.runnable, source.layout)
            estimate(stream, get_criterion(mode), ("kv", "ffn"), batches)
    return {
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - cpu,
        "peak": peak_memory_bytes(),
    }


def make_model(path: Path) -> int:
    """Write the random checkpoint. Returns its bytes."""
    code = (
        "import torch,sys;from transformers import LlamaConfig,LlamaForCausalLM;torch.manual_seed(0);"
        "c=LlamaConfig(hidden_size=1024,num_hidden_layers=16,intermediate_size=2816,vocab_size=32000,"
        "num_attention_heads=16,num_key_value_heads=16,max_position_embeddings=2048);"
        "LlamaForCausalLM(c).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True)
    return sum(f.stat().st_size for f in path.glob("*.safetensors"))


def measured(program: str, modes: Sequence[str], folder: str, repeat: int) -> dict[str, dict[str, float]]:
    """Each mode of a program's --worker in processes of their own, one thread each: the least CPU time, the highest peak."""
    rows: dict[str, dict[str, float]] = {}
    for mode in [*modes] * repeat:  # in turn, so that a busy minute does not hit one row alone
        done = subprocess.run(
            [sys.executable, program, "--worker", mode, folder],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        now = json.loads(done.stdout.splitlines()[-1])
        print(mode, now, file=sys.stderr, flush=True)
        before = rows.setdefault(mode, now)
        rows[mode] = {"cpu": min(before["cpu"], now["cpu"]), "peak": max(before["peak"], now["peak"])}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.md")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--repeat", type=int, default=3, help="runs of each row; the least CPU time and the highest peak count")
    parser.add_argument("--worker", nargs=2, metavar=("MODE", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(*args.worker)))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = make_model(Path(folder))
        rows = measured(__file__, args.modes.split(","), folder, args.repeat)
    base = rows["imports"]["peak"]
    plain = rows.get("resident", {}).get("cpu")
    lines = [
        "| work | peak memory / weights | CPU seconds | CPU time / resident forward+backward |",
        "| --- | --- | --- | --- |",
        *(
            f"| {MODES[m]} | {(r['peak'] - base) / size:.2f} | {r['cpu']:.1f} | {r['cpu'] / plain:.2f} |"
            for m, r in rows.items()
            if m != "imports" and plain
        ),
    ]
    text = (
        f"# Memory and time\n\n{(__doc__ or '').split(chr(10) * 2)[2].strip()}\n\nWeights: {size / 1e9:.2f} GB.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

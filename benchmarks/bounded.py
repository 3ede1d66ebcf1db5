"""A model of 13.5 GB pruned in 4 GiB: memory over time, bytes read and written, time.

    python benchmarks/shapes.py llama-2-7b DIR
    python benchmarks/bounded.py DIR --out FILE.md [--rows magnitude,taylor,default,more] [--max-memory 4GiB]
    python benchmarks/bounded.py --growth --out FILE.md
    python benchmarks/bounded.py --paper --out FILE.md

Each row is one `pared prune --remove 0.2 --max-memory ...`, a process of its own with one thread, whose resident memory
is read from /proc five times a second; bytes read and written are what it asked the system for (rchar and wchar in
/proc/PID/io), those of the source alone stand beside them. Calibration: windows of the documentation's text. What was
predicted: memory and bytes by the run itself before it began, CPU time by `pared prune --dry-run` of the config alone just
before. A row that was measured stays in FILE.json, with a note where one was added, and is not measured again; FILE.svg
shows memory over time.

--growth: how peak memory and CPU time of first-order Taylor scores grow, from a Llama of 4 layers, hidden size 1024, FFN
3072, on 8 x 64 tokens, one of these at a time; memory is the peak less that of a process that only imports the
libraries. Predictions are made as for the rows above. The last row is the default method in two processes against one. --paper: what `pared prune --dry-run`
predicts for models that are not at hand, with 128 x 2048 tokens, on the hardware that the table names.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from shapes import SHAPES, write_checkpoint, write_config

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
FEW = ("--samples", "4", "--seq-len", "64", "--batch", "4")
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "magnitude": ("L2 magnitude, nothing refitted", ("--criterion", "l2", "--compensate", "none")),
    "taylor": ("Taylor on 4 x 64 tokens, nothing refitted", ("--criterion", "taylor", "--compensate", "none", *FEW)),
    "default": ("the default (second order, sequential refit) on 4 x 64 tokens", FEW),
    "more": ("the default on 16 x 128 tokens", ("--samples", "16", "--seq-len", "128", "--batch", "8")),
}
_GIB = 2**30


def text_file(folder: Path) -> Path:
    """Calibration text: what the documentation says."""
    path = folder / "text.txt"
    text = "\n\n".join(p.read_text() for p in sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]))
    if not path.exists():  # a run that goes on wants the file that it began with
        path.write_text(text)
    return path


def watch(command: list[str], log: Path) -> dict[str, Any]:
    """Run a command; its memory over time, the bytes that it moved, and its exit code."""
    started, samples, io, cpu = time.monotonic(), [], {}, 0.0
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=ENVIRONMENT)
        proc = Path(f"/proc/{process.pid}")
        while process.poll() is None:
            try:
                status = (proc / "status").read_text()
                io = dict(re.findall(r"(\w+): (\d+)", (proc / "io").read_text())) or io
                ticks = (proc / "stat").read_text().rpartition(")")[2].split()
            except (OSError, IndexError):
                break
            cpu = (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")
            if found := re.search(r"VmRSS:\s+(\d+)", status):
                samples.append((round(time.monotonic() - started, 2), 1024 * int(found[1])))
                peak = re.search(r"VmHWM:\s+(\d+)", status)
            time.sleep(0.2)
        process.wait()
    return {
        "code": process.returncode,
        "seconds": time.monotonic() - started,
        "cpu": cpu,
        "peak": 1024 * int(peak[1]) if samples and peak else 0,
        "samples": samples[:: max(1, len(samples) // 600)],
        "read": int(io.get("rchar", 0)),
        "written": int(io.get("wchar", 0)),
    }


def prune(model: Path, out: Path, flags: tuple[str, ...], *, memory: str | None, text: Path, spill: Path) -> dict[str, Any]:
    """One `pared prune`, its report, and what it took."""
    bound = ("--max-memory", memory, "--spill", str(spill)) if memory else ()
    command = [sys.executable, "-m", "pared", "prune", str(model), "-o", str(out), "--remove", "0.2"]
    command += [*flags, "--calibration", str(text), *bound, "--format", "json"]
    log = out.with_name(out.name + ".log")
    found = watch(command, log)
    lines = log.read_text()
    if found["code"]:
        raise SystemExit(f"{' '.join(command)}\nended with {found['code']}:\n{lines[-2000:]}")
    found["report"] = json.loads(lines[lines.index("{\n") :])
    return found


def foreseen(model: Path, flags: tuple[str, ...], *, memory: str | None, text: Path) -> float:
    """CPU seconds that a dry run says such a run would take: of the config alone, on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(model / "config.json", folder)
        command = [sys.executable, "-m", "pared", "prune", folder, "--dry-run", "--remove", "0.2", *flags]
        command += ["--calibration", str(text), *(("--max-memory", memory) if memory else ()), "--format", "json"]
        done = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    return 3600 * float(json.loads(done.stdout)["predicted"]["hours"])


def plot(rows: dict[str, dict[str, Any]], limit: float, path: Path) -> None:
    """Resident memory over time, one line for each row, as an SVG."""
    width, height, left, bottom = 760, 300, 60, 40
    longest = max(r["samples"][-1][0] for r in rows.values())
    top = 1.1 * max(limit, *(r["peak"] for r in rows.values()))
    colours = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")

    def at(t: float, b: float) -> str:
        return f"{left + t / longest * (width - left - 10):.1f},{height - bottom - b / top * (height - bottom - 10):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
    ]
    for gib in range(int(top / _GIB) + 1):
        a, b = at(0, gib * _GIB), at(longest, gib * _GIB)
        parts.append(f'<polyline points="{a} {b}" stroke="#ddd" fill="none"/>')
        parts.append(f'<text x="8" y="{a.split(",")[1]}">{gib} GiB</text>')
    parts.append(f'<polyline points="{at(0, limit)} {at(longest, limit)}" stroke="black" stroke-dasharray="6 4" fill="none"/>')
    for colour, row in zip(colours, rows.values(), strict=False):
        parts.append(f'<polyline points="{" ".join(at(*s) for s in row["samples"])}" stroke="{colour}" fill="none"/>')
    for k, (colour, name) in enumerate(zip(colours, rows, strict=False)):
        parts.append(f'<text x="{left + 10 + 110 * k}" y="{height - 8}" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{width - 90}" y="{height - 8}">{longest:.0f} s</text></svg>')
    path.write_text("\n".join(parts) + "\n")


def bounded(args: argparse.Namespace) -> None:
    """The rows of the table that are not measured yet, and the table."""
    store = args.out.with_suffix(".json")
    rows = json.loads(store.read_text()) if store.exists() else {}
    size = sum(f.stat().st_size for f in args.model.glob("*.safetensors"))
    layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
    for name in args.rows.split(","):
        if name in rows:
            continue
        with tempfile.TemporaryDirectory(dir=args.model.parent) as folder:
            place = Path(args.keep or folder)
            place.mkdir(parents=True, exist_ok=True)
            text, out = text_file(place), place / f"out-{name}"
            seconds = foreseen(args.model, ROWS[name][1], memory=args.max_memory, text=text)
            found = prune(args.model, out, ROWS[name][1], memory=args.max_memory, text=text, spill=Path(folder))
            report = found.pop("report")
            rows[name] = {**found, "limit": args.max_memory, "removed": report["removed"], "resources": report.get("resources")}
            rows[name] |= {"weights": size, "layers": layers, "foreseen": seconds}
            shutil.rmtree(out)
        store.write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "| method | layers | peak memory, GiB | predicted | of the weights | CPU minutes | predicted | read / weights | source read / weights | predicted | written / weights |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in rows.items():
        said, size = r["resources"], r["weights"]
        minutes = f"{r['foreseen'] / 60:.1f}" if "foreseen" in r else "—"
        lines.append(
            f"| {ROWS[name][0]} | {r['layers']} | {r['peak'] / _GIB:.2f} | {said['predicted_peak'] / _GIB:.2f} "
            f"| {r['peak'] / size:.2f} | {r['cpu'] / 60:.1f} | {minutes} | {r['read'] / size:.2f} "
            f"| {said['source_read'] / size:.2f} | {said['predicted_read'] / size:.2f} | {r['written'] / size:.2f} |"
        )
    limit = max(_bytes(r["limit"]) for r in rows.values())
    plot(rows, limit, args.out.with_suffix(".svg"))
    about = (__doc__ or "").split("\n\n")[2].strip()
    sizes = ", ".join(
        f"{w / 1e9:.2f} GB with {n} layers" for n, w in sorted({(r["layers"], r["weights"]) for r in rows.values()})
    )
    text = f"# {args.title}\n\n{about}\n\nWeights: {sizes}. The bound: {args.max_memory}.\n\n"
    notes = "".join(f"\n\n{ROWS[name][0]}: {r['note']}" for name, r in rows.items() if "note" in r)
    args.out.write_text(text + "\n".join(lines) + notes + f"\n\n![memory over time]({args.out.with_suffix('.svg').name})\n")


SMALL = {
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 512,
}
GROWTH: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "as it is": ({}, {}),
    "8 layers": ({"num_hidden_layers": 8}, {}),
    "16 layers": ({"num_hidden_layers": 16}, {}),
    "hidden size 2048, FFN 6144": ({"hidden_size": 2048, "intermediate_size": 6144}, {}),
    "32 sequences": ({}, {"samples": 32}),
    "32 sequences, memory bound to 0.65 GiB": ({}, {"samples": 32, "bound": 1}),
    "sequences of 256 tokens": ({}, {"seq-len": 256}),
}


def growth(args: argparse.Namespace) -> None:
    """Peak memory and CPU time against layers, hidden size, samples and sequence length; two processes against one."""
    lines = ["| run | weights, GB | peak memory, MiB | predicted, MiB | CPU seconds | predicted |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = text_file(folder)
        imports = watch([sys.executable, "-c", "import time, pared.run; time.sleep(1)"], folder / "log")["peak"]
        for label, (shape, sizes) in GROWTH.items():
            size = write_checkpoint(folder / "model", SMALL | shape)
            flags = ["--criterion", "taylor", "--compensate", "none", "--structures", "ffn", "--batch", "4"]
            flags += ["--samples", str(sizes.get("samples", 8)), "--seq-len", str(sizes.get("seq-len", 64))]
            bound = "0.65GiB" if "bound" in sizes else "8GiB"
            seconds = foreseen(folder / "model", tuple(flags), memory=bound, text=text)
            found = prune(folder / "model", folder / "out", tuple(flags), memory=bound, text=text, spill=folder)
            peak = found["report"]["resources"]["predicted_peak"]
            lines.append(
                f"| {label} | {size / 1e9:.2f} | {(found['peak'] - imports) / 2**20:.0f} | "
                f"{(peak - imports) / 2**20:.0f} | {found['cpu']:.1f} | {seconds:.1f} |"
            )
            shutil.rmtree(folder / "model")
            shutil.rmtree(folder / "out")
        write_checkpoint(folder / "model", SMALL)
        walls = []
        for processes in (1, 2):
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] * (processes > 1)
            command = [sys.executable, *launcher, "-m", "pared", "prune", str(folder / "model"), "-o", str(folder / "out")]
            command += ["--remove", "0.2", "--samples", "32", "--seq-len", "128", "--batch", "4", "--criterion", "taylor"]
            command += ["--compensate", "none", "--structures", "ffn", "--calibration", str(text)]
            walls.append(watch(command, folder / "log")["seconds"])
            shutil.rmtree(folder / "out")
    about = f"{(__doc__ or '').split(chr(10) * 2)[3].strip()}"
    last = f"Taylor scores of 32 x 128 tokens: {walls[0]:.0f} s of wall clock in one process, {walls[1]:.0f} s in two, beside what else the machine did."
    args.out.write_text(f"# How memory and time grow\n\n{about}\n\n" + "\n".join(lines) + f"\n\n{last}\n")


HARDWARE = {
    "one accelerator, 400e12 operations a second in bf16 and 60e12 in fp64, a disk of 5 GB/s": ("400e12,60e12,5e9,5e9", "meta"),
    "32 CPU cores, 2e12 in fp32 and 1e12 in fp64, a disk of 2 GB/s": ("2e12,1e12,2e9,2e9", "cpu"),
}


def paper(args: argparse.Namespace) -> None:
    """Predictions for models of which there is no more than the config."""
    from pared.hardware import Hardware
    from pared.predict import predict

    lines = [
        "| model | method | hardware | least memory, GiB | peak, GiB | spill, GB | read / weights | operations | fp64 | hours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    methods = {"L2": ("l2", "none"), "Taylor": ("taylor", "none"), "default": (None, None)}
    with tempfile.TemporaryDirectory() as folder:
        for model, shape in SHAPES.items():
            write_config(Path(folder) / model, shape)
            for method, (criterion, compensate) in methods.items():
                for said, (numbers, device) in HARDWARE.items():
                    settings = {"criterion": criterion, "compensate": compensate, "seq_len": 2048, "batch": 1}
                    settings |= {"dtype": "bfloat16" if device == "meta" else "float32", "calibration": "text.jsonl"}
                    found = predict(Path(folder) / model, hardware=Hardware.parse(numbers), **settings)
                    lines.append(
                        f"| {model} | {method} | {said} | {found['least'] / _GIB:.1f} | {found['peak'] / _GIB:.0f} "
                        f"| {(found['peak'] - found['least']) / 1e9:.0f} | {found['read_over_weights']:.1f} "
                        f"| {found['flops']:.1e} | {found['solve_flops']:.1e} | {found['hours']:.2f} |"
                    )
    about = (
        "`--paper` of `benchmarks/bounded.py`: nothing of this was run. Least memory: everything that can spill does; peak: "
        "nothing does, and the difference is what may lie on disk instead. 128 x 2048 tokens of calibration, 20% removed."
    )
    args.out.write_text(f"# On paper\n\n{about}\n\n" + "\n".join(lines) + "\n")


def _bytes(text: str) -> int:
    from pared.footprint import parse_size

    return parse_size(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--title", default="A model larger than the memory")
    parser.add_argument("--rows", default="magnitude,taylor")
    parser.add_argument("--max-memory", default="4GiB")
    parser.add_argument("--keep", type=Path, help="where outputs grow, so that a run that was killed goes on")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--paper", action="store_true")
    args = parser.parse_args()
    (growth if args.growth else paper if args.paper else bounded)(args)


if __name__ == "__main__":
    main()

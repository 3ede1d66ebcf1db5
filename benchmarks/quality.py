"""What each method keeps: excess loss and KL against the dense model, over methods, amounts, shapes and seeds.

    python benchmarks/quality.py MODEL --calibration TRAIN --text TEST [--text OTHER] [--out RESULT.md]

MODEL is a directory; TRAIN and TEST are text (.txt) or JSON lines, or `self` for text that the model writes (other
seeds for test than for calibration). Excess loss is log(perplexity pruned / dense). Each cell is the mean over seeds,
which draw the calibration windows anew. Shares are of block parameters; units are not aligned.

Each run is noted in RESULT.partial.jsonl as it ends; started again with the same protocol, the program goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import pared
from pared.calibration import inference, sample_from_model
from pared.errors import ParedError
from pared.evaluate.perplexity import Logits, Windows, logits_of, measure, protocol, windows
from pared.recipe import load_recipe
from pared.source import Source
from pared.structure import SUBLAYERS

# name -> (settings, shapes it is run in)
BOTH = ("uniform", "per-layer")
RANKED: dict[str, object] = {"allocate": "global"}
METHODS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "random": ({"criterion": "random", "compensate": "none"}, BOTH),
    "L1": ({"criterion": "l1", "compensate": "none"}, BOTH),
    "L2": ({"criterion": "l2", "compensate": "none"}, BOTH),
    "Taylor, vector": ({"criterion": "taylor-vector", "compensate": "none"}, BOTH),
    "Taylor": ({"criterion": "taylor", "compensate": "none"}, BOTH),
    "Taylor, second order": ({"criterion": "taylor-second", "compensate": "none"}, BOTH),
    "Taylor, mixed": ({"criterion": "taylor-mixed", "compensate": "none"}, BOTH),
    "Minitron": ({"criterion": "minitron", "compensate": "none"}, BOTH),
    "Wanda-sp": ({"criterion": "wanda_sp", "compensate": "none"}, BOTH),
    "FLAP's metric": ({"criterion": "flap", "compensate": "none"}, BOTH),
    "LLM-Pruner's recipe": ({"recipe": "llm-pruner"}, ("per-layer",)),
    "OBS": ({"criterion": "obs", "compensate": "none"}, BOTH),
    "Wanda-sp + refit": ({"criterion": "wanda_sp", "compensate": "refit"}, BOTH),
    "Taylor + sequential refit": ({"criterion": "taylor"}, BOTH),
    "ShortGPT's layers": ({"criterion": "block_influence", "structures": ("layer",), "compensate": "none"}, BOTH[:1]),
    "layers by influence + bridge": ({"criterion": "block_influence", "structures": ("layer",)}, BOTH[:1]),
    "layers by angle + bridge": ({"criterion": "angular", "structures": ("layer",)}, BOTH[:1]),
    "layers by loss + bridge": ({"criterion": "perplexity", "structures": ("layer",)}, BOTH[:1]),
    "layers by Taylor + bridge": ({"criterion": "taylor", "structures": ("layer",)}, BOTH[:1]),
    "sublayers by influence + bridge": ({"criterion": "block_influence", "structures": SUBLAYERS, **RANKED}, BOTH[1:]),
    "sublayers by loss": ({"criterion": "perplexity", "structures": SUBLAYERS, "compensate": "none", **RANKED}, BOTH[1:]),
    "sublayers by loss + bridge": ({"criterion": "perplexity", "structures": SUBLAYERS, **RANKED}, BOTH[1:]),
    "sublayers by OBS-Fisher + bridge": ({"criterion": "obs-fisher", "structures": SUBLAYERS, **RANKED}, BOTH[1:]),
    "hidden channels by L2": ({"criterion": "l2", "structures": ("hidden",), "compensate": "none"}, BOTH[:1]),
    "hidden channels by Taylor": ({"criterion": "taylor", "structures": ("hidden",), "compensate": "none"}, BOTH[:1]),
    "hidden channels rotated": ({"criterion": "rotation", "structures": ("hidden",), "compensate": "none"}, BOTH[:1]),
    "pared quick": ({"effort": "quick"}, BOTH),
    "pared default": ({}, BOTH),
    "pared default with layers": ({"structures": ("layer", "kv", "query", "ffn")}, BOTH[:1]),
    "pared max": ({"effort": "max"}, BOTH),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--text", action="append", help="evaluation text; several are shown side by side")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--max-windows", type=int, default=0, help="score this many windows of each text; 0: all")
    parser.add_argument("--remove", default="0.2,0.3,0.5")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shapes", default=",".join(BOTH))
    parser.add_argument("--methods", default="", help="a comma-separated part of the methods")
    parser.add_argument("--noted", action="store_true", help="run nothing, write what has been noted so far")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = Source.open(args.model)
    tokenizer, dense = source.get_tokenizer(), pared.load(args.model, dtype=torch.float32)
    texts = args.text or ["self"]
    scored = {}
    for text in texts:
        if text == "self":
            ids = sample_from_model(dense, tokenizer, 64, args.seq_len, 1_000_003)
            cut = Windows(ids, torch.ones(len(ids), dtype=torch.long), None, len(ids), ids.numel())
        else:
            cut = windows(text, tokenizer, args.seq_len)
        if args.max_windows:
            cut = Windows(
                cut.ids[: args.max_windows], cut.first_scored[: args.max_windows], None, cut.documents, cut.stream_tokens
            )
        with inference(dense):
            reference = remembered(logits_of(dense))
            scored[text] = cut, measure(reference, cut), reference
    shares = [float(r) for r in args.remove.split(",")]
    names = [n for n in METHODS if not args.methods or n in args.methods.split(",")]
    lines = []
    journal = Journal(
        args.out.with_suffix(".partial.jsonl"),
        [args.model, args.calibration, texts, args.samples, args.seq_len, args.max_windows],
    )
    for shape in args.shapes.split(","):
        lines += [
            f"\n## {shape}\n",
            "| method | " + " | ".join(f"{r:.0%}" for r in shares) + " | seconds |",
            "| --- |" + " --- |" * (len(shares) + 1),
        ]
        for name in names:
            settings, shapes = METHODS[name]
            if shape not in shapes:
                continue
            cells, seconds, runs = [], 0.0, 0
            for share in shares:
                found: list[dict[str, tuple[float, float]]] = []
                for seed in range(args.seeds):
                    key = [name, settings, shape, share, seed]
                    if (done := journal.get(key)) is None:
                        if args.noted:
                            continue
                        started = time.perf_counter()
                        try:
                            result = prune(args, settings, shape, share, seed, source)
                        except ParedError as error:
                            print(f"{name}, {shape}, {share:.0%}: {error.what}", file=sys.stderr)
                            break
                        done = {"seconds": time.perf_counter() - started, "scores": {}}
                        with inference(result), inference(dense):
                            for text, (cut, base, reference) in scored.items():
                                q = measure(logits_of(result), cut, against=reference)
                                done["scores"][text] = q.nll - base.nll, q.kl or 0.0
                        journal.put(key, done)
                    seconds += done["seconds"]
                    found.append(done["scores"])
                runs += len(found)
                cells.append(" / ".join(_cell([f[t] for f in found], args.seeds) for t in texts))
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {seconds / max(1, runs):.0f} |")
            print(lines[-1], file=sys.stderr, flush=True)
    head = (
        f"# Quality: {Path(args.model).name}\n\n{(__doc__ or '').split(chr(10) * 2)[2].strip()}\n\n"
        f"Calibration: {Path(args.calibration).name}, {args.samples} windows of {args.seq_len} tokens; {args.seeds} seeds. "
        f"A cell is excess loss (KL), in nats per token, the number of seeds after it where it is less, — where nothing was run or the amount is out of reach{', for each text in turn' if len(texts) > 1 else ''}. Texts: "
        + "; ".join(f"{Path(t).name} (dense loss {base.nll:.3f}; {protocol(cut)})" for t, (cut, base, _) in scored.items())
        + "\n"
    )
    args.out.write_text(head + "\n".join(lines) + "\n")


class Journal:
    """Results by what they are of, one JSON line each, appended as they come; those of another protocol are passed over."""

    def __init__(self, path: Path, protocol: list[object]) -> None:
        self.path, self.protocol = path, protocol
        self.lines: dict[str, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # a line that a kill cut short
                entry = json.loads(line)
                self.lines[json.dumps(entry["of"])] = entry["result"]

    def get(self, key: list[object]) -> dict[str, Any] | None:
        return self.lines.get(json.dumps([self.protocol, *key]))

    def put(self, key: list[object], result: dict[str, Any]) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps({"of": [self.protocol, *key], "result": result}) + "\n")


def prune(args: argparse.Namespace, settings: dict[str, object], shape: str, share: float, seed: int, source: Source):
    """One pruned model, as a live model in fp32."""
    options = {**settings, "shape": shape}
    base = {}
    if recipe := options.pop("recipe", None):
        # Its protected ends are those of a 32-layer model; here they shrink with the depth.
        layers = source.layout.num_layers
        base = {**load_recipe(str(recipe)), "keep_first": max(1, layers * 4 // 32), "keep_last": max(1, layers * 2 // 32)}
    else:
        options |= {"samples": args.samples, "seq_len": args.seq_len}
    model = pared.load(args.model, dtype=torch.float32)
    return pared.prune(
        model,
        tokenizer=source.get_tokenizer(),
        calibration=args.calibration,
        base=base,
        remove=share,
        of="block-params",
        align=1,
        seed=seed,
        **options,
    ).model


def remembered(logits: Logits) -> Logits:
    """The dense model's logits, computed once for each batch of test windows."""
    seen: dict[bytes, torch.Tensor] = {}

    def get(ids: torch.Tensor) -> torch.Tensor:
        key = ids.numpy().tobytes()
        if key not in seen:
            seen[key] = logits(ids)
        return seen[key]

    return get


def _cell(values: list[tuple[float, float]], seeds: int) -> str:
    if not values:
        return "—"
    excess, kl = (sum(v[i] for v in values) / len(values) for i in (0, 1))
    return f"{excess:.3f} ({kl:.3f})" + (f" [{len(values)}]" if len(values) < seeds else "")


if __name__ == "__main__":
    main()

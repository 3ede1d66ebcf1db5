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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import pared
from pared.calibration import inference, pack, read_documents, sample_from_model, tokenize_documents
from pared.errors import ParedError
from pared.evaluate.perplexity import Logits, Windows, logits_of, measure, protocol, windows
from pared.recipe import MOST_WINDOWS, load_recipe
from pared.source import Source
from pared.structure import SUBLAYERS

# name -> (settings, shapes it is run in)
BOTH = ("uniform", "per-layer")
RANKED: dict[str, object] = {"allocate": "global"}
CLOSED: dict[str, object] = {"reconstruct": 0}  # the refit, and no gradient descent after it
REFIT: dict[str, object] = {"compensate": "sequential", **CLOSED}
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
    "FLAP's recipe": ({"recipe": "flap"}, ("per-layer",)),
    "ShortGPT's layers": ({"criterion": "block_influence", "structures": ("layer",), "compensate": "none"}, BOTH[:1]),
    "layers by influence + bridge": ({"criterion": "block_influence", "structures": ("layer",), **CLOSED}, BOTH[:1]),
    "layers by angle + bridge": ({"criterion": "angular", "structures": ("layer",), **CLOSED}, BOTH[:1]),
    "layers by loss + bridge": ({"criterion": "perplexity", "structures": ("layer",), **CLOSED}, BOTH[:1]),
    "layers by Taylor + bridge": ({"criterion": "taylor", "structures": ("layer",), **CLOSED}, BOTH[:1]),
    "sublayers by influence + bridge": (
        {"criterion": "block_influence", "structures": SUBLAYERS, **RANKED, **CLOSED},
        BOTH[1:],
    ),
    "sublayers by loss": ({"criterion": "perplexity", "structures": SUBLAYERS, "compensate": "none", **RANKED}, BOTH[1:]),
    "sublayers by loss + bridge": ({"criterion": "perplexity", "structures": SUBLAYERS, **RANKED, **CLOSED}, BOTH[1:]),
    "sublayers by OBS-Fisher + bridge": ({"criterion": "obs-fisher", "structures": SUBLAYERS, **RANKED, **CLOSED}, BOTH[1:]),
    "hidden channels by L2": ({"criterion": "l2", "structures": ("hidden",), "compensate": "none"}, BOTH[:1]),
    "hidden channels by Taylor": ({"criterion": "taylor", "structures": ("hidden",), "compensate": "none"}, BOTH[:1]),
    "hidden channels rotated": ({"criterion": "rotation", "structures": ("hidden",), "compensate": "none"}, BOTH[:1]),
    "OBS": ({"criterion": "obs", "compensate": "none"}, BOTH),
    "Minitron + our refit": ({"criterion": "minitron", **REFIT}, BOTH),
    "Wanda-sp + our refit": ({"criterion": "wanda_sp", **REFIT}, BOTH),
    "FLAP's metric + our refit": ({"criterion": "flap", **REFIT}, BOTH),
    "Taylor + our refit": ({"criterion": "taylor", **REFIT}, BOTH),
    "Taylor, second order + our refit": ({"criterion": "taylor-second", **REFIT}, BOTH),
    "Fisher-OBS ranked + our refit": ({"criterion": "obs-fisher", **RANKED, **CLOSED}, BOTH[1:]),
    "Fisher-OBS ranked + our refit with biases": ({"criterion": "obs-fisher", "add_bias": True, **RANKED, **CLOSED}, BOTH[1:]),
    **{
        f"refit, then {steps} steps of {each} window{'s' * (each > 1)}": (
            {"reconstruct": steps, "step_windows": each},
            BOTH,
        )
        for steps, each in ((8, 8), (32, 8), (64, 1), (256, 1))
    },
    "pared quick": ({"effort": "quick"}, BOTH),
    "pared default, closed form": (CLOSED, BOTH),
    "pared default": ({}, BOTH),
    "pared default with biases": ({"add_bias": True}, BOTH),
    "pared default with layers": ({"structures": ("layer", "kv", "query", "ffn")}, BOTH[:1]),
    "pared max": ({"effort": "max", "samples": MOST_WINDOWS}, BOTH),
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
    parser.add_argument("--methods", default="", help="a part of the methods, with ; between them")
    parser.add_argument("--noted", action="store_true", help="run nothing, write what has been noted so far")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.text = args.text or ["self"]
    shares = [float(r) for r in args.remove.split(",")]
    names = [n for n in METHODS if not args.methods or n in args.methods.split(";")]
    runs = [
        (shape, name, share, seed)
        for seed in range(args.seeds)
        for shape in args.shapes.split(",")
        for name in names
        if shape in METHODS[name][1]
        for share in shares
    ]
    journal = Journal(
        args.out.with_suffix(".partial.jsonl"),
        [args.model, args.calibration, args.text, args.samples, args.seq_len, args.max_windows],
    )
    bench = Bench(args)
    for run in () if args.noted else runs:
        if journal.get(key_of(*run)) is None:
            done = bench.run(*run)
            journal.put(key_of(*run), done)
            scores = " / ".join(f"{excess:.3f} ({kl:.3f})" for excess, kl in done["scores"].values()) or done["refused"]
            print(*run, scores, f"{done['seconds']:.0f} s", sep=" | ", file=sys.stderr, flush=True)
    args.out.write_text(table(args, bench, journal, names, shares))


def key_of(shape: str, name: str, share: float, seed: int) -> list[object]:
    return [name, METHODS[name][0], shape, share, seed]


class Bench:
    """One model with its calibration and its test windows, tokenised once, and the dense model's logits on these."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.source = args, Source.open(args.model)
        self.tokenizer, self.dense = self.source.get_tokenizer(), pared.load(args.model, dtype=torch.float32)
        self.scored = {}
        for text in args.text:
            cut = self._windows(text)
            if args.max_windows:
                cut = replace(cut, ids=cut.ids[: args.max_windows], first_scored=cut.first_scored[: args.max_windows])
            with inference(self.dense):
                reference = remembered(logits_of(self.dense))
                self.scored[text] = cut, measure(reference, cut), reference
        self._drawn: dict[tuple[int, int, int], torch.Tensor] = {}
        self._tokens: list[list[int]] | None = None

    def _windows(self, text: str) -> Windows:
        if text != "self":
            return windows(text, self.tokenizer, self.args.seq_len)
        ids = sample_from_model(self.dense, self.tokenizer, 64, self.args.seq_len, 1_000_003)
        return Windows(ids, torch.ones(len(ids), dtype=torch.long), None, len(ids), ids.numel())

    def calibration(self, samples: int, length: int, seed: int) -> torch.Tensor:
        """The windows that `pared prune` would draw: int64 [samples, length]."""
        key = samples, length, seed
        if key not in self._drawn and self.args.calibration == "self":
            self._drawn[key] = sample_from_model(self.dense, self.tokenizer, *key)
        elif key not in self._drawn:
            if self._tokens is None:
                self._tokens = tokenize_documents(read_documents(self.args.calibration), self.tokenizer)
            every = pack(self._tokens, length)
            self._drawn[key] = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:samples]]
        return self._drawn[key]

    def run(self, shape: str, name: str, share: float, seed: int) -> dict[str, Any]:
        """Prune, and measure on every text: {"seconds", "scores": {text: (excess loss, KL)}}, or why it was refused."""
        started = time.perf_counter()
        try:
            result = self.prune(METHODS[name][0], shape, share, seed)
        except ParedError as error:
            return {"seconds": 0.0, "scores": {}, "refused": error.what}
        seconds = time.perf_counter() - started
        scores = {}
        with inference(result), inference(self.dense):
            for text, (cut, base, reference) in self.scored.items():
                q = measure(logits_of(result), cut, against=reference)
                scores[text] = q.nll - base.nll, q.kl or 0.0
        return {"seconds": seconds, "scores": scores}

    def prune(self, settings: dict[str, object], shape: str, share: float, seed: int) -> torch.nn.Module:
        """One pruned model, as a live model in fp32."""
        options: dict[str, Any] = {**settings, "shape": shape}
        base: dict[str, Any] = {}
        samples, length = options.pop("samples", self.args.samples), self.args.seq_len
        if recipe := options.pop("recipe", None):
            # Its protected ends are those of a 32-layer model; here they shrink with the depth.
            layers = self.source.layout.num_layers
            base = load_recipe(str(recipe))
            samples, length = base["samples"], base["seq_len"]
            if "keep_first" in base:
                base |= {"keep_first": max(1, layers * 4 // 32), "keep_last": max(1, layers * 2 // 32)}
        pruned = pared.prune(
            pared.load(self.args.model, dtype=torch.float32),
            tokenizer=self.tokenizer,
            calibration=self.calibration(samples, length, seed),
            base=base,
            remove=share,
            of="block-params",
            align=1,
            seed=seed,
            **options,
        )
        assert pruned.model is not None
        return pruned.model


def table(args: argparse.Namespace, bench: Bench, journal: Journal, names: list[str], shares: list[float]) -> str:
    """What is noted, with the protocol above it."""
    texts = args.text
    lines = [
        f"# Quality: {Path(args.model).name}\n\n{(__doc__ or '').split(chr(10) * 2)[2].strip()}\n\n"
        f"Calibration: {Path(args.calibration).name}, {args.samples} windows of {args.seq_len} tokens "
        f"({MOST_WINDOWS} at the highest effort); {args.seeds} seeds. "
        f"A cell is excess loss (KL), in nats per token, the number of seeds after it where it is less, — where nothing was run or the amount is out of reach{', for each text in turn' if len(texts) > 1 else ''}. Texts: "
        + "; ".join(
            f"{Path(t).name} (dense loss {base.nll:.3f}; {protocol(cut)})" for t, (cut, base, _) in bench.scored.items()
        )
    ]
    for shape in args.shapes.split(","):
        lines += [
            f"\n## {shape}\n",
            "| method | " + " | ".join(f"{r:.0%}" for r in shares) + " | seconds |",
            "| --- |" + " --- |" * (len(shares) + 1),
        ]
        for name in names:
            if shape not in METHODS[name][1]:
                continue
            cells, seconds = [], []
            for share in shares:
                noted = [journal.get(key_of(shape, name, share, seed)) for seed in range(args.seeds)]
                found = [done for done in noted if done is not None and done["scores"]]
                seconds += [done["seconds"] for done in found]
                cells.append(" / ".join(_cell([done["scores"][t] for done in found], args.seeds) for t in texts))
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {sum(seconds) / max(1, len(seconds)):.0f} |")
    return "\n".join(lines) + "\n"


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
        self.lines[json.dumps([self.protocol, *key])] = json.loads(json.dumps(result))
        with self.path.open("a") as stream:
            stream.write(json.dumps({"of": [self.protocol, *key], "result": result}) + "\n")


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

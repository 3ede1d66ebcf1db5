"""What a recovery brings back: excess loss after equal tokens, for each start, objective and method.

    python benchmarks/recovery.py MODEL --data TRAIN --text TEST --work DIR --out RESULT.md [--plot RESULT.svg]

MODEL is a dense directory. Starts are pruned from it once and kept in DIR: by LLM-Pruner's recipe (both end layers
protected), by pared's default and by pared's highest effort, uniform and with sizes searched layer by layer, each with as
many windows of TRAIN as it takes by itself. Excess loss is log(perplexity / dense perplexity) on TEST; training sees TRAIN
alone, and chooses its weights on a part of TRAIN. Rates are the defaults of `pared recover`.

Each run is noted in RESULT.partial.jsonl as it ends; started again, the program goes on from there. --minutes ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from quality import Journal

import pared
from pared.errors import ParedError
from pared.evaluate.perplexity import logits_of, measure, protocol, windows
from pared.recipe import load_recipe
from pared.recover import recover
from pared.source import Source

STARTS: dict[str, dict[str, Any]] = {
    "LLM-Pruner's recipe": {"recipe": "llm-pruner", "keep_first": 1, "keep_last": 1},
    "pared default": {},
    "pared max": {"effort": "max"},
    "pared max, per-layer": {"effort": "max", "shape": "per-layer"},
}
# start, method, objective; in the order in which they are run
RUNS = (
    ("pared max, per-layer", "full", "distill"),
    ("LLM-Pruner's recipe", "lora", "ce"),
    ("pared max, per-layer", "full", "ce"),
    ("pared max, per-layer", "lora", "distill"),
    ("pared max", "full", "distill"),
    ("LLM-Pruner's recipe", "full", "distill"),
    ("LLM-Pruner's recipe", "lora", "distill"),
    ("LLM-Pruner's recipe", "full", "ce"),
    ("pared max, per-layer", "full", "both"),
    ("pared max, per-layer", "lora", "ce"),
    ("pared default", "full", "distill"),
    ("pared default", "full", "ce"),
)
TOKENS = (65536, 262144)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--remove", default="0.2,0.3,0.5")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after this time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dense = pared.load(args.model, dtype=torch.float32)
    test = windows(args.text, Source.open(args.model).get_tokenizer(), args.seq_len)
    reference = measure(logits_of(dense), test)
    shares = [float(s) for s in args.remove.split(",")]
    budgets = [int(t) for t in args.tokens.split(",")]
    journal = Journal(
        args.out.with_suffix(".partial.jsonl"), [args.model.name, Path(args.data).name, args.text.name, args.seq_len]
    )
    end = time.monotonic() + 60 * args.minutes

    def excess(path: Path) -> tuple[float, float]:
        found = measure(logits_of(pared.load(path, dtype=torch.float32)), test, against=logits_of(dense))
        return found.nll - reference.nll, found.kl or 0.0

    def noted(key: list[Any], run: Any) -> dict[str, Any] | None:
        done = journal.get(key)
        if done is None and time.monotonic() < end:
            done = run()
            journal.put(key, done)
            print(*key, {k: round(v, 4) if isinstance(v, float) else v for k, v in done.items()}, file=sys.stderr, flush=True)
        return done

    found: dict[tuple[str, str, str, float, int], dict[str, Any]] = {}
    for start, method, objective in RUNS:
        for share in shares:
            path = args.work / f"{start.split()[-1].replace('recipe', 'llm-pruner')}-{share}"

            def begin(start: str = start, share: float = share, path: Path = path) -> dict[str, Any]:
                prune(args, start, share, path)
                loss, kl = excess(path)
                return {"excess": loss, "kl": kl}

            with contextlib.suppress(ParedError):
                if (zero := noted([start, share], begin)) is None:
                    continue
                found[start, method, objective, share, 0] = zero
            for tokens in budgets:

                def train(
                    path: Path = path, method: str = method, objective: str = objective, tokens: int = tokens
                ) -> dict[str, Any]:
                    out = args.work / "trained"
                    for left in (out, out.with_name(f"{out.name}.training")):  # the latter where a run was killed
                        shutil.rmtree(left, ignore_errors=True)
                    settings = {"method": method, "objective": objective, "tokens": tokens, "merge": method == "lora"}
                    done = recover(
                        path, out=out, teacher=args.model, data=args.data, seq_len=args.seq_len, device="cpu", **settings
                    )
                    loss, kl = excess(out)
                    keys = ("tokens", "steps", "batch", "learning_rate")
                    return {"excess": loss, "kl": kl, **{k: done.report[k] for k in keys}}

                if (done := noted([start, method, objective, share, tokens], train)) is not None:
                    found[start, method, objective, share, tokens] = done
    args.out.write_text(table(args, found, shares, budgets, protocol(test), reference.nll))
    if args.plot:
        plot(args.plot, found, shares)


def prune(args: argparse.Namespace, start: str, share: float, path: Path) -> None:
    if path.exists():
        return
    settings = dict(STARTS[start])
    base = load_recipe(settings.pop("recipe")) if "recipe" in settings else {"seq_len": args.seq_len}
    base |= {"align": 1}
    pared.prune(args.model, out=path, base=base, remove=share, calibration=args.data, **settings)


def table(
    args: argparse.Namespace, found: dict[Any, dict[str, Any]], shares: list[float], budgets: list[int], how: str, nll: float
) -> str:
    paragraph = (__doc__ or "").split("\n\n")[2].replace("\n", " ")
    head = (
        f"# Recovery: {args.model.name}\n\n{paragraph}\n\nTRAIN: {Path(args.data).name}. TEST: {args.text.name} (dense loss "
        f"{nll:.3f}; {how}) One seed; rows of {args.seq_len} tokens. A cell is excess loss (KL), in nats per token. "
        "— was not run.\n\n"
    )
    columns = ["start", "trained", "objective", "tokens", *(f"{s:.0%}" for s in shares)]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    seen = set()
    for start, method, objective in RUNS:
        for tokens in (0, *budgets):
            if tokens == 0 and start in seen:
                continue
            cells = []
            for share in shares:
                done = found.get((start, method, objective, share, tokens))
                cells.append(f"{done['excess']:.3f} ({done['kl']:.3f})" if done else "—")
            if set(cells) == {"—"}:
                continue
            seen.add(start)
            what = ("nothing", "") if tokens == 0 else ("all weights" if method == "full" else "LoRA r=8", objective)
            lines.append("| " + " | ".join([start, *what, f"{tokens:,}", *cells]) + " |")
    return head + "\n".join(lines) + "\n"


def plot(path: Path, found: dict[Any, dict[str, Any]], shares: list[float]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    shares = [s for s in shares if any(k[3] == s and k[4] for k in found)]
    figure, axes = pyplot.subplots(1, len(shares), figsize=(4.5 * len(shares), 4), squeeze=False)
    for axis, share in zip(axes[0], shares, strict=True):
        for start, method, objective in RUNS:
            points = sorted((k[4], v["excess"]) for k, v in found.items() if k[:4] == (start, method, objective, share))
            if len(points) > 1:
                axis.plot(
                    [t / 1024 for t, _ in points], [e for _, e in points], marker="o", label=f"{start}, {method}, {objective}"
                )
        axis.set(title=f"{share:.0%} of the blocks removed", xlabel="thousand tokens (1024)", ylabel="excess loss, nats")
        axis.set_ylim(bottom=0)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()

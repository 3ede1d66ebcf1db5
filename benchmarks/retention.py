"""How much of a model is kept when 10-70% of its blocks go, across families, one-shot and after an equal recovery.

    python benchmarks/retention.py REFS --text REFS/held-out.jsonl --data REFS/train.jsonl --work DIR --out RESULT.md --plot RESULT.svg

REFS holds reference models (benchmarks/train_reference.py): unlike families, trained on one text with one tokenizer.
Each is pruned with pared's defaults (per-layer form where the family's own config has no words for what goes), then
recovered by distillation from itself dense, with the same tokens for all. Accuracy is the share of held-out tokens that
the model finds likeliest, kept as a share of the dense model's; excess loss is log(perplexity / dense perplexity). Models
so small would be at chance in multiple-choice tasks, so none is run.

Each run is noted in RESULT.partial.jsonl as it ends; started again, the program goes on from there. --minutes ends it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from quality import Journal

import pared
from pared.errors import ParedError
from pared.evaluate.perplexity import Windows, logits_of, measure, protocol, windows
from pared.recover import recover
from pared.resolve import removable
from pared.source import Source

CHARACTERS = 8  # of text to a token of the recovery: more than twice what it reads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("refs", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--families", default="llama-gqa,qwen3,gpt-neox,bloom,moe")
    parser.add_argument("--remove", default="0.1,0.2,0.3,0.4,0.5,0.6,0.7")
    parser.add_argument("--effort", default="default")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--max-windows", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after this time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    families = [f for f in args.families.split(",") if (args.refs / f / "config.json").exists()]
    shares = [float(s) for s in args.remove.split(",")]
    journal = Journal(
        args.out.with_suffix(".partial.jsonl"),
        [args.text.name, args.data.name, args.effort, args.samples, args.seq_len, args.tokens, args.max_windows],
    )
    end = time.monotonic() + 60 * args.minutes
    args.work.mkdir(parents=True, exist_ok=True)
    excerpt = excerpt_of(args.data, args.work / "text.jsonl", CHARACTERS * args.tokens)
    test = windows(args.text, Source.open(args.refs / families[0]).get_tokenizer(), args.seq_len)
    test = Windows(
        test.ids[: args.max_windows], test.first_scored[: args.max_windows], None, test.documents, test.stream_tokens
    )
    found: dict[tuple[str, float], dict[str, Any]] = {}
    # A share of all families before the next one, so that what is there when the time is up can be compared.
    for share in shares:
        for family in families:
            key = [family, share]
            if (done := journal.get(key)) is None and time.monotonic() < end:
                done = one(args, family, share, excerpt, test)
                journal.put(key, done)
                print(family, share, done, file=sys.stderr, flush=True)
            if done is not None:
                found[family, share] = done
    args.out.write_text(table(args, families, shares, found, protocol(test)))
    if args.plot:
        plot(args.plot, families, shares, found)


def excerpt_of(data: Path, to: Path, characters: int) -> Path:
    """Documents from all over a text, about so many characters in all."""
    lines = data.read_text().splitlines(keepends=True)
    step = max(1, sum(map(len, lines)) // characters)
    to.write_text("".join(lines[::step]))
    return to


def one(args: argparse.Namespace, family: str, share: float, excerpt: Path, test: Windows) -> dict[str, Any]:
    """One family at one amount: the dense model, the pruned one, and the recovered one."""
    dense = args.refs / family
    for name in ("pruned", "recovered"):
        shutil.rmtree(args.work / name, ignore_errors=True)
    _, shape = removable(Source.open(dense).layout)
    settings: dict[str, Any] = {
        "effort": args.effort,
        "shape": shape,
        "samples": args.samples,
        "seq_len": args.seq_len,
        "align": 1,
    }
    if shape == "per-layer":
        settings["allocate"] = "uniform"  # the same sizes in every layer, as the other families get
    out: dict[str, Any] = {"dense": scores(dense, dense, test)}
    try:
        cut = pared.prune(dense, out=args.work / "pruned", remove=share, calibration=str(excerpt), **settings)
    except ParedError as error:
        return {**out, "refused": error.what}
    out |= {"removed": cut.report["removed"], "shape": shape, "one-shot": scores(args.work / "pruned", dense, test)}
    done = recover(
        args.work / "pruned",
        out=args.work / "recovered",
        teacher=dense,
        data=str(excerpt),
        tokens=args.tokens,
        seq_len=args.seq_len,
        device="cpu",
    )
    return {**out, "tokens": done.report["tokens"], "recovered": scores(args.work / "recovered", dense, test)}


def scores(path: Path, dense: Path, test: Windows) -> dict[str, float]:
    """Loss, KL to the dense model, and next-token accuracy."""
    model = logits_of(pared.load(path, dtype=torch.float32))
    reference = None if path == dense else logits_of(pared.load(dense, dtype=torch.float32))
    right = 0
    for ids in test.ids.split(8):
        right += int((model(ids)[:, :-1].argmax(-1) == ids[:, 1:]).sum())
    found = measure(model, test, against=reference)
    return {"nll": found.nll, "kl": found.kl or 0.0, "accuracy": right / test.tokens}


def table(args: argparse.Namespace, families: list[str], shares: list[float], found: dict[Any, Any], how: str) -> str:
    paragraph = (__doc__ or "").split("\n\n")[2].replace("\n", " ")
    facts = {f: json.loads((args.refs / f / "training.json").read_text()) for f in families}
    models = "; ".join(
        f"{f} ({facts[f]['tokens'] / 1e6:.1f}M tokens, held-out loss {facts[f]['held_out_loss']:.3f})" for f in families
    )
    head = (
        f"# Retention across families\n\n{paragraph}\n\nModels: {models}. Pruned with --effort {args.effort}, calibrated on "
        f"{args.samples} windows of {args.seq_len} tokens; recovered with {args.tokens:,} tokens. Text: {how} Of these the first "
        f"{args.max_windows} windows alone. One seed. — was not run.\n"
    )
    refused = {f"{f}, {s:.0%}: {d['refused']}" for (f, s), d in found.items() if "refused" in d}
    lines = [f"\nRefused: {r}." for r in sorted(refused)]
    for title, value in (
        ("accuracy kept", lambda d, s: f"{d[s]['accuracy'] / d['dense']['accuracy']:.1%}"),
        ("excess loss (KL), nats per token", lambda d, s: f"{d[s]['nll'] - d['dense']['nll']:.3f} ({d[s]['kl']:.3f})"),
    ):
        lines += [
            f"\n## {title}\n",
            "| family | | " + " | ".join(f"{s:.0%}" for s in shares) + " |",
            "| --- " * (len(shares) + 2) + "|",
        ]
        for family in families:
            for state in ("one-shot", "recovered"):
                cells = [cell(found.get((family, s)), state, value) for s in shares]
                lines.append(f"| {family} | {state} | " + " | ".join(cells) + " |")
    return head + "\n".join(lines) + "\n"


def cell(done: dict[str, Any] | None, state: str, value: Any) -> str:
    if done is None:
        return "—"
    return value(done, state) if state in done else "refused"


def plot(path: Path, families: list[str], shares: list[float], found: dict[Any, Any]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for i, family in enumerate(families):
        for state, style in (("one-shot", "--"), ("recovered", "-")):
            done = [(s, d) for s in shares if (d := found.get((family, s))) and state in d]
            at = [100 * s for s, _ in done]
            kept = [100 * d[state]["accuracy"] / d["dense"]["accuracy"] for _, d in done]
            label = family if state == "recovered" else None
            left.plot(at, kept, style, color=f"C{i}", marker="o", label=label)
            right.plot(at, [d[state]["kl"] for _, d in done], style, color=f"C{i}", marker="o")
    left.set(xlabel="% of the blocks removed", ylabel="% of next-token accuracy kept")
    right.set(xlabel="% of the blocks removed", ylabel="KL to the dense model, nats")
    left.legend(title="dashed: one-shot")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()

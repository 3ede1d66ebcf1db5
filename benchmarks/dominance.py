"""Where the default method stands among the others: over models, shapes, amounts and texts, from what quality.py noted.

    python benchmarks/dominance.py RESULT.partial.jsonl ... --out FILE.md

For each cell the mean KL to the dense model (excess loss) of pared's default and of the best other method of the same
shape, the latter with pared's own refit (without reconstruction) where that makes it better. Means are over the seeds
that both have. Beside the table a plot for each model and shape: KL on the first text against the share removed, one
line per method.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from long_context_report import plot

DEFAULT = "pared default"
HEADER = "\n| shape | removed | text | pared default | best other | its method | ratio of KL | seeds |\n|" + " --- |" * 8
Scores = dict[int, dict[str, tuple[float, float]]]  # seed -> text -> (excess loss, KL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("noted", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lines, won, cells = [], 0, 0
    for path in args.noted:
        found, protocol = read(path)
        model, calibration, texts, samples, length, scored = protocol
        name = Path(model).name
        lines += [
            f"\n## {name}\n",
            f"Calibration: {Path(calibration).name}, {samples} windows of {length} tokens; "
            + (f"{scored} windows of each text." if scored else "all of each text."),
        ]
        for shape in ("uniform", "per-layer"):
            shares = sorted({share for s, share, _ in found if s == shape})
            if shares:
                lines.append(HEADER)
            for share in shares:
                ours = found.get((shape, share, DEFAULT), {})
                for text in texts:
                    row = compare(ours, {m: f for (s, r, m), f in found.items() if (s, r) == (shape, share)}, text)
                    if row is not None:
                        (excess, kl), (other_excess, other_kl), method, seeds = row
                        won, cells = won + (kl <= other_kl), cells + 1
                        lines.append(
                            f"| {shape} | {share:.0%} | {Path(text).name} | {kl:.3f} ({excess:.3f}) | "
                            f"{other_kl:.3f} ({other_excess:.3f}) | {method} | {kl / other_kl:.2f} | {seeds} |"
                        )
            if shares:
                drawn = args.out.with_name(f"{args.out.stem}-{name}-{shape}.svg")
                plot(
                    drawn, curves(found, shape, texts[0]), "share of block parameters removed", "KL to dense, nats", lines=True
                )
                lines.append(f"\n![{name}, {shape}]({drawn.name})\n")
    head = "# The default method among the others\n\n" + (__doc__ or "").split("\n\n")[2]
    head += f"\n\nOf {cells} cells the default has the lowest KL, or shares it, in {won}."
    args.out.write_text("\n".join([head, *lines]) + "\n")


def read(path: Path) -> tuple[dict[tuple[str, float, str], Scores], list[object]]:
    """(shape, share, method) -> scores, and the protocol, of which a file has one."""
    found: dict[tuple[str, float, str], Scores] = defaultdict(dict)
    protocol: list[object] = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        protocol, method, _, shape, share, seed = entry["of"]
        if entry["result"]["scores"]:
            found[shape, share, method][seed] = entry["result"]["scores"]
    return found, protocol


def mean(scores: Scores, text: str, seeds: list[int]) -> tuple[float, float]:
    """Excess loss and KL."""
    excess, kl = (sum(scores[seed][text][i] for seed in seeds) / len(seeds) for i in (0, 1))
    return excess, kl


def compare(
    ours: Scores, all_methods: dict[str, Scores], text: str
) -> tuple[tuple[float, float], tuple[float, float], str, int] | None:
    """The default's and the best other's (excess loss, KL), that method's name, and over how many seeds."""
    best = None
    for method, theirs in all_methods.items():
        seeds = sorted(ours.keys() & theirs.keys())
        if method.startswith("pared") or not seeds:
            continue
        row = mean(ours, text, seeds), mean(theirs, text, seeds), method, len(seeds)
        if best is None or row[1][1] < best[1][1]:
            best = row
    return best


def curves(found: dict[tuple[str, float, str], Scores], shape: str, text: str) -> dict[str, list[tuple[float, float]]]:
    """Method -> (share removed, KL), over all seeds of each."""
    out: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (s, share, method), scores in sorted(found.items()):
        if s == shape:
            out[method].append((share, mean(scores, text, list(scores))[1]))
    return out


if __name__ == "__main__":
    main()

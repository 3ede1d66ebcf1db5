"""The table and the plots of long_context.py, from its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 800, 420, 70, 230, 30, 50
_COLOURS = ("#1f4e79", "#c0504d", "#4f8f3a", "#8064a2", "#d98324", "#2aa198", "#7f7f7f", "#b03a8c", "#5b5b00", "#0a7d5a")


def write(record: dict[str, Any], out: Path) -> None:
    """OUT.json, OUT.md and the plots OUT-positions.svg and OUT-bytes.svg."""
    out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    rows, trained = record["rows"], record["trained"]
    dense = next(r for r in rows if r["name"] == "dense")
    names = [f"KL at {b['first']}-{b['end'] - 1}" for b in dense["positions"]]
    lengths = sorted({h["length"] for h in dense["retrieval"]})
    head = ["row", "bytes", "of dense", "cache", *names, "perplexity within", "past", *(f"found at {n}" for n in lengths)]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(head) - 1)]
    for r in rows:
        cells = [r["name"], f"{r['bytes'] / 1e6:.2f} MB", f"{r['bytes'] / dense['bytes']:.0%}"]
        cells.append(f"{r['kv_cache_per_token'] / dense['kv_cache_per_token']:.0%}")
        cells += [f"{b['kl']:.4f}" for b in r["positions"]]
        cells += [f"{_perplexity(r, trained, past=past):.2f}" for past in (False, True)]
        cells += [_found(r, n) for n in lengths]
        lines.append("| " + " | ".join(cells) + " |")
    n, length = record["windows"]
    text = [
        f"# Long context: {record['model']}",
        f"Trained on windows of {trained} tokens. {n} windows of {length} tokens of {record['text']}; "
        f"KL(dense || row) in nats per token, to the dense model in fp32, by position in the window; perplexity within the "
        f"trained length and past it. Keys: {record['needles']} sequences for each of three depths (0, 50 and 100%) and "
        "each length, three other keys beside the one asked for; found: the value is the first choice of all tokens, over all "
        "depths and in brackets at each. "
        f"Pruned with defaults on {record['samples']} x 256 tokens of {record['calibration']}, shares of block parameters, "
        "widths in multiples of 32; `layers`: whole blocks. Bytes: of the GGUF file with its tokenizer, fp16 where no type is "
        "named (torchao, NF4: of the tensors held, fp16 for what is not quantised). Cache: bytes of keys and values a token "
        "against dense. All in llama.cpp with the cache in fp32, torchao and NF4 in transformers.",
        "\n".join(lines),
        f"![KL by position]({out.name}-positions.svg)\n\n![KL against bytes]({out.name}-bytes.svg)",
    ]
    out.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    shown = [r for r in rows if r["name"] != "dense"][:10]
    series = {r["name"]: [((b["first"] + b["end"]) / 2, b["kl"]) for b in r["positions"]] for r in shown}
    plot(Path(f"{out}-positions.svg"), series, "position", "KL to dense, nats", lines=True)
    points = {r["name"]: [(r["bytes"] / 1e6, sum(b["kl"] * b["tokens"] for b in r["positions"]) / _tokens(r))] for r in rows}
    points.pop("dense")
    plot(Path(f"{out}-bytes.svg"), points, "MB", "mean KL to dense, nats", lines=False)


def _tokens(row: dict[str, Any]) -> int:
    return sum(b["tokens"] for b in row["positions"])


def _perplexity(row: dict[str, Any], trained: int, *, past: bool) -> float:
    chosen = [b for b in row["positions"] if (b["first"] >= trained) == past]
    tokens = sum(b["tokens"] for b in chosen)
    return float(2.718281828459045 ** (sum(b["nll"] * b["tokens"] for b in chosen) / tokens))


def _found(row: dict[str, Any], length: int) -> str:
    """The share of keys found, and in brackets that at each depth."""
    hits = [(h["depth"], h["found"]) for h in row["retrieval"] if h["length"] == length]
    return f"{sum(f for _, f in hits) / len(hits):.0%} (" + ", ".join(f"{f:.0%}" for _, f in sorted(hits)) + ")"


def plot(path: Path, series: dict[str, list[tuple[float, float]]], x_name: str, y_name: str, *, lines: bool) -> None:
    """One SVG: named series as lines, or as points with their names. The vertical axis is logarithmic."""
    from math import floor, log10

    xs = [x for s in series.values() for x, _ in s]
    ys = [max(y, 1e-6) for s in series.values() for _, y in s]
    low, high = floor(log10(min(ys))), log10(max(ys)) + 0.1
    x_low, x_high = (0, max(xs)) if lines else (min(xs) * 0.9, max(xs) * 1.05)
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (log10(max(y, 1e-6)) - low) / ((high - low) or 1)
        return round(_LEFT + width * across, 1), round(_TOP + height * (1 - up), 1)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<path d="M{_LEFT} {_TOP}V{_TOP + height}H{_LEFT + width}" fill="none" stroke="black"/>',
        f'<text x="{_LEFT + width / 2}" y="{_HEIGHT - 12}" text-anchor="middle">{x_name}</text>',
        f'<text x="14" y="{_TOP + height / 2}" transform="rotate(-90 14 {_TOP + height / 2})" text-anchor="middle">{y_name}</text>',
    ]
    for power in range(low, floor(high) + 1):
        y = at(x_low, 10.0**power)[1]
        out.append(
            f'<path d="M{_LEFT} {y}h{width}" stroke="#ddd"/><text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">1e{power}</text>'
        )
    for i in range(5):
        x = x_low + (x_high - x_low) * i / 4
        out.append(f'<text x="{at(x, 1)[0]}" y="{_TOP + height + 16}" text-anchor="middle">{x:.4g}</text>')
    for i, (name, points) in enumerate(series.items()):
        colour, places = _COLOURS[i % len(_COLOURS)], [at(*p) for p in points]
        if lines:
            path_data = "M" + "L".join(f"{x} {y}" for x, y in places)
            out.append(f'<path d="{path_data}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            out.append(f'<text x="{_LEFT + width + 10}" y="{_TOP + 14 * i + 8}" fill="{colour}">{name}</text>')
        for x, y in places:
            out.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
            if not lines:
                out.append(f'<text x="{x + 5}" y="{y + 4}" fill="{colour}">{name}</text>')
    path.write_text("\n".join([*out, "</svg>"]) + "\n")

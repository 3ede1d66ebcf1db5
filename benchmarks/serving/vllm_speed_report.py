"""The tables of vllm_speed.py, from its record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

SHAPES = ("uniform", "per-layer", "depth")


def write(rows: dict[str, dict[str, Any]], batches: Sequence[int], protocol: str, out: Path) -> None:
    """Markdown: one table for each batch, and how much of what was removed comes back as time."""
    parts = ["# Serving speed in vLLM", protocol.strip(), *(table(rows, b) for b in batches), paying(rows, batches)]
    out.write_text("\n\n".join(parts) + "\n")


def table(rows: dict[str, dict[str, Any]], batch: int) -> str:
    def cells(name: str, removed: float, nbytes: int, got: dict[str, float], against: str, peak: int) -> str:
        return (
            f"| {name} | {removed:.1%} | {nbytes / 1e6:.0f} | {1 / got['time']:.2f} | {against} "
            f"| {got['first'] * 1e3:.0f} | {got['each'] * 1e3:.1f} | {peak / 1e6:.0f} |"
        )

    sides = [row[str(batch)]["dense"] for row in rows.values()]
    dense = {k: median(s[k] for s in sides) for k in ("time", "first", "each")}
    any_row = next(iter(rows.values()))
    lines = [
        f"## {batch} request{'s' if batch > 1 else ''} at once",
        "",
        "| | blocks removed | weights, MB | requests/s | against dense | first token, ms | each further, ms | peak memory, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        cells("dense (over all rows)", 0.0, any_row["dense_bytes"], dense, "1.00", any_row["peak"]["dense"]),
    ]
    for name, row in rows.items():
        got, ratios = row[str(batch)]["pruned"], row[str(batch)]["ratios"]
        against = f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        lines.append(cells(name, row["removed"], row["bytes"], got, against, row["peak"]["pruned"]))
    return "\n".join(lines)


def paying(rows: dict[str, dict[str, Any]], batches: Sequence[int]) -> str:
    """Time saved for each share of the blocks that went, by shape."""
    lines = []
    for batch in batches:
        parts = []
        for shape in SHAPES:
            shares = [(1 - 1 / median(r[str(batch)]["ratios"])) / r["removed"] for n, r in rows.items() if n.startswith(shape)]
            if shares:
                parts.append(f"{shape} {sum(shares) / len(shares):.2f}")
        lines.append(f"- at {batch}: " + ", ".join(parts))
    return (
        "## What pays\n\nTime saved for each share of the blocks' parameters removed (1.00: 30% fewer parameters, 30% less time; "
        "the mean over the rows of a shape):\n\n" + "\n".join(lines)
    )

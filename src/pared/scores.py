"""Scores: what every structure is worth under one criterion, in memory and in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pared.errors import UsageError
from pared.plan import to_ranges
from pared.rotation import Rotation

_POWER = "gradient power."


@dataclass
class Scores:
    """Importance, larger = keep. of: (layer, axis) -> fp32 [units]; layer is None for "hidden" and for "layer".

    Units of a nested axis count parent-major: query head q of KV group k is unit k * query + q.
    visits: layer -> int64 [experts], calibration tokens sent to each, where they were seen. power: (layer, consumer's local
    name) -> fp32 [out], the mean square of the loss's gradient at its output, where it was measured. rotation: the basis
    that the scores of hidden channels are in, where it is not the model's own. None of these is in the file of scores.
    """

    of: dict[tuple[int | None, str], Tensor] = field(default_factory=dict)
    comparable: bool = False
    visits: dict[int, Tensor] = field(default_factory=dict)
    power: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    rotation: Rotation | None = None

    def never_visited(self) -> dict[str, Any]:
        """Experts that no calibration token was sent to: how many, of how many, and which in each layer."""
        never = {i: (counts == 0).nonzero()[:, 0].tolist() for i, counts in sorted(self.visits.items())}
        return {
            "count": sum(map(len, never.values())),
            "of": sum(len(c) for c in self.visits.values()),
            "layers": {str(i): to_ranges(e) for i, e in never.items() if e},
        }

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with one tensor for each (layer, axis)."""
        data = {name_of(key): t.contiguous() for key, t in self.of.items()}
        save_file(data, str(path), metadata={"format": "pared-scores/1", "comparable": str(self.comparable)})

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        out = cls()
        with safe_open(str(path), framework="pt") as f:
            metadata = f.metadata() or {}
            if metadata.get("format") != "pared-scores/1":
                raise UsageError("not a file of scores", where=path)
            out.comparable = metadata.get("comparable") == "True"
            for name in f.keys():  # noqa: SIM118  (safe_open is no mapping)
                out.of[key_of(name)] = f.get_tensor(name)
        return out


def named_power(power: Mapping[tuple[int, str], Tensor]) -> dict[str, Sequence[Tensor]]:
    """`Scores.power` for a journal."""
    return {f"{_POWER}{i}.{name}": [value] for (i, name), value in power.items()}


def power_of(noted: Mapping[str, Sequence[Tensor]]) -> dict[tuple[int, str], Tensor]:
    """The reverse."""
    parts = {full: full.removeprefix(_POWER).split(".", 1) for full in noted}
    return {(int(parts[full][0]), parts[full][1]): values[0] for full, values in noted.items()}


def name_of(key: tuple[int | None, str]) -> str:
    """The name of one axis's scores in a file."""
    return key[1] if key[0] is None else f"layers.{key[0]}.{key[1]}"


def key_of(name: str) -> tuple[int | None, str]:
    """The reverse."""
    parts = name.split(".")
    return (int(parts[1]), parts[2]) if parts[0] == "layers" else (None, name)


def is_power(name: str) -> bool:
    """Whether a name in a journal is one of `named_power`."""
    return name.startswith(_POWER)

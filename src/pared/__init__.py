"""pared makes large language models smaller by removing structure from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pared.criteria import criterion
    from pared.modeling import load
    from pared.plan import Plan
    from pared.run import Pruned, prune

__all__ = ["Plan", "Pruned", "criterion", "load", "prune"]
_HOME = {
    "Plan": "pared.plan",
    "Pruned": "pared.run",
    "criterion": "pared.criteria",
    "load": "pared.modeling",
    "prune": "pared.run",
}


def __getattr__(name: str) -> Any:
    # Importing torch and transformers takes seconds; `pared --help` needs neither.
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pared' has no attribute {name!r}")

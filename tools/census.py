"""Take the census of all model types and write what is proved to tests/contract/census.json.

    python tools/census.py [TYPE ...]

Minutes on one core. Named types are taken anew, the others stay as they are.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from pared.census import examine, model_types

FILE = Path(__file__).parents[1] / "tests" / "contract" / "census.json"


def main() -> None:
    torch.set_num_threads(1)
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    for model_type in sys.argv[1:] or model_types():
        started = time.process_time()
        entry = examine(model_type)
        axes = {a: "stock" if p.stock else "form" for a, p in entry.proofs.items() if p.holds}
        not_proved = {a: p.reason for a, p in entry.proofs.items() if not p.holds}
        found[model_type] = {"outside": entry.outside, "failed": entry.failed, "proved": axes, "not_proved": not_proved}
        print(f"{model_type}: {time.process_time() - started:.1f} s, {entry.outside or entry.failed or axes}", file=sys.stderr)
    FILE.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()

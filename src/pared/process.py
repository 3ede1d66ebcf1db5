"""What the system says of this process."""

from __future__ import annotations

import re
from pathlib import Path


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory now; field VmHWM: at most so far. 0 where the system does not say."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0

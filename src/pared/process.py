"""This process: its memory, whether what is freed goes back to the system, and a clock that waits for the device."""

from __future__ import annotations

import contextlib
import ctypes
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory now; field VmHWM: at most so far. 0 where the system does not say."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def keep_freed_memory() -> None:
    """Have the allocator keep and reuse what is freed, until `return_freed_memory`: fetching it anew costs a fifth of the time.

    Only glibc's allocator is asked; by default it learns its thresholds from what it sees.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most that it takes
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def keep_no_freed_memory() -> None:
    """Have large pieces of freed memory go back to the system at once: slower, and what a bound on memory counts on."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 4 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 20)  # M_TRIM_THRESHOLD


def return_freed_memory() -> None:
    """Give freed memory back to the system.

    Without it a process that loads and frees one layer after another grows by a third of the weights.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def with_index(device: torch.device | str) -> torch.device:
    """The device itself: "cuda" alone means another one in each thread, and in each of several processes."""
    import torch

    device = torch.device(device)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def device_bytes(device: torch.device | str, *, most: bool = False) -> int:
    """What torch's allocator has given out on a device now, or at most so far; 0 on a CPU."""
    import torch

    if torch.device(device).type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device) if most else torch.cuda.memory_allocated(device)


def now(device: torch.device) -> float:
    """Seconds on a clock, read when what was given to the device is done."""
    if device.type == "cuda":
        import torch  # the command line reads this file before it is known whether torch is wanted

        torch.cuda.synchronize(device)
    return time.perf_counter()

"""Running the command line inside the test process: what a shell would see of it."""

from __future__ import annotations

import contextlib
import io
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from pared.cli import main


@dataclass(frozen=True)
class Done:
    """Exit code and the two streams of one call."""

    code: int
    out: str
    err: str


def pared(*arguments: object) -> Done:
    """`pared ARGUMENTS`, through the same entry point as the console script."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            main([str(a) for a in arguments])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert isinstance(ended.value.code, int)
    return Done(ended.value.code, out.getvalue(), err.getvalue())


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, and every folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def refused(tmp_path: Path, code: int, *arguments: object, words: tuple[str, ...] = ()) -> Done:
    """The command ends with the code and says why in at most three lines; all files are as they were."""
    before = tree(tmp_path)
    done = pared(*arguments)
    assert done.code == code, done.err
    assert tree(tmp_path) == before
    assert done.out == ""
    lines = done.err.splitlines()
    assert 1 <= len(lines) <= 3 and "Traceback" not in done.err
    assert not lines[0].startswith(" ") and all(line.startswith(("  where: ", "  fix:   ")) for line in lines[1:])
    for word in words:
        assert word in done.err, f"{word!r} is not in: {done.err}"
    return done

"""Errors that a user can act on: what went wrong, where, and what to do about it."""

from __future__ import annotations


class ParedError(Exception):
    """Base of all errors that pared raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """At most three lines: what, where, fix."""
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where: {self.where}")
        if self.fix is not None:
            lines.append(f"  fix:   {self.fix}")
        return lines


class UsageError(ParedError):
    """A flag, a recipe or an argument that can not be met."""

    exit_code = 2


class ModelError(ParedError):
    """A model or a checkpoint that is broken, unsafe or not supported."""

    exit_code = 3


class MissingError(ParedError):
    """A dependency is not installed, or something has to be fetched and there is no network."""

    exit_code = 4


class ResourceError(ParedError):
    """Not enough memory or disk."""

    exit_code = 5


class GateError(ParedError):
    """A quality gate that the user asked for was not passed."""

    exit_code = 6


class Interrupted(ParedError):
    """A run was told to stop, and has: the same call goes on where it was."""

    def __init__(self, number: int) -> None:
        super().__init__("stopped; nothing that was done is lost", fix="the same command goes on from here")
        self.exit_code = 128 + number

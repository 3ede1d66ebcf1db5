"""The command line: which commands there are, and what becomes of an error. The commands are in `pared.commands`.

People are told on stderr, data goes to stdout. Exit codes: 0 ok, 1 bug, 2 usage or recipe, 3 bad model or checkpoint,
4 missing dependency or offline, 5 resources, 6 a quality gate failed, 130 and 143 signals.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import shlex
import signal
import sys
import threading
import traceback
import warnings
from types import FrameType
from typing import Annotated, NoReturn

import typer

from pared.commands import checking, demo, exporting, importing, pruning, recovering, running
from pared.errors import Interrupted, ParedError, ResourceError

app = typer.Typer(name="pared", no_args_is_help=False, add_completion=False, pretty_exceptions_enable=False)
app.command("inspect")(checking.inspect)
app.command("prune")(pruning.prune)
app.command("plan")(pruning.plan)
app.command("apply")(pruning.apply)
app.command("recover")(recovering.recover)
app.command("run")(running.run)
app.command("eval")(checking.evaluate)
app.command("verify")(checking.verify)
app.command("ls")(checking.ls)
app.command("import")(importing.import_)
app.command("export")(exporting.export)
app.command("demo")(demo.demo)

# typer brings its own copy of click since 0.2x and used the real one before; both are reached through what it exports.
_Usage = typer.BadParameter.__mro__[1]
# What a file system says no with, whoever asked.
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENAMETOOLONG, errno.EMFILE}
_BUG, _INTERRUPTED, _TERMINATED, _CLOSED_PIPE = 1, 130, 143, 141


@app.callback(invoke_without_command=True)
def pared(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Make large language models smaller by removing structure: KV groups, heads, FFN channels, hidden channels, layers."""
    if version:
        from importlib.metadata import version as installed

        sys.stdout.write(f"pared {installed('pared')}\n")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def main(arguments: list[str] | None = None) -> NoReturn:
    """The program. Exits with the codes that the module names."""
    _quiet()
    _share_cores()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, Interrupted):
            error.fix = f"go on with: pared {shlex.join(arguments)}"
        code = report(error)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    # Not through typer's own entry, which answers interrupts, broken pipes and errors in its way.
    command = typer.main.get_command(app)
    try:
        with command.make_context("pared", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as ended:
        return ended.exit_code
    return 0


def report(error: BaseException) -> int:
    """Say on stderr what an error was, in at most three lines unless it is a bug. Returns the exit code."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        _say("interrupted")
        return _INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # Python flushes stdout on its way out, and would complain about the pipe once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "not enough memory" in str(error):
        fix = "use a smaller --batch, --samples or --seq-len, or a machine with more memory"
        error = ResourceError(f"out of memory: {str(error) or type(error).__name__}", fix=fix)
    if isinstance(error, OSError) and error.errno in _NOT_OURS:
        error = ResourceError(str(error.strerror), where=error.filename, fix="see to it, or work in another place")
    if isinstance(error, ParedError):
        _say(*error.lines())
        return error.exit_code
    if isinstance(error, _Usage):
        return _usage(error)
    traceback.print_exception(error)
    _say(f"this is a bug in pared: {type(error).__name__}: {error}")
    return _BUG


def _usage(error: BaseException) -> int:
    """A command line that can not be parsed, in the words of every other error."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "pared"
    what: str = error.format_message().replace("Value error, ", "")  # type: ignore[attr-defined]
    what = re.split(r" Did you mean| \(Possible options", what)[0].rstrip(".")
    possible = getattr(error, "possibilities", None) or []
    if unknown := re.fullmatch("No such command '(.*)'", what):
        possible = difflib.get_close_matches(unknown[1], [c.name or "" for c in app.registered_commands], 1)
    fix = f"did you mean {possible[0]}? " if possible else ""
    _say(what[:1].lower() + what[1:], f"  where: {command}", f"  fix:   {fix}{command} --help lists what it takes")
    return 2


def _say(*lines: str) -> None:
    # Messages of other libraries may have lines of their own.
    sys.stderr.writelines(" ".join(line.splitlines()) + "\n" for line in lines)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    # An exception rather than an end, so that what was begun is cleaned up.
    raise SystemExit(_TERMINATED)


def _share_cores() -> None:
    """Let torch's threads (libgomp's) wait asleep after a short spin, before it is imported.

    On a machine of its own that changes nothing; beside another busy process threads that spin keep each other from the cores,
    and a run with two of them took ten times as long as with one.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def _quiet() -> None:
    """Keep the chatter of the libraries away: what matters to a user is an error or in a report."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")

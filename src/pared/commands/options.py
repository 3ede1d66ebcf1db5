"""Command line options: those that every command shares, and one for each field of a recipe, made from the field."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pared.errors import UsageError
from pared.recipe import Recipe, load_recipe


class Format(StrEnum):
    """What goes to stdout: the result for a reader, or one JSON object for a program."""

    text = "text"
    json = "json"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="a model directory, or a hub id", show_default=False)]
AsFormat = Annotated[Format, typer.Option("--format", help="json: one object on stdout")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there")]
RecipeName = Annotated[str | None, typer.Option("--recipe", metavar="NAME|FILE", help="settings from YAML; pared ls recipes")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="one setting, over the recipe and under the flags")
]

Restart = Annotated[bool, typer.Option("--restart", help="begin anew where a stopped run lies in OUT.partial")]
MaxMemory = Annotated[
    str | None, typer.Option("--max-memory", metavar="SIZE", help="keep resident memory under this: 4GiB", show_default=False)
]
MaxGpuMemory = Annotated[
    str | None,
    typer.Option("--max-gpu-memory", metavar="SIZE", help="keep memory on the device under this", show_default=False),
]
HardwareOf = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        metavar="FLOPS,FP64,READ,WRITE",
        help="what --dry-run counts hours on, by the second; by default this machine",
        show_default=False,
    ),
]
Spill = Annotated[
    Path | None,
    typer.Option(
        "--spill", metavar="DIR", help="for hidden states beyond the bound; by default beside OUT", show_default=False
    ),
]


def settings_options(record: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each field of a record; it gets those that were passed as the dict `settings`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        hints = get_type_hints(command, include_extras=True)
        own = [p.replace(annotation=hints[n]) for n, p in signature.parameters.items() if n != "settings"]
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        options = [_option(name, info) for name, info in record.model_fields.items()]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            settings = {n: v for n in record.model_fields if (v := given.pop(n)) is not None}
            command(**given, settings=settings)

        run.__signature__ = signature.replace(parameters=[*own, *options], return_annotation=None)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*own, *options]} | {"return": None}
        return run

    return decorate


recipe_options = settings_options(Recipe)


def _option(name: str, info: FieldInfo) -> inspect.Parameter:
    """The option of one field. Its text is parsed and judged by the recipe, as the same setting in a file is."""
    flag = f"--{name.replace('_', '-')}"
    default = "" if info.default is None else f" [default: {info.default}]"
    text = ((info.description or "") + default.replace("[", r"\[")).strip()
    panel = "Settings (what a recipe holds)"
    if bool in _members(info.annotation):
        annotation: Any = Annotated[
            bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=text, rich_help_panel=panel, show_default=False)
        ]
    else:
        annotation = Annotated[
            str | None, typer.Option(flag, help=text, metavar=_metavar(info.annotation), rich_help_panel=panel)
        ]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _members(annotation: Any) -> list[Any]:
    """The types that a union is made of, None left out."""
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return [a for a in options if a is not type(None)]


def _metavar(annotation: Any) -> str:
    kind = _members(annotation)[0]
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return _metavar(get_args(kind)[0]).replace("|", ",")
    return {int: "N", float: "X"}.get(kind, "TEXT")


def base_settings(recipe: str | None, assignments: list[str] | None) -> dict[str, Any]:
    """What the flags go over: the recipe's settings, and over them those of --set."""
    base: dict[str, Any] = {}
    if recipe is not None:
        try:
            base = load_recipe(recipe)
        except UnicodeDecodeError as error:
            raise UsageError("the recipe is not UTF-8 text", where=recipe, fix="convert the file to UTF-8") from error
        except UsageError as error:
            # A setting in a file is judged like a flag; what is wrong is then in the file.
            where = recipe if error.where is None or str(error.where).startswith("--") else error.where
            what = f"{str(error.where)[2:]}: {error.what}" if str(error.where).startswith("--") else error.what
            raise UsageError(what, where=where, fix=error.fix) from error
    return base | dict(map(_assignment, assignments or []))


def _assignment(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"{text!r} sets nothing", where="--set", fix="write --set key=value")
    try:
        return key.strip().replace("-", "_"), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"{value!r} is not a value", where=f"--set {key}", fix="write it as in a YAML file") from error


def check_device(device: object) -> None:
    """UsageError where there is no such device here."""
    if device in (None, "cpu"):
        return
    import torch

    try:
        torch.empty(1, device=str(device)).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        what = f"nothing can be computed on {device!r}: {str(error).splitlines()[0]}"
        raise UsageError(what, where="--device", fix="--device cpu always works") from error


def check_outside(out: Path, model: str) -> None:
    """UsageError where a file would be written into the model's own directory, which is never touched."""
    source = Path(model).expanduser()
    if source.is_dir() and out.expanduser().resolve().is_relative_to(source.resolve()):
        raise UsageError("the output lies in the source, which is never written to", where=out, fix="choose another -o")

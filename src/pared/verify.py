"""What is wrong with a checkpoint: hashes, structure, values, and the config against the tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pared.checkpoint import Checkpoint
from pared.durable import MANIFEST, MANIFEST_FORMAT
from pared.errors import ModelError
from pared.modeling import OBSOLETE, expected_tensors
from pared.tensorfile import sha256

# Files that a loader acts on: one that appears beside a finished checkpoint changes what is loaded.
_LOADED = (".safetensors", ".json", ".bin", ".py", ".jinja")
_TIED = {"lm_head.weight", "embed_out.weight"}


@dataclass(frozen=True)
class Problem:
    """Something wrong: `where` is the file, `what` names the tensor too."""

    where: str
    what: str


def verify(path: str | Path) -> list[Problem]:
    """Everything that is wrong with a checkpoint, empty if nothing is. Reads every byte.

    A checkpoint that pared did not write has no manifest.json; its hashes are then not checked.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ModelError("there is no such directory", where=root, fix="check the path")
    problems = check_manifest(root)
    try:
        checkpoint = Checkpoint.open(root)
    except ModelError as error:
        return [*problems, Problem(_where(root, error.where), error.what)]
    problems += [Problem(info.file, f"{info.name} holds {kind}") for info, kind in checkpoint.non_finite()]
    return problems + check_config(checkpoint)


def check_manifest(root: Path) -> list[Problem]:
    """Files whose bytes are not those that were written."""
    if not (root / MANIFEST).is_file():
        written = (root / "plan.json").exists()
        return [Problem(MANIFEST, "missing, though plan.json says that pared wrote this")] if written else []
    try:
        manifest = json.loads((root / MANIFEST).read_bytes())
        files: dict[str, tuple[str, int]] = {k: (v["sha256"], v["bytes"]) for k, v in manifest["files"].items()}
        if manifest["format"] != MANIFEST_FORMAT:
            return [Problem(MANIFEST, f"has format {manifest['format']!r}, not {MANIFEST_FORMAT!r}")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [Problem(MANIFEST, f"malformed: {error!r}")]
    problems = []
    for name, (digest, size) in sorted(files.items()):
        file, pure = root / name, PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or not file.resolve().is_relative_to(root.resolve()):
            problems.append(Problem(MANIFEST, f"names a file outside the directory: {name!r}"))
        elif not file.is_file():
            problems.append(Problem(name, "missing"))
        elif file.stat().st_size != size:
            problems.append(Problem(name, f"{file.stat().st_size} bytes, {size} were written"))
        elif sha256(file) != digest:
            problems.append(Problem(name, "its bytes changed since it was written (sha256 differs)"))
    extra = (p.name for p in root.iterdir() if p.suffix in _LOADED and p.name not in files and p.name != MANIFEST)
    return problems + [Problem(name, "was not there when the checkpoint was written") for name in sorted(extra)]


def check_config(checkpoint: Checkpoint) -> list[Problem]:
    """Tensors that the model that config.json describes lacks, does not know, or has in another shape."""
    try:
        expected = expected_tensors(checkpoint.config)
    except ModelError as error:
        return [Problem(_where(checkpoint.path, error.where or "config.json"), error.what)]
    return compare(checkpoint, expected)


def compare(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> list[Problem]:
    """Differences between the tensors of a checkpoint and those expected, by name on disk."""
    # Checkpoints of a bare backbone leave its prefix out, and transformers adds it when loading.
    prefixes = ["", *sorted({name.split(".")[0] + "." for name in expected})]
    found = {next((p + n for p in prefixes if p + n in expected), n): info for n, info in checkpoint.tensors.items()}
    problems = []
    for name, shape in expected.items():
        if name not in found:
            problems.append(Problem("config.json", f"{name} is missing: the config says a tensor of shape {list(shape)}"))
        elif found[name].shape != shape:
            got = list(found[name].shape)
            problems.append(Problem(found[name].file, f"{name} is misshapen: {got} where the config says {list(shape)}"))
    for name, info in found.items():
        # A tied output head is left out of what is expected, and is welcome in its own place.
        tied = name in _TIED and info.shape in expected.values()
        if name not in expected and not tied and not OBSOLETE.search(name):
            problems.append(Problem(info.file, f"{name} is unexpected: the config has no such tensor"))
    return problems


def _where(root: Path, where: object) -> str:
    """Relative to the checkpoint, where it lies in it."""
    path = Path(str(where))
    return str(path.relative_to(root)) if path.is_relative_to(root) and path != root else str(where)

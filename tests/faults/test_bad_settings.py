"""Settings that do not exist or do not fit: each is named, with its file where it is in one, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from command import refused

PLAIN = ("--criterion", "l1", "--compensate", "none")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of a tiny llama, without a tokenizer."""
    return tiny.save(tiny.model("llama"), tmp_path / "model")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--criterion", "tailor"), ("tailor", "did you mean 'taylor'")),
        (("--structures", "kvs"), ("kvs", "'kv'")),
        (("--structures", "kv,"), ("--structures",)),
        (("--of", "parameters"), ("--of", "block-params")),
        (("--shape", "square"), ("--shape", "per-layer")),
        (("--reduction", "median"), ("--reduction", "mean")),
        (("--dtype", "int4"), ("--dtype", "float32")),
        (("--align", "0"), ("--align",)),
        (("--seed", "one"), ("--seed",)),
        (("--remov", "0.2"), ("--remov", "did you mean --remove")),
        (("--set", "remov=0.2"), ("remov", "did you mean 'remove'")),
        (("--set", "remove"), ("key=value",)),
        (("--set", "remove=[0.1, 0.2]"), ("remove",)),
        (("--set", "remove={"), ("remove",)),
        (("--recipe", "llm-prune"), ("llm-prune", "did you mean 'llm-pruner'")),
        (("--format", "xml"), ("--format", "json")),
        (("surplus",), ("surplus",)),
        (("--allocate", "global"), ("per-layer",)),
    ],
)
def test_a_setting_that_does_not_exist_or_fit_is_named(
    tmp_path: Path, model: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(tmp_path, 2, "prune", model, "-o", tmp_path / "out", *PLAIN, *flags, words=words)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("removed: 0.2", "did you mean 'remove'"),
        ("remove: lots", "remove"),
        ("- remove", "no settings"),
        ("remove: [", "YAML"),
        ("", "no settings"),
    ],
)
def test_a_recipe_that_is_wrong_is_named_with_its_file(tmp_path: Path, model: Path, content: str, word: str) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(content)
    refused(tmp_path, 2, "prune", model, "-o", tmp_path / "out", "--recipe", recipe, words=("mine.yaml", word))


def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe")
    refused(tmp_path, 2, "prune", model, "-o", tmp_path / "out", "--recipe", tmp_path / "mine.yaml", words=("mine.yaml",))


@pytest.mark.parametrize("command", ["prune", "plan", "eval"])
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, model: Path, command: str) -> None:
    where = () if command == "eval" else ("-o", tmp_path / "out", *PLAIN)
    refused(tmp_path, 2, command, model, *where, "--device", "abacus", words=("abacus", "--device"))

"""What can be wrong with a text, a tokenizer or an amount when tokens are pruned: three lines, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
import vocabs
from command import pared, refused

VOCAB = ("--structures", "vocab")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model with a byte-level tokenizer."""
    vocabs.save(tmp_path / "model", "byte-level")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return vocabs.text(tmp_path / "text.jsonl")


def test_the_command_prunes_and_says_how_much(tmp_path: Path, model: Path, text: Path) -> None:
    done = pared("prune", model, "-o", tmp_path / "out", *VOCAB, "--keep-tokens-from", text)
    assert done.code == 0, done.err
    assert done.out == f"{tmp_path / 'out'}\n" and "of params" in done.err and "vocabulary:" in done.err
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["of"] == "params" and plan["requested"] is None and plan["vocab"]
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "keep_tokens_from" in recipe and "remove: null" in recipe
    again = pared("prune", model, "-o", tmp_path / "again", "--recipe", tmp_path / "out" / "recipe.yaml")
    assert again.code == 0, again.err
    for name in ("model.safetensors", "tokenizer.json", "plan.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": "  "}\n', None])
def test_a_text_that_is_empty_or_not_there_is_refused(tmp_path: Path, model: Path, content: str | None) -> None:
    path = tmp_path / "none.jsonl"
    if content is not None:
        path.write_text(content)
    words = ("none.jsonl",)
    refused(tmp_path, 2, "prune", model, "-o", tmp_path / "out", *VOCAB, "--keep-tokens-from", path, words=words)


def test_lines_that_are_not_text_are_refused_by_their_number(tmp_path: Path, model: Path, text: Path) -> None:
    text.write_text(text.read_text() + '{"body": "x"}\n')
    line = f"line {len(vocabs.KEPT) + 1}"
    refused(tmp_path, 2, "prune", model, "-o", tmp_path / "out", *VOCAB, "--keep-tokens-from", text, words=(line,))


def test_text_and_structure_come_together(tmp_path: Path, model: Path, text: Path) -> None:
    start = ("prune", model, "-o", tmp_path / "out")
    refused(tmp_path, 2, *start, *VOCAB, words=("--keep-tokens-from FILE",))
    refused(tmp_path, 2, *start, "--keep-tokens-from", text, words=("--structures vocab",))
    refused(tmp_path, 2, *start, "--structures", "ffn", "--keep-tokens-from", text, words=("--structures vocab",))
    steps = ("--structures", "vocab,ffn", "--keep-tokens-from", text, "--iterative-steps", "2")
    refused(tmp_path, 2, *start, *steps, words=("--iterative-steps",))


def test_an_amount_out_of_reach_is_refused_with_what_is_in_reach(tmp_path: Path, model: Path, text: Path) -> None:
    start = ("prune", model, "-o", tmp_path / "out", *VOCAB, "--keep-tokens-from", text)
    refused(tmp_path, 2, *start, "--remove", "0.9", words=("vocab can give between 0% and", "--remove"))
    refused(tmp_path, 2, *start, "--remove", "0.1", "--of", "block-params", words=("between 0% and 0.0%",))
    refused(tmp_path, 2, *start, "--remove", "1.5", words=("--remove",))
    refused(tmp_path, 2, *start, "--min-count", "0", words=("--min-count",))


def test_a_text_that_needs_everything_is_refused(tmp_path: Path, model: Path) -> None:
    text = vocabs.text(tmp_path / "all.jsonl", vocabs.corpus())
    words = ("tokens are needed", "--keep-tokens-from")
    done = ("prune", model, "-o", tmp_path / "out", *VOCAB, "--keep-tokens-from", text, "--align", "512")
    refused(tmp_path, 2, *done, words=words)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, text: Path) -> None:
    bare = tiny.save(tiny.model("llama"), tmp_path / "bare")
    start = ("prune", bare, "-o", tmp_path / "out", *VOCAB, "--keep-tokens-from", text)
    refused(tmp_path, 3, *start, words=("tokenizer",))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}}'])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, model: Path, text: Path, content: str) -> None:
    (model / "tokenizer.json").write_text(content)
    refused(tmp_path, 3, "prune", model, "-o", tmp_path / "out", *VOCAB, "--keep-tokens-from", text, words=("tokenizer",))


def test_a_token_beyond_the_rows_of_the_model_is_refused(tmp_path: Path, text: Path) -> None:
    words = vocabs.tokenizer("byte-level")
    source = tiny.save(tiny.model("llama", vocab_size=len(words) - 8), tmp_path / "short")
    words.save_pretrained(source)
    last = words.decode([len(words) - 1])
    text = vocabs.text(tmp_path / "kept.jsonl", [last, *vocabs.KEPT])
    start = ("prune", source, "-o", tmp_path / "out", *VOCAB, "--keep-tokens-from", text)
    refused(tmp_path, 3, *start, words=(f"the model only {len(words) - 8} rows",))


def test_a_config_that_names_a_lost_token_of_a_plan_is_refused(tmp_path: Path, model: Path, text: Path) -> None:
    assert pared("plan", model, "-o", tmp_path / "plan.json", *VOCAB, "--keep-tokens-from", text).code == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    config = json.loads((model / "config.json").read_text())
    gone = next(i for i in range(config["vocab_size"]) if i not in _ids(plan["vocab"]))
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": gone}))
    refused(tmp_path, 2, "apply", model, tmp_path / "plan.json", "-o", tmp_path / "out", words=("eos_token_id",))


def test_a_divergence_between_vocabularies_that_nothing_relates_is_refused(tmp_path: Path, model: Path, text: Path) -> None:
    vocabs.save(tmp_path / "other", "unigram")
    start = ("eval", tmp_path / "other", "--against", model, "--text", text, "--no-speed")
    refused(tmp_path, 3, *start, words=("is not known", "bits per byte"))


def _ids(ranges: str) -> set[int]:
    from pared.plan import from_ranges

    return set(from_ranges(ranges).tolist())

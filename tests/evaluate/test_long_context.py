"""Long context: positions are accounted for one by one, needles lie where they should, and a model that can look up is seen to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from command import pared, refused
from pared.errors import UsageError
from pared.evaluate.long_context import Wording, by_position, cache_bytes, edges, found, make_needles, words_of
from pared.evaluate.perplexity import Windows, logits_of, measure
from pared.modeling import load
from tiny import model, save, tokens


def finder(vocab: int, question: int) -> object:
    """A model that looks up: after the question it says what followed its key the first time."""

    def logits(ids: Tensor) -> Tensor:
        out = torch.zeros(*ids.shape, vocab)
        for r, row in enumerate(ids.tolist()):
            tail = row[-question:]
            at = next(i for i in range(len(row)) if row[i : i + question] == tail)
            out[r, -1, row[at + question]] = 9.0
        return out

    return logits


def test_buckets_reach_from_the_start_past_the_trained_length() -> None:
    assert edges(2048, 4096) == [256, 512, 1024, 2048, 3072, 4096]
    assert edges(2048, 2048) == [256, 512, 1024, 2048]
    assert edges(64, 40) == [8, 16, 32, 40]


def test_the_mean_over_buckets_is_the_mean_over_windows() -> None:
    one, other, ids = logits_of(model("llama")), logits_of(model("llama", seed=1)), tokens(3, 32)
    parts = by_position(one, ids, [8, 16, 32], against=other)
    whole = measure(one, Windows(ids, torch.ones(3, dtype=torch.int64), None, 1, ids.numel()), against=other)
    count = sum(b.tokens for b in parts)
    assert count == whole.tokens and [b.tokens for b in parts] == [21, 24, 48]
    assert sum(b.nll * b.tokens for b in parts) / count == pytest.approx(whole.nll, rel=1e-6)
    assert sum((b.kl or 0) * b.tokens for b in parts) / count == pytest.approx(whole.kl, rel=1e-5)


def test_a_bucket_sees_its_positions_alone() -> None:
    ids = tokens(2, 24)
    plain = logits_of(model("llama"))

    def spoiled(rows: Tensor) -> Tensor:
        out = plain(rows).clone()
        out[:, 15:] += torch.randn(out[:, 15:].shape, generator=torch.Generator().manual_seed(0))
        return out

    before, after = by_position(plain, ids, [8, 16, 24]), by_position(spoiled, ids, [8, 16, 24], against=plain)
    assert [a.nll == b.nll for a, b in zip(before, after, strict=True)] == [True, True, False]
    assert after[0].kl == after[1].kl == 0 and (after[2].kl or 0) > 0.1


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_needle_lies_at_its_depth_and_the_question_at_the_end(storyteller: Path, depth: float) -> None:
    tokenizer = AutoTokenizer.from_pretrained(storyteller)
    filler = torch.full((4000,), tokenizer(" the", add_special_tokens=False)["input_ids"][0])
    needles = make_needles(tokenizer, filler, 256, depth, count=8, others=2)
    assert needles.ids.shape == (8, 256)
    for row, value in zip(needles.ids.tolist(), needles.values.tolist(), strict=True):
        text = tokenizer.decode(row)
        key = text.rsplit("The key of ", 1)[1].removesuffix(" is")
        said = f"The key of {key} is{tokenizer.decode([value])}."
        assert text.count(said) == 1 and text.count("The key of") == 4
        place = len(tokenizer(text[: text.index(said)])["input_ids"]) / len(row)
        assert abs(place - depth) < 0.25


def test_a_model_that_looks_up_finds_all_and_a_random_one_nothing(storyteller: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(storyteller)
    wording = Wording(told="\n#{key}{value}\n", asked="\n#{key}")
    needles = make_needles(tokenizer, tokens(1, 4000)[0], 200, 0.5, count=12, wording=wording)
    question = len(tokenizer(wording.asked.format(key=" little"), add_special_tokens=False)["input_ids"])
    assert found(finder(1024, question), needles) == 12  # type: ignore[arg-type]
    assert found(logits_of(load(storyteller, dtype=torch.float32)), needles) < 12


def test_words_are_one_token_each_with_their_space(storyteller: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(storyteller)
    for word in words_of(tokenizer)[:50]:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1


def test_a_tokenizer_without_words_is_told_so(stories260k: Path) -> None:
    with pytest.raises(UsageError, match="words of one token"):
        words_of(AutoTokenizer.from_pretrained(stories260k))


def test_the_cache_is_as_large_as_is_counted() -> None:
    built = model("llama")  # 3 layers, 4 KV heads of 4, keys and values, fp32
    assert cache_bytes(built, 40) == 40 * 3 * 2 * 4 * 4 * 4


def test_the_command_writes_a_record(storyteller: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little dog who liked to play in the sun. " * 400)
    flags = ["--long-context", "--text", text, "--seq-len", 192, "--max-windows", 1, "--against", storyteller]
    done = pared("eval", storyteller, *flags, "--format", "json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["trained"] == 512 and record["longest"] == 192
    assert record["positions"] == [{**b, "kl": 0.0} for b in record["against"]["positions"]]
    assert {r["length"] for r in record["retrieval"]} == {128, 192}
    assert record["cache"]["bytes_per_token"] == record["cache"]["measured_bytes_per_token"]


def test_text_has_to_be_given(tmp_path: Path) -> None:
    folder = save(model("llama"), tmp_path / "model")
    refused(tmp_path, 2, "eval", folder, "--long-context", words=("--text FILE",))

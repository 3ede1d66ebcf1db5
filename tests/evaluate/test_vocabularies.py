"""Evaluation across vocabularies: the same tokens for both models, and bits per byte that any tokenizer can be compared by."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import tiny
import vocabs
from pared import load
from pared.errors import ModelError
from pared.evaluate.report import evaluate
from pared.plan import Plan, from_ranges
from pared.run import prune


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Dense, pruned in its vocabulary alone, and the text of which all tokens were kept."""
    folder = tmp_path_factory.mktemp("vocab")
    vocabs.save(folder / "dense", "byte-level")
    text = vocabs.text(folder / "kept.jsonl")
    prune(folder / "dense", out=folder / "out", structures=("vocab",), keep_tokens_from=text)
    return folder / "dense", folder / "out", text


def test_the_same_model_over_fewer_tokens_is_no_distance_away(made: tuple[Path, Path, Path]) -> None:
    dense, out, text = made
    found = evaluate(out, against=dense, text=text, seq_len=16, speed=False)
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["top1_agreement"] == 1
    assert found["perplexity"] == pytest.approx(found["against"]["perplexity"], rel=1e-5)
    assert "restricted" in found["protocol"] and "renormalised" in found["protocol"]
    # Its own bits per byte are those of the dense model alone; over fewer tokens there is less to be wrong about.
    alone = evaluate(dense, text=text, seq_len=16, speed=False)
    assert found["against"]["bits_per_byte"] == pytest.approx(alone["bits_per_byte"])
    assert found["bits_per_byte"] < alone["bits_per_byte"]


@torch.no_grad()
def test_the_divergence_is_that_of_the_restricted_distribution(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    dense, _, text = made
    both = tmp_path / "both"
    options = {"compensate": "none", "criterion": "l1", "remove": 0.3, "of": "block-params"}
    prune(dense, out=both, structures=("vocab", "ffn"), keep_tokens_from=text, **options)
    kept = from_ranges(Plan.load(both / "plan.json").vocab or "")
    ids = torch.tensor([i for d in vocabs.KEPT for i in AutoTokenizer.from_pretrained(both)(d)["input_ids"]])
    rows = ids[: len(ids) // 16 * 16].view(-1, 16)
    p = load(dense)(input_ids=kept[rows]).logits[:, :-1, kept].double().log_softmax(-1)
    q = load(both)(input_ids=rows).logits[:, :-1].double().log_softmax(-1)
    want = float((p.exp() * (p - q)).sum(-1).mean())
    nll = -float(q.gather(-1, rows[:, 1:, None]).mean())
    found = evaluate(both, against=dense, text=text, seq_len=16, speed=False)
    assert found["kl"] == pytest.approx(want, rel=1e-3) and want > 1e-3
    size = sum(len(d.encode()) for d in vocabs.KEPT)
    assert found["nll"] == pytest.approx(nll, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) * len(ids) / size, rel=1e-5)


def test_text_that_the_dense_model_writes_is_read_by_the_pruned_tokenizer(made: tuple[Path, Path, Path]) -> None:
    dense, out, _ = made
    found = evaluate(out, against=dense, seq_len=16, max_windows=3, speed=False)
    assert "Read again as text" in found["protocol"] and found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["tokens"] >= 3 * 15 and found["bits_per_byte"] > 0


def test_bits_per_byte_do_not_depend_on_the_tokenizer(tmp_path: Path) -> None:
    """A model that gives every token the same chance: its bits are the tokens' number times the log of the vocabulary."""
    text = vocabs.text(tmp_path / "text.jsonl", vocabs.KEPT * 4)
    size = sum(len(d.encode()) for d in vocabs.KEPT * 4)
    for kind in ("byte-level", "unigram"):
        model = vocabs.save(tmp_path / kind, kind)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        tiny.save(model, tmp_path / kind)
        words = AutoTokenizer.from_pretrained(tmp_path / kind)
        tokens = sum(len(words(d)["input_ids"]) for d in vocabs.KEPT * 4)
        found = evaluate(tmp_path / kind, text=text, seq_len=16, speed=False)
        assert found["bits_per_byte"] == pytest.approx(tokens * math.log2(len(words)) / size, rel=1e-5)


def test_a_plan_for_another_model_relates_nothing(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, out, text = made
    vocabs.save(tmp_path / "wider", "byte-level", intermediate_size=64)
    with pytest.raises(ModelError, match="is not known"):
        evaluate(out, against=tmp_path / "wider", text=text, seq_len=16, speed=False)

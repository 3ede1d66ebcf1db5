"""One evaluation as a record: its numbers are those of the model and of the files, whatever the batch and the order."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import tiny
from pared import load, process
from pared.checkpoint import Checkpoint
from pared.errors import ModelError, UsageError
from pared.evaluate import logits_of, measure, windows
from pared.evaluate.report import SELF_WINDOWS, Subject, _forget_peak, evaluate
from pared.evaluate.speed import peak_memory_bytes
from pared.run import prune

TEXT = "Once upon a time there was a little cat. It sat on a mat and looked at the rain. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 12)
    return path


@pytest.fixture(scope="module")
def smaller(storyteller: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "uniform"
    prune(storyteller, out=out, remove=0.2, criterion="l1", compensate="none")
    return out


@pytest.fixture(scope="module")
def uneven(storyteller: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "per-layer"
    prune(storyteller, out=out, remove=0.2, criterion="l1", compensate="none", shape="per-layer")
    return out


def test_a_model_is_no_distance_from_itself(storyteller: Path, text: Path) -> None:
    found = evaluate(storyteller, against=storyteller, text=text, seq_len=32, speed=False)
    assert found["kl"] == 0 and found["top1_agreement"] == 1
    assert found["perplexity"] == found["against"]["perplexity"]
    alone = evaluate(storyteller, text=text, seq_len=32, speed=False)
    assert alone["kl"] is None and alone["top1_agreement"] is None and "against" not in alone
    assert alone["perplexity"] == pytest.approx(found["perplexity"], rel=1e-6)


@pytest.mark.parametrize("stride", [None, 8])
def test_the_quality_is_that_of_all_windows_whatever_the_batch(
    storyteller: Path, smaller: Path, text: Path, stride: int | None
) -> None:
    cut = windows(text, Subject.open(storyteller).tokenizer(), 32, stride)
    whole = measure(logits_of(load(smaller).float()), cut, against=logits_of(load(storyteller).float()), batch=64)
    for batch in (1, 5, 64):
        found = evaluate(smaller, against=storyteller, text=text, seq_len=32, stride=stride, batch=batch, speed=False)
        assert found["tokens"] == whole.tokens
        assert found["perplexity"] == pytest.approx(whole.perplexity, rel=1e-5)
        assert found["kl"] == pytest.approx(whole.kl, rel=1e-4)
        assert found["top1_agreement"] == pytest.approx(whole.top1_agreement, abs=2 / whole.tokens)


def test_the_dense_model_gets_the_numbers_it_has_alone(storyteller: Path, smaller: Path, text: Path) -> None:
    beside = evaluate(smaller, against=storyteller, text=text, seq_len=32, speed=False)["against"]
    alone = evaluate(storyteller, text=text, seq_len=32, speed=False)
    for key, value in beside.items():
        assert alone[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)


@pytest.mark.parametrize("which", ["smaller", "uneven", "storyteller"])
def test_sizes_are_those_of_the_files(which: str, request: pytest.FixtureRequest, text: Path) -> None:
    path: Path = request.getfixturevalue(which)
    found = evaluate(path, text=text, seq_len=16, max_windows=1, speed=False)
    with Checkpoint.open(path) as checkpoint:
        assert found["bytes"] == checkpoint.nbytes
        assert found["params"] == checkpoint.num_parameters
        inside = sum(tiny.numel(t.shape) for n, t in checkpoint.tensors.items() if ".layers." in n)
        assert found["block_params"] == inside
    assert math.isfinite(found["perplexity"])


def test_the_first_windows_are_those_of_a_shorter_text(storyteller: Path, text: Path, tmp_path: Path) -> None:
    part = evaluate(storyteller, text=text, seq_len=32, max_windows=2, speed=False)
    assert (part["tokens"], part["seq_len"]) == (2 * 31, 32)
    assert "first 2 windows" in part["protocol"]
    everything = evaluate(storyteller, text=text, seq_len=32, max_windows=10_000, speed=False)
    assert everything["tokens"] == evaluate(storyteller, text=text, seq_len=32, speed=False)["tokens"]
    assert "first 10000" not in everything["protocol"]


def test_text_that_the_model_writes_is_the_dense_models_and_always_the_same(storyteller: Path, smaller: Path) -> None:
    first = evaluate(smaller, against=storyteller, seq_len=16, max_windows=4, speed=False)
    again = evaluate(smaller, against=storyteller, seq_len=16, max_windows=4, speed=False)
    assert first == again
    assert storyteller.name in first["protocol"]
    assert first["against"]["perplexity"] < first["perplexity"]
    with pytest.raises(UsageError, match="stride"):
        evaluate(smaller, against=storyteller, seq_len=16, stride=8, speed=False)
    assert SELF_WINDOWS > 1


def test_speed_and_memory_are_measured_of_both(storyteller: Path, smaller: Path, text: Path) -> None:
    found = evaluate(smaller, against=storyteller, text=text, seq_len=16, max_windows=1)
    for record in (found, found["against"]):
        assert record["prefill_tokens_per_s"] > record["decode_tokens_per_s"] > 0
        assert record["peak_memory_bytes"] > record["bytes"]
    silent = evaluate(smaller, text=text, seq_len=16, max_windows=1, speed=False)
    assert silent["decode_tokens_per_s"] is None and silent["peak_memory_bytes"] is None


def test_the_peak_of_memory_begins_anew_where_the_system_allows_it() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system has no /proc/self/clear_refs")
    process.keep_freed_memory()  # as a run without a bound has it
    held = [bytearray(16 * 2**20) for _ in range(20)]
    high = peak_memory_bytes()
    del held
    _forget_peak("cpu")
    assert peak_memory_bytes() < high - 200 * 2**20


def test_a_model_that_is_not_finite_is_not_measured(tmp_path: Path, text: Path) -> None:
    built = tiny.model("llama")
    built.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="finite"):
        evaluate(tiny.save(built, tmp_path / "model"), text="self", seq_len=8, speed=False)

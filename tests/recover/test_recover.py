"""Recovery: what a training may and may not change."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import made
import tiny
from pared.errors import MissingError, UsageError
from pared.recover import Recovered
from pared.recover import recover as run_recovery
from pared.recover.training import Judge, whole
from pared.recovery import ENOUGH_STEPS, LARGEST_BATCH, default_batch
from pared.verify import verify

FAST = {"seq_len": 32, "batch": 4, "evaluations": 2, "device": "cpu", "learning_rate": 3e-3, "held_out": 0.1}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a pruned one, a per-layer one, and text."""
    root = made.models_in(tmp_path_factory.mktemp("recover"))
    made.text(root / "text.jsonl")
    return root


def recover(home: Path, out: Path, model: str = "pruned", **settings: object) -> Recovered:
    given = {"teacher": home / "dense", "data": str(home / "text.jsonl"), "tokens": 1500, **FAST, **settings}
    return run_recovery(home / model, out=out, **given)  # type: ignore[arg-type]


def kl(one: Path, other: Path) -> float:
    p, q = (tiny.logits(made.loaded(x), tiny.tokens(8, 24, seed=9)).log_softmax(-1) for x in (other, one))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("model", ["pruned", "per-layer"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_no_steps_change_nothing(home: Path, tmp_path: Path, model: str, method: str) -> None:
    done = recover(home, tmp_path / "out", model, method=method, merge=method == "lora" or None, tokens=0)
    assert done.report["steps"] == 0
    assert made.same_weights(home / model, tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((home / model / "config.json").read_text())
    assert (tmp_path / "out/plan.json").read_bytes() == (home / model / "plan.json").read_bytes()


@pytest.mark.parametrize("model", ["pruned", "per-layer"])
def test_distillation_comes_nearer_to_the_teacher(home: Path, tmp_path: Path, model: str) -> None:
    done = recover(home, tmp_path / "out", model, tokens=6000)
    curve = [loss for _, _, loss in done.report["held_out"]["curve"]]
    assert curve[-1] < 0.9 * curve[0]
    assert kl(tmp_path / "out", home / "dense") < 0.9 * kl(home / model, home / "dense")
    assert verify(tmp_path / "out") == [] and not (tmp_path / "out.training").exists()
    assert "Recovered" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("objective", ["ce", "both"])
def test_other_objectives_learn_too(home: Path, tmp_path: Path, objective: str) -> None:
    done = recover(
        home, tmp_path / "out", objective=objective, tokens=4000, teacher=None if objective == "ce" else home / "dense"
    )
    assert done.report["held_out"]["best"] < done.report["held_out"]["start"]


def test_a_model_that_learns_from_itself_stays_what_it_is(home: Path, tmp_path: Path) -> None:
    done = recover(home, tmp_path / "out", "dense", tokens=500)
    assert done.report["held_out"]["start"] < 1e-6
    assert made.same_weights(home / "dense", tmp_path / "out")  # and no step is kept that is only rounding


def test_the_same_seed_gives_the_same_weights(home: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        recover(home, tmp_path / name)
    recover(home, tmp_path / "other", seed=1)
    assert made.same_weights(tmp_path / "one", tmp_path / "two")
    assert not made.same_weights(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize(
    ("model", "family"), [("pruned", "llama"), ("per-layer", "llama"), ("experts", "mixtral"), ("conv", "gpt2")]
)
def test_merging_gives_what_the_adapter_gives(home: Path, tmp_path: Path, model: str, family: str) -> None:
    from peft import PeftModel

    root = home if family == "llama" else tmp_path
    if family != "llama":
        made.checkpoint(tmp_path / "dense", family)
        made.checkpoint(tmp_path / model, family, seed=1)
        made.text(tmp_path / "text.jsonl")
    settings = {"method": "lora", "tokens": 600, "learning_rate": 1e-2, "held_out": 0}
    recover(root, tmp_path / "adapter", model, **settings)
    recover(root, tmp_path / "merged", model, **settings, merge=True)
    adapted = PeftModel.from_pretrained(made.loaded(root / model), tmp_path / "adapter").eval()
    ids = tiny.tokens(2, 20)
    with torch.no_grad():
        one, other = adapted(input_ids=ids).logits, made.loaded(tmp_path / "merged")(input_ids=ids).logits
        start = made.loaded(root / model)(input_ids=ids).logits
    assert tiny.close(one, other) and not tiny.close(one, start, 1e-3)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16)


def test_what_is_kept_of_the_teacher_on_disk_teaches_the_same(home: Path, tmp_path: Path) -> None:
    recover(home, tmp_path / "resident")
    recover(home, tmp_path / "cached", teacher_topk=tiny.VOCAB)
    one, other = (made.loaded(tmp_path / n) for n in ("resident", "cached"))
    assert tiny.close(tiny.logits(one), tiny.logits(other), 1e-3)
    few = recover(home, tmp_path / "few", teacher_topk=8, tokens=6000)
    assert kl(tmp_path / "few", home / "dense") < kl(home / "pruned", home / "dense")
    assert few.report["held_out"]["best"] < few.report["held_out"]["start"]


@pytest.mark.parametrize("settings", [{"structures": "layer"}, {}])
def test_blocks_learn_from_their_twins(home: Path, tmp_path: Path, settings: dict[str, str]) -> None:
    made.pruned(home / "dense", tmp_path / "pruned", **settings)
    done = run_recovery(
        tmp_path / "pruned",
        out=tmp_path / "out",
        teacher=home / "dense",
        data=str(home / "text.jsonl"),
        block_steps=20,
        **{**FAST, "tokens": 64, "learning_rate": 1e-9},
    )
    assert all(after <= before for before, after in done.report["blocks"])
    assert any(after < before for before, after in done.report["blocks"])
    if not settings:  # without a layer, nearer to the hidden states of random text need not be nearer in the logits
        assert kl(tmp_path / "out", home / "dense") < kl(tmp_path / "pruned", home / "dense")


def test_text_that_the_teacher_writes(home: Path, tmp_path: Path) -> None:
    done = recover(home, tmp_path / "out", data="self", tokens=320)
    assert done.report["tokens"] == 320 and done.report["held_out"]["start"] > 0


def test_a_model_whose_documents_see_each_other_gets_one_a_row(tmp_path: Path) -> None:
    made.checkpoint(tmp_path / "dense", "bloom")
    made.pruned(tmp_path / "dense", tmp_path / "pruned", structures="ffn", shape="per-layer", allocate="uniform")
    made.text(tmp_path / "text.jsonl")
    done = recover(tmp_path, tmp_path / "out", tokens=4000)
    assert done.report["packing"] == "none"
    assert done.report["held_out"]["best"] < done.report["held_out"]["start"]


@pytest.mark.parametrize("settings", [{"accumulate": 2, "batch": 2}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}])
def test_the_same_training_in_other_pieces(home: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    recover(home, tmp_path / "whole")
    recover(home, tmp_path / "other", **settings)
    one, other = (tiny.logits(made.loaded(tmp_path / n)) for n in ("whole", "other"))
    start = tiny.logits(made.loaded(home / "pruned"))
    # bf16 has three digits; the rest differs by the order of sums alone, which Adam's first steps enlarge.
    assert (one - other).abs().mean() < (0.2 if "dtype" in settings else 0.02) * (one - start).abs().mean()


def test_a_rate_that_is_too_high_is_said(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="went astray"):
        recover(home, tmp_path / "out", learning_rate=30.0, warmup=0, max_grad_norm=1e9)
    assert not (tmp_path / "out").exists()


def test_training_ends_where_held_out_text_no_longer_gains(home: Path, tmp_path: Path) -> None:
    """Random text can only be learnt by heart: the held-out loss rises, and the best weights are what is written."""
    done = recover(
        home, tmp_path / "out", "dense", objective="ce", tokens=30000, evaluations=30, patience=2, learning_rate=1e-2
    )
    judged = done.report["held_out"]
    assert done.report["stopped"] and judged["best"] == min(loss for _, _, loss in judged["curve"])
    assert judged["best_step"] < judged["curve"][-1][0]


def test_minutes_end_a_training(home: Path, tmp_path: Path) -> None:
    done = recover(home, tmp_path / "out", tokens=None, minutes=0.05)
    assert done.report["steps"] > 0 and done.report["seconds"] < 60


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher": None}, "no dense model to learn from"),
        ({"seq_len": 128}, "longer than the model's 64 positions"),
        ({"merge": True}, "no adapters to merge"),
        ({"minutes": 1}, "two ends of one training"),
        ({"method": "lora", "target_modules": "nowhere"}, "PEFT can not adapt"),
        ({"objective": "kl"}, "--objective"),
        ({"dtype": "float16"}, "needs a GPU"),
    ],
)
def test_settings_that_can_not_be_met_are_refused(home: Path, tmp_path: Path, settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        recover(home, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_packages_that_are_not_there_are_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingError, match=r"pared\[recover\]"):
        recover(home, tmp_path / "out", method="lora")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="accelerate"):
        recover(home, tmp_path / "out")


def test_a_deepspeed_config_needs_the_file_and_the_package(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "zero.json"
    with pytest.raises(UsageError, match="no DeepSpeed config"):
        recover(home, tmp_path / "out", deepspeed=str(file))
    file.write_text("{}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else object())
    with pytest.raises(MissingError, match="deepspeed") as missing:
        recover(home, tmp_path / "out", deepspeed=str(file))
    assert (missing.value.where, missing.value.fix) == ("--deepspeed", "pip install deepspeed, or use FSDP2")


def test_a_short_training_has_small_batches(home: Path, tmp_path: Path) -> None:
    assert [default_batch(rows, 1) for rows in (10, 2 * ENOUGH_STEPS, 10**6)] == [1, 2, LARGEST_BATCH]
    assert default_batch(10**4, 4) == default_batch(10**4, 1) // 4
    done = recover(home, tmp_path / "out", batch=None, tokens=640)
    assert done.report["batch"] == 1 and done.report["steps"] * 32 >= 640


def test_no_gain_while_the_rate_is_high_ends_no_training() -> None:
    judge = Judge(patience=2, minutes=None, progress=lambda *_: None)
    for step, loss in enumerate([1.0, 1.3, 1.4, 1.5]):
        judge.judged(step, step, loss, late=False)
    assert judge.worse == 0 and judge.best == 1.0
    judge.judged(4, 4, 1.2, late=True)
    assert judge.worse == 1


def test_another_run_is_not_gone_on_with(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="went astray"):
        recover(home, tmp_path / "out", learning_rate=30.0, warmup=0, max_grad_norm=1e9)
    with pytest.raises(UsageError, match="another training stopped half way"):
        recover(home, tmp_path / "out")


def test_a_checkpoint_that_is_not_whole_is_known(tmp_path: Path) -> None:
    from pared.recover.training import mark_complete

    (tmp_path / "weights").write_bytes(b"abc")
    assert not whole(tmp_path)
    mark_complete(tmp_path, {})
    assert whole(tmp_path)
    (tmp_path / "weights").write_bytes(b"abd")
    assert not whole(tmp_path)

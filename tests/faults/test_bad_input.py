"""What a user can get wrong: each gets three lines, an exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from command import pared, refused, tree

WEIGHTS = "model.safetensors"
# Needs neither a tokenizer nor text, so that only the input under test can be what is wrong.
PLAIN = ("--criterion", "l1", "--compensate", "none")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of a tiny llama, without a tokenizer."""
    return tiny.save(tiny.model("llama"), tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A short text."""
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a little cat. It sat on a mat and looked at the rain.\n" * 4)
    return path


# ---- the amount -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["0", "1", "1.5", "nan", "inf", "-0.1", "a fifth", ""])
def test_a_share_outside_of_0_and_1_is_refused(tmp_path: Path, model: Path, share: str) -> None:
    refused(tmp_path, 2, "prune", model, "-o", tmp_path / "out", f"--remove={share}", *PLAIN, words=("--remove",))


def test_a_share_that_the_alignment_can_not_give_is_refused_with_what_it_can(tmp_path: Path, model: Path) -> None:
    done = refused(tmp_path, 2, "prune", model, "-o", tmp_path / "out", "--remove", "0.9", "--align", "48", *PLAIN)
    assert "out of reach" in done.err and "between 0% and" in done.err


def test_no_layer_may_be_left_over_for_pruning(tmp_path: Path, model: Path) -> None:
    ends = ("--keep-first", "2", "--keep-last", "1")
    refused(tmp_path, 2, "prune", model, "-o", tmp_path / "out", *ends, *PLAIN, words=("protected",))


# ---- calibration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--samples", "0"), "samples"),
        (("--samples", "-1"), "samples"),
        (("--samples", "50", "--seq-len", "64"), "too little calibration text"),
        (("--samples", "1", "--seq-len", "513"), "512 positions"),
        (("--samples", "1", "--seq-len", "1"), "predicts nothing"),
        (("--samples", "1", "--seq-len", "16", "--batch", "0"), "--batch"),
    ],
)
def test_calibration_that_can_not_be_had_is_refused(
    tmp_path: Path, storyteller: Path, text: Path, flags: tuple[str, ...], word: str
) -> None:
    refused(tmp_path, 2, "prune", storyteller, "-o", tmp_path / "out", "--calibration", text, *flags, words=(word,))


def test_a_calibration_file_that_is_not_there_is_refused(tmp_path: Path, storyteller: Path) -> None:
    refused(tmp_path, 2, "prune", storyteller, "-o", tmp_path / "out", "--calibration", tmp_path / "no.txt", words=("no.txt",))


def test_a_model_without_a_tokenizer_can_not_be_calibrated_from_text(tmp_path: Path, model: Path, text: Path) -> None:
    refused(tmp_path, 3, "prune", model, "-o", tmp_path / "out", "--calibration", text, words=("tokenizer",))


# ---- the checkpoint -------------------------------------------------------------------------------------------------


def edit_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(model / WEIGHTS)
    change(state)
    save_file(state, model / WEIGHTS, metadata={"format": "pt"})


def edit_config(model: Path, **entries: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def missing(model: Path) -> None:
    edit_weights(model, lambda s: s.pop("model.layers.1.mlp.down_proj.weight"))


def unexpected(model: Path) -> None:
    edit_weights(model, lambda s: s.update({"model.layers.0.mlp.extra.weight": torch.zeros(2, 2)}))


def misshapen(model: Path) -> None:
    edit_weights(model, lambda s: s.update({"model.norm.weight": torch.ones(31)}))


def more_layers(model: Path) -> None:
    edit_config(model, num_hidden_layers=4)


def fewer_layers(model: Path) -> None:
    edit_config(model, num_hidden_layers=2)


def truncated(model: Path) -> None:
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[:-100])


def only_bin(model: Path) -> None:
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()


def quantised(model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})


def adapter(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (model / WEIGHTS).rename(model / "adapter_model.safetensors")
    (model / "config.json").unlink()


def points_outside(model: Path) -> None:
    (model / WEIGHTS).rename(model.parent / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def remote_code(model: Path) -> None:
    edit_config(model, model_type="homemade", auto_map={"AutoModelForCausalLM": "modeling.Homemade"})


def no_such_type(model: Path) -> None:
    edit_config(model, model_type="lama")


def nonsense_sizes(model: Path) -> None:
    edit_config(model, num_attention_heads=7)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (missing, "down_proj"),
        (unexpected, "extra"),
        (misshapen, "model.norm.weight"),
        (more_layers, "missing"),
        (fewer_layers, "layers.2"),
        (truncated, WEIGHTS),
        (only_bin, "save_pretrained"),
        (quantised, "quantised"),
        (adapter, "merge"),
        (points_outside, "outside"),
        (remote_code, "code"),
        (no_such_type, "lama"),
        (nonsense_sizes, "config"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "plan", "eval", "verify"])
def test_a_broken_checkpoint_is_refused(
    tmp_path: Path, model: Path, text: Path, command: str, spoil: Callable[[Path], None], word: str
) -> None:
    spoil(model)
    if command == "verify":
        before = tree(tmp_path)
        done = pared("verify", model)
        assert (done.code, tree(tmp_path)) == (3, before)
        assert "Traceback" not in done.err
    elif command == "eval":
        refused(tmp_path, 3, "eval", model)
    else:
        refused(tmp_path, 3, command, model, "-o", tmp_path / "out", *PLAIN, words=(word,))


@pytest.mark.parametrize("spoil", [truncated, only_bin, quantised, adapter, points_outside, remote_code, no_such_type])
def test_what_the_config_and_the_headers_show_is_refused_by_inspect(
    tmp_path: Path, model: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(model)
    refused(tmp_path, 3, "inspect", model)


def spoil_value(name: str, value: float) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        def change(state: dict[str, torch.Tensor]) -> None:
            state[name].view(-1)[3] = value

        edit_weights(model, change)

    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("criterion", ["l1", "random"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, model: Path, criterion: str, name: str, value: float) -> None:
    spoil_value(name, value)(model)
    how = ("--criterion", criterion, "--compensate", "none")
    refused(tmp_path, 3, "prune", model, "-o", tmp_path / "out", *how)
    assert pared("verify", model).code == 3


def overflowing(model: Path) -> None:
    # Finite, but nothing that is computed with it is.
    edit_weights(model, lambda s: s["model.layers.1.self_attn.v_proj.weight"].fill_(3e38))


@pytest.mark.parametrize("criterion", ["taylor", "wanda_sp", "obs", "obs-fisher"])
@pytest.mark.parametrize("source", ["self", "text"])
@pytest.mark.parametrize("spoil", [spoil_value("model.layers.1.mlp.down_proj.weight", float("nan")), overflowing])
def test_a_loss_or_an_activation_that_is_not_finite_ends_the_run(
    tmp_path: Path, storyteller: Path, text: Path, criterion: str, source: str, spoil: Callable[[Path], None]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in storyteller.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    spoil(model)
    small = ("--samples", "2", "--seq-len", "16", "--calibration", source if source == "self" else text)
    refused(tmp_path, 3, "prune", model, "-o", tmp_path / "out", "--criterion", criterion, *small, words=("finite",))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    for command in ("prune", "plan"):
        refused(tmp_path, 3, command, tmp_path / "nowhere", "-o", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    for command in ("inspect", "eval", "verify"):
        refused(tmp_path, 3, command, tmp_path / "nowhere")
        refused(tmp_path, 3, command, tmp_path / "empty")


def test_a_hub_model_can_not_be_fetched_offline(tmp_path: Path) -> None:
    for command in (("prune", "-o", tmp_path / "out"), ("inspect",), ("eval",)):
        refused(tmp_path, 4, command[0], "nobody/nothing", *command[1:], words=("nobody/nothing",))


# ---- where the result goes ------------------------------------------------------------------------------------------


def test_the_source_is_never_written_to(tmp_path: Path, model: Path) -> None:
    for out in (model, model / "pruned", model.parent):
        refused(tmp_path, 2, "prune", model, "-o", out, *PLAIN, words=("source",))
        refused(tmp_path, 2, "prune", model, "-o", out, "--overwrite", *PLAIN, words=("source",))
    for out in (model / "plan.json", model / "config.json"):
        refused(tmp_path, 2, "plan", model, "-o", out, "--overwrite", *PLAIN, words=("source",))


def test_an_existing_result_is_kept_unless_told_otherwise(tmp_path: Path, model: Path) -> None:
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    assert pared("plan", model, "-o", plan, *PLAIN).code == 0
    assert pared("apply", model, plan, "-o", out).code == 0
    refused(tmp_path, 2, "prune", model, "-o", out, *PLAIN, words=("--overwrite",))
    refused(tmp_path, 2, "plan", model, "-o", plan, *PLAIN, words=("--overwrite",))
    refused(tmp_path, 2, "apply", model, plan, "-o", out, words=("--overwrite",))
    assert pared("prune", model, "-o", out, "--overwrite", *PLAIN).code == 0
    assert pared("plan", model, "-o", plan, "--overwrite", *PLAIN).code == 0


def test_overwriting_never_deletes_what_is_not_a_checkpoint(tmp_path: Path, model: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    refused(tmp_path, 2, "prune", model, "-o", tmp_path / "home", "--overwrite", *PLAIN)
    refused(tmp_path, 2, "plan", model, "-o", tmp_path / "home", "--overwrite", *PLAIN)


def test_a_result_has_to_be_named_unless_nothing_is_written(tmp_path: Path, model: Path) -> None:
    refused(tmp_path, 2, "prune", model, *PLAIN, words=("-o OUT",))
    refused(tmp_path, 2, "plan", model, *PLAIN, words=("--out",))
    refused(tmp_path, 2, "plan", model, "-o", tmp_path / "no" / "plan.json", *PLAIN, words=("directory",))


# ---- layouts and plans ----------------------------------------------------------------------------------------------


def test_an_axis_that_is_not_proved_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = tiny.save(tiny.heads_unproved(), tmp_path / "model")
    done = refused(tmp_path, 3, "prune", model, "-o", tmp_path / "out", "--structures", "kv", *PLAIN)
    assert "kv" in done.err.splitlines()[0] and "--structures" in done.err


def test_sizes_without_words_in_the_config_are_refused_with_the_way_out(tmp_path: Path) -> None:
    model = tiny.save(tiny.model("bloom"), tmp_path / "model")
    for structures in ((), ("--structures", "kv")):
        refused(tmp_path, 3, "prune", model, "-o", tmp_path / "out", *structures, *PLAIN, words=("--shape per-layer",))


def test_a_plan_that_does_not_fit_is_refused(tmp_path: Path, model: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    refused(tmp_path, 2, "apply", model, plan, "-o", out, words=("plan.json",))
    plan.write_text("{}")
    refused(tmp_path, 2, "apply", model, plan, "-o", out, words=("plan.json",))
    plan.write_bytes(b"\xff\xfe")
    refused(tmp_path, 2, "apply", model, plan, "-o", out, words=("plan.json",))
    plan.unlink()
    assert pared("plan", model, "-o", plan, *PLAIN).code == 0
    other = tiny.save(tiny.model("llama", intermediate_size=40), tmp_path / "other")
    refused(tmp_path, 2, "apply", other, plan, "-o", out)
    refused(tmp_path, 2, "apply", tiny.save(tiny.model("qwen3"), tmp_path / "qwen"), plan, "-o", out, words=("qwen3",))


# ---- evaluating -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--seq-len", "513"), "512 positions"),
        (("--seq-len", "1"), "predicts nothing"),
        (("--seq-len", "500"), "less than one window"),
        (("--seq-len", "16", "--stride", "17"), "stride"),
        (("--seq-len", "16", "--batch", "0"), "batch"),
        (("--seq-len", "16", "--max-windows", "0"), "windows"),
        (("--text", "self", "--seq-len", "16", "--stride", "8"), "stride"),
        (("--dtype", "int8"), "--dtype"),
    ],
)
def test_an_evaluation_that_can_not_be_had_is_refused(
    tmp_path: Path, storyteller: Path, text: Path, flags: tuple[str, ...], word: str
) -> None:
    refused(tmp_path, 2, "eval", storyteller, "--text", text, *flags, words=(word,))


def test_models_of_unlike_vocabularies_are_not_compared(tmp_path: Path, storyteller: Path, model: Path, text: Path) -> None:
    flags = ("--text", text, "--seq-len", "16", "--no-speed")
    refused(tmp_path, 3, "eval", model, "--against", storyteller, *flags)


# ---- the program as a process ---------------------------------------------------------------------------------------


def test_a_process_says_no_more_than_the_three_lines(tmp_path: Path, model: Path) -> None:
    spoil_value("model.layers.1.mlp.down_proj.weight", float("nan"))(model)
    before = tree(tmp_path)
    command = [sys.executable, "-m", "pared", "prune", str(model), "-o", str(tmp_path / "out"), *PLAIN]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 3 and done.stdout == ""
    assert 1 <= len(done.stderr.splitlines()) <= 3
    assert tree(tmp_path) == before

"""What was imported is pruned like the rest: every axis proved, cut, written, loaded without pared, and cut again."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import formulas
import pared
import tiny
from command import pared as command
from pared.checkpoint import Checkpoint
from pared.importing import import_checkpoint
from pared.models import NATIVE as CLASSES
from pared.plan import from_ranges
from pared.proof import TOLERANCE, proved_layout
from pared.verify import verify
from published_layouts import NATIVE, PAD, VARIANTS, prompt
from test_native import without_pared

ALL = ("baichuan2-7b", "baichuan-13b", "chatglm2-6b", "chatglm-6b")
AXES = ("kv", "ffn", "hidden", "layer")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @lru_cache
    def make(name: str) -> Path:
        root = tmp_path_factory.mktemp(name)
        return import_checkpoint(VARIANTS[name].write(root / "old", torch.float32), root / "new").path

    return make


def ids_of(name: str) -> torch.Tensor:
    """Calibration rows that all have their special tokens in the same places."""
    return torch.tensor([prompt(name, 16, seed) for seed in range(6)])


def cut(name: str, source: Path, **settings: Any) -> Any:
    return tiny.cut(source, **{"calibration": ids_of(name), "remove": 0.2, **settings})


@pytest.mark.parametrize("name", ALL)
def test_every_axis_is_proved(name: str, imported: Any) -> None:
    proofs = proved_layout(pared.load(imported(name)).config).proofs
    wanted = (*AXES, "query") if name == "chatglm2-6b" else AXES
    assert set(proofs) == {*wanted, "attention", "mlp", "vocab"}
    assert all(proofs[a].holds and proofs[a].difference <= TOLERANCE for a in proofs)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", ALL)
def test_what_is_cut_loads_generates_and_is_cut_again(name: str, axis: str, imported: Any, tmp_path: Path) -> None:
    # Of what each axis holds: the widths can not give a third of all.
    first = cut(name, imported(name), structures=(axis,), out=tmp_path / "once", remove=0.2 if axis in ("kv", "ffn") else 0.3)
    assert verify(tmp_path / "once") == []
    second = cut(name, tmp_path / "once", structures=("ffn",), out=tmp_path / "twice", remove=0.05, seed=1)
    assert second.plan.before == first.plan.after and second.plan.after.params < first.plan.after.params
    for path in (tmp_path / "once", tmp_path / "twice"):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        assert tiny.equal_states(model, pared.load(path))
        ids = torch.tensor([prompt(name)])
        model.generation_config.eos_token_id = None
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
        assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))
        if name in NATIVE:
            native = CLASSES[model.config.model_type]
            assert (path / native.file).read_text() == native.code()
            assert "trust_remote_code=True" in (path / "README.md").read_text()
            assert json.loads((path / "config.json").read_bytes())["auto_map"] == native.auto_map


@pytest.mark.parametrize("criterion", ["l2", "taylor", "wanda_sp", "obs", "obs-fisher"])
@pytest.mark.parametrize("name", ["baichuan-13b", "chatglm-6b"])
def test_native_models_are_scored_and_refitted_block_by_block(name: str, criterion: str, imported: Any, tmp_path: Path) -> None:
    result = cut(name, imported(name), criterion=criterion, compensate="refit", out=tmp_path / "out", structures=("kv", "ffn"))
    model = pared.load(tmp_path / "out").eval()
    assert result.plan.removed >= 0.2
    assert torch.isfinite(tiny.logits(model, ids_of(name))).all()


@pytest.mark.parametrize("name", ["baichuan2-13b", "chatglm-6b"])
def test_a_pruned_checkpoint_loads_without_pared(name: str, imported: Any, tmp_path: Path) -> None:
    cut(name, imported(name), structures=("kv", "ffn"), out=tmp_path / "out")
    ids = prompt(name)
    found = without_pared(tmp_path / "out", ids, tmp_path)
    want = tiny.logits(pared.load(tmp_path / "out").eval(), torch.tensor([ids]))[0]
    assert tiny.close(torch.tensor(found["logits"]), want)


def test_kept_heads_keep_their_slopes(imported: Any, tmp_path: Path) -> None:
    plan = cut("baichuan-13b", imported("baichuan-13b"), structures=("kv",), out=tmp_path / "out", remove=0.3).plan
    checkpoint, kept = Checkpoint.open(tmp_path / "out"), []
    for i, layer in enumerate(plan.layers):
        heads = from_ranges(layer.keep["kv"])
        slopes = checkpoint.read(f"model.layers.{i}.self_attn.alibi_slopes")
        assert torch.equal(slopes, torch.tensor(formulas.slopes(6))[heads])
        kept.append(tuple(torch.as_tensor(heads).tolist()))
    assert len(set(kept)) > 1, "the layers keep unlike heads"


def test_silent_heads_and_cut_heads_are_the_same(imported: Any) -> None:
    """With the published formula as the judge: a head whose output is zeroed in the old weights is a head that is cut."""
    variant, d = VARIANTS["baichuan-13b"], 8
    result = cut("baichuan-13b", imported("baichuan-13b"), structures=("kv",), remove=0.3)
    weights = variant.weights(torch.float32)
    for i, layer in enumerate(result.plan.layers):
        gone = sorted(set(range(6)) - set(torch.as_tensor(from_ranges(layer.keep["kv"])).tolist()))
        for head in gone:
            weights[f"model.layers.{i}.self_attn.o_proj.weight"][:, head * d : (head + 1) * d] = 0
    ids = prompt("baichuan-13b", 40)
    got = tiny.logits(result.model, torch.tensor([ids]))[0]
    assert tiny.close(got, variant.logits(ids, weights)) and not tiny.close(got, variant.logits(ids))


def test_the_residual_scale_stays_where_layers_go(imported: Any, tmp_path: Path) -> None:
    cut("chatglm-6b", imported("chatglm-6b"), structures=("layer",), out=tmp_path / "out", remove=0.3)
    config = pared.load(tmp_path / "out").config
    assert config.num_hidden_layers == 2 and config.residual_scale == pytest.approx(6**0.5)


def test_a_per_layer_shape_is_carried_by_both_files(imported: Any, tmp_path: Path) -> None:
    name, settings = "baichuan-13b", {"structures": ("kv", "ffn"), "shape": "per-layer", "remove": 0.25}
    cut(name, imported(name), out=tmp_path / "out", **settings)
    memory = cut(name, imported(name), **settings).model
    assert tiny.equal_states(pared.load(tmp_path / "out"), memory)
    ids = prompt(name)
    found = without_pared(tmp_path / "out", ids, tmp_path)
    assert tiny.close(torch.tensor(found["logits"]), tiny.logits(memory, torch.tensor([ids]))[0])
    with pytest.raises(Exception):  # noqa: B017  (transformers' own, of several kinds; that it refuses is the law)
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_commands_take_an_import(tmp_path: Path, imported: Any) -> None:
    path = imported("baichuan-13b")
    shown = json.loads(command("inspect", path, "--format", "json").out)
    assert shown["model_type"] == "baichuan_alibi"
    done = command("prune", path, "-o", tmp_path / "out", "--remove", "0.2", "--criterion", "l2", "--compensate", "none")
    assert done.code == 0, done.err
    assert command("verify", tmp_path / "out").code == 0

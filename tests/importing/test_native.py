"""Our own classes as transformers sees them: loaded without pared, saved, trained, driven by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import formulas
import pared
import tiny
from pared.calibration import Batch
from pared.checkpoint import Checkpoint
from pared.errors import ModelError
from pared.importing import import_checkpoint
from pared.models import NATIVE as CLASSES
from pared.proof import proved_layout
from pared.stream import Stream
from published_layouts import BOS, GMASK, MASK, PAD, VARIANTS, prompt

ALONE = """
import sys, json, torch
sys.modules["pared"] = None  # what is not installed can not be imported
from transformers import AutoModelForCausalLM
path, ids = sys.argv[1], torch.tensor([json.loads(sys.argv[2])])
model, info = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
model.generation_config.eos_token_id = None
new = model.eval().generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=3)
assert "transformers_modules" in type(model).__module__
print(json.dumps({"tokens": new[0].tolist(), "logits": model(ids).logits[0].tolist()}))
"""


def without_pared(path: Path, ids: list[int], home: Path) -> dict[str, Any]:
    """What a checkpoint gives in a process that has transformers and no pared."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(path), json.dumps(ids)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=["baichuan-13b", "chatglm-6b"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(name)
    return import_checkpoint(VARIANTS[name].write(root / "old", torch.float32), root / "new").path


@pytest.fixture
def model(path: Path) -> PreTrainedModel:
    return pared.load(path).eval()


def test_a_checkpoint_loads_and_generates_without_pared(name: str, path: Path, tmp_path: Path) -> None:
    ids = prompt(name)
    found = without_pared(path, ids, tmp_path)
    assert tiny.close(torch.tensor(found["logits"]), VARIANTS[name].logits(ids))
    assert len(found["tokens"]) == len(ids) + 6


def test_its_code_is_not_run_where_pared_has_the_class(path: Path, tmp_path: Path) -> None:
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / CLASSES[AutoConfig.from_pretrained(path).model_type].file).write_text("raise SystemExit('this ran')")
    assert Checkpoint.open(tmp_path).trust_remote_code is False
    for loaded in (pared.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded).__module__.startswith("pared.models")


def test_save_pretrained_carries_the_class_along(name: str, model: PreTrainedModel, tmp_path: Path) -> None:
    tiny.save(model, tmp_path / "saved")
    ids = prompt(name)
    found = without_pared(tmp_path / "saved", ids, tmp_path)
    assert tiny.close(torch.tensor(found["logits"]), VARIANTS[name].logits(ids))
    assert tiny.equal_states(pared.load(tmp_path / "saved"), model)


# Newer releases of transformers say "activation", and 5.16 does not know the word.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
def test_both_attention_implementations_give_the_same_gradients_checkpointed_or_not(name: str, model: PreTrainedModel) -> None:
    ids = torch.tensor([prompt(name, 12, seed) for seed in (1, 2)])
    found = []
    for attention in ("eager", "sdpa"):
        for checkpointed in (False, True):
            model.set_attn_implementation(attention)
            (model.gradient_checkpointing_enable if checkpointed else model.gradient_checkpointing_disable)()
            model.train().zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(g.abs().max() > 0 for g in found[0].values())
    for other in found[1:]:
        assert all(tiny.close(other[n], g) for n, g in found[0].items())


def test_beams_static_caches_and_steps_by_hand_agree(name: str, model: PreTrainedModel) -> None:
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt(name, 9, seed) for seed in (1, 2)])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    want = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **settings), want)
    beams = [model.generate(ids, num_beams=3, use_cache=use, **settings) for use in (True, False)]
    assert torch.equal(*beams)
    with torch.no_grad():
        out, row = model(input_ids=ids, use_cache=True), ids
        for _ in range(8):
            token = out.logits[:, -1:].argmax(-1)
            row = torch.cat([row, token], dim=1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    assert torch.equal(row, want)


@pytest.mark.parametrize("alone", [True, False])
def test_slopes_stay_exact_in_half_precision(alone: bool, tmp_path: Path) -> None:
    # Twelve heads: the slopes of the last four are no numbers that bf16 has.
    settings = {"num_attention_heads": 12, "hidden_size": 48}
    path = import_checkpoint(VARIANTS["baichuan-13b"].write(tmp_path / "old", torch.float32, **settings), tmp_path / "new").path
    if alone:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    else:
        model = pared.load(path, dtype=torch.bfloat16)
    slopes = [b for n, b in model.named_buffers() if n.endswith("alibi_slopes")]
    want = torch.tensor(formulas.slopes(12))
    assert model.dtype == torch.bfloat16 and len(slopes) == 3 and not torch.equal(want, want.bfloat16().float())
    assert all(b.dtype == torch.float32 and torch.equal(b, want) for b in slopes)
    assert torch.isfinite(tiny.logits(model, torch.tensor([prompt("baichuan-13b", 40)]))).all()


def test_block_by_block_gives_what_the_whole_model_gives(name: str, path: Path, model: PreTrainedModel) -> None:
    batches = [Batch(torch.tensor([prompt(name, 12, seed), prompt(name, 12, seed + 1)]), None) for seed in (1, 5)]
    stream = Stream(Checkpoint.open(path), proved_layout(model.config))
    hidden = stream.forward(batches)
    with stream.outside(front=False), torch.no_grad():
        for batch, h in zip(batches, hidden, strict=True):
            assert tiny.close(stream.logits(h), model(input_ids=batch.input_ids).logits)


# -- the first ChatGLM's positions -------------------------------------------------------------------------------------


def positions(*ids: int, padding: int = 0) -> list[list[int]]:
    from pared.models.chatglm import positions as find

    row = torch.tensor([[PAD] * padding + list(ids)])
    real = torch.tensor([[False] * padding + [True] * len(ids)])
    return find(row, real, bos=BOS, gmask=GMASK, mask=MASK)[0].tolist()


def test_positions_of_a_prompt() -> None:
    assert positions(7, 8, GMASK, BOS, 9, 10) == [[0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]]
    # The blank may lie inside the context; [gMASK] goes before [MASK].
    assert positions(7, MASK, 8, BOS, 9) == [[0, 1, 2, 1, 1], [0, 0, 0, 1, 2]]
    assert positions(MASK, GMASK, 8, BOS) == [[0, 1, 2, 1], [0, 0, 0, 1]]
    # Only the first BOS begins the answer.
    assert positions(7, GMASK, BOS, 9, BOS) == [[0, 1, 1, 1, 1], [0, 0, 1, 2, 3]]
    assert positions(7, GMASK, BOS, padding=2) == [[0, 0, 0, 1, 1], [-1, -1, 0, 0, 1]]
    # Without one everything is an answer; so it is where the row begins with one.
    assert positions(7, 8, 9) == positions(BOS, 8, 9) == [[0, 0, 0], [1, 2, 3]]


def test_a_text_without_bos_is_read_from_left_to_right(tmp_path: Path) -> None:
    path = import_checkpoint(VARIANTS["chatglm-6b"].write(tmp_path / "old", torch.float32), tmp_path / "new").path
    model = pared.load(path).eval()
    ids = torch.tensor([list(range(10, 22))])
    with torch.no_grad():
        whole, part = model(input_ids=ids).logits[:, :7], model(input_ids=ids[:, :7]).logits
        context = torch.tensor([[*range(10, 17), GMASK, BOS]])
        changed = context.clone()
        changed[0, 5] = 40
        seen = (model(input_ids=context).logits - model(input_ids=changed).logits)[0].abs().amax(-1)
    assert tiny.close(part, whole) and bool((seen > 1e-3).all())
    with pytest.raises(ValueError, match="position_ids"):
        model(input_ids=ids, position_ids=torch.arange(12)[None])


def test_prompts_of_unlike_positions_are_not_streamed_as_one(tmp_path: Path) -> None:
    path = import_checkpoint(VARIANTS["chatglm-6b"].write(tmp_path / "old", torch.float32), tmp_path / "new").path
    stream = Stream(Checkpoint.open(path), proved_layout(AutoConfig.from_pretrained(path)))
    one, other = [7, 8, 9, GMASK, BOS, 10], [7, GMASK, BOS, 10, 11, 12]
    with pytest.raises(ModelError, match="positions or masks"):
        stream.forward([Batch(torch.tensor([one]), None), Batch(torch.tensor([other]), None)])

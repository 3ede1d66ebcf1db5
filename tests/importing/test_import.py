"""Imports compute what the published formula computes, stream, and generate with and without a cache alike."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import pared
import tiny
from command import pared as command
from pared.checkpoint import Checkpoint
from pared.importing import Imported, import_checkpoint
from pared.verify import verify
from published_layouts import NATIVE, PAD, VARIANTS, Variant, prompt

ALL = sorted(VARIANTS)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Imported]]:
    """(variant, dtype) -> the published checkpoint and what its import gave."""

    @lru_cache
    def make(name: str, dtype: torch.dtype | None = torch.float32) -> tuple[Path, Imported]:
        old = VARIANTS[name].write(tmp_path_factory.mktemp(name) / "old", dtype)
        return old, import_checkpoint(old, old.with_name("new"))

    return make


def load(path: Path, **options: Any) -> PreTrainedModel:
    """Loaded by transformers, which must miss nothing."""
    with pared.modeling.hf_quiet():
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


def run(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ALL)
def test_logits_are_those_of_the_published_formula(name: str, attention: str, imported: Any) -> None:
    variant: Variant = VARIANTS[name]
    done = imported(name)[1]
    assert done.model_type == variant.becomes
    model = load(done.path, attn_implementation=attention)
    assert model.config.model_type == variant.becomes and model.dtype == torch.float32
    for length in (4, 11, 70):
        ids = prompt(name, length)
        assert tiny.close(run(model, ids), variant.logits(ids))


@pytest.mark.parametrize("name", ALL)
def test_a_half_precision_checkpoint_keeps_its_bits(name: str, imported: Any) -> None:
    variant = VARIANTS[name]
    done = imported(name, None)[1]
    new = Checkpoint.open(done.path)
    halves = {n: t for n, t in new.tensors.items() if not n.endswith("alibi_slopes")}
    assert {t.dtype for t in halves.values()} == {"BF16" if variant.dtype == torch.bfloat16 else "F16"}
    assert new.config["dtype"] == str(variant.dtype).removeprefix("torch.")
    # The entries of all weights are the same ones, wherever they went; those of a normalised head are new.
    weights = {n: t for n, t in variant.weights().items() if not n.endswith("inv_freq")}
    normalised = name.startswith("baichuan2")
    before = torch.cat([t.flatten() for n, t in weights.items() if not (normalised and n == "lm_head.weight")])
    after = torch.cat([new.read(n).flatten() for n in halves if not (normalised and n == "lm_head.weight")])
    assert torch.equal(before.sort().values, after.sort().values)
    wide = {n: t.float() for n, t in weights.items()}
    ids = prompt(name)
    got = run(load(done.path, dtype=torch.float32), ids)
    assert tiny.close(got, variant.logits(ids, wide), 2**-7 if normalised else 1e-5)


@pytest.mark.parametrize("name", ALL)
def test_greedy_generation_is_the_same_with_and_without_a_cache(name: str, imported: Any) -> None:
    model = load(imported(name)[1].path)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt(name, 9, seed) for seed in (1, 2)])
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    # And it is what the formula gives, one token after the other.
    row = ids[0].tolist()
    for _ in range(12):
        row.append(int(VARIANTS[name].logits(row)[-1].argmax()))
    assert cached[0].tolist() == row


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ALL)
def test_padding_on_the_left_changes_nothing(name: str, attention: str, imported: Any) -> None:
    model = load(imported(name)[1].path, attn_implementation=attention)
    model.generation_config.eos_token_id = None
    rows = [prompt(name, n, seed=n) for n in (5, 9, 12)]
    ids = torch.tensor([[PAD] * (12 - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (12 - len(r)) + [1] * len(r) for r in rows])
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    together = model.generate(ids, attention_mask=mask, **settings)
    for row, out in zip(rows, together, strict=True):
        alone = model.generate(torch.tensor([row]), **settings)[0]
        assert out[12 - len(row) :].tolist() == alone.tolist()
    # transformers' own models find positions from the mask in `generate`, not in a plain forward pass.
    if name in NATIVE:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        assert all(tiny.close(logits[i, 12 - len(r) :], run(model, r)) for i, r in enumerate(rows))


@pytest.mark.parametrize("name", ALL)
def test_one_tensor_is_in_memory_at_a_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = VARIANTS[name].write(tmp_path / "old")
    alive: list[weakref.ref[Any]] = []
    read, most = Checkpoint.read, 0

    def counted(self: Checkpoint, tensor: str) -> Tensor:
        nonlocal most
        value = read(self, tensor)
        alive.append(weakref.ref(value.untyped_storage()))
        most = max(most, sum(a() is not None for a in alive))
        return value

    monkeypatch.setattr(Checkpoint, "read", counted)
    import_checkpoint(old, tmp_path / "new", max_shard_bytes=4096)
    # The one that is read while the one before it is still bound to its name.
    assert len(alive) >= len([t for t in VARIANTS[name].weights() if not t.endswith("inv_freq")]) and most <= 2
    assert len(Checkpoint.open(tmp_path / "new").files) > 1


@pytest.mark.parametrize("name", ALL)
def test_what_is_written_is_whole(name: str, imported: Any) -> None:
    done = imported(name)[1]
    assert verify(done.path) == []
    card = (done.path / "README.md").read_text()
    assert done.family in card and all(note in card for note in done.notes)
    assert not list(done.path.glob("modeling_*")) and ("trust_remote_code" in card) == (name in NATIVE)


def test_the_slopes_of_forty_heads_are_those_of_baichuan_13b() -> None:
    from pared.models.baichuan import alibi_slopes

    want = [2 ** (-k / 4) for k in range(1, 33)] + [2 ** (-k / 8) for k in range(1, 17, 2)]
    assert torch.allclose(alibi_slopes(40), torch.tensor(want), rtol=1e-6, atol=0)


def test_the_layers_number_cancels_in_the_first_chatglm() -> None:
    variant = VARIANTS["chatglm-6b"]
    weights, ids = variant.weights(torch.float32), prompt("chatglm-6b", 20)
    without = variant.formula(variant.config, weights, ids, scale_by_layer=False)  # type: ignore[call-arg]
    assert tiny.close(variant.logits(ids), without, 1e-6)


def test_the_tokenizer_comes_along_and_its_code_is_not_run(tmp_path: Path) -> None:
    old = VARIANTS["baichuan-13b"].write(tmp_path / "old")
    (old / "tokenizer.model").write_bytes(b"sentencepiece")
    (old / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_baichuan.T", None]}}))
    for file in ("tokenization_baichuan.py", "modeling_baichuan.py", "configuration_baichuan.py"):
        (old / file).write_text("raise SystemExit('this ran')  # alibi")
    (old / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "do_sample": True, "user_token_id": 7}))
    done = import_checkpoint(old, tmp_path / "new")
    names = {p.name for p in done.path.iterdir()}
    assert names >= {"tokenizer.model", "tokenization_baichuan.py", "generation_config.json", "baichuan.py"}
    assert not names & {"modeling_baichuan.py", "configuration_baichuan.py"}
    assert any("tokenization_" in note for note in done.notes)
    assert pared.load(done.path).config.model_type == "baichuan_alibi"


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    old, new = VARIANTS["glm-4-9b"].write(tmp_path / "old"), tmp_path / "new"
    done = command("import", old, "-o", new)
    assert done.code == 0 and done.out == f"{new}\n" and "'glm'" in done.err
    assert command("import", old, "-o", new).code == 2
    again = command("import", old, "-o", new, "--overwrite", "--format", "json")
    assert json.loads(again.out)["model_type"] == "glm"
    assert command("verify", new).code == 0
    assert command("inspect", new).code == 0

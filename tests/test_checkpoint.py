"""Reading and writing checkpoints: what is written is what is read, whatever the sharding and the dtype."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pared.checkpoint import INDEX, SINGLE, Checkpoint
from pared.errors import MissingError, ModelError
from pared.tensorfile import DTYPES
from pared.verify import verify
from pared.writer import CheckpointWriter
from written import SRC, content, run_python, some_tensors, write


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# -- round trip ------------------------------------------------------------------------------------------------------

FLOATS = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
ANY = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool, torch.float64])
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SHAPES, FLOATS | ANY), min_size=1, max_size=12), st.integers(1, 400))
def test_what_is_written_is_what_is_read(specs: list[tuple[list[int], torch.dtype]], limit: int) -> None:
    tensors = {f"t.{i}": (torch.randn(shape) * 9).to(dtype) for i, (shape, dtype) in enumerate(specs)}
    with tempfile.TemporaryDirectory() as folder:
        out = write(Path(folder) / "out", tensors, max_shard_bytes=limit)
        with Checkpoint.open(out) as checkpoint:
            assert set(checkpoint.tensors) == set(tensors)
            assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())
            assert checkpoint.num_parameters == sum(t.numel() for t in tensors.values())
            for name, want in tensors.items():
                got, info = checkpoint.read(name), checkpoint.tensors[name]
                assert got.dtype == want.dtype and got.shape == want.shape and bits(got) == bits(want)
                assert (info.shape, info.nbytes, DTYPES[info.dtype]) == (tuple(want.shape), want.nbytes, want.dtype)
        # The reference implementation reads the same from every shard.
        read = {k: v for f in checkpoint.files for k, v in load_file(out / f).items()}
        assert {k: bits(v) for k, v in read.items()} == {k: bits(v) for k, v in tensors.items()}
        for file in checkpoint.files:
            of_file = [t.nbytes for t in checkpoint.tensors.values() if t.file == file]
            assert sum(of_file) <= limit or len(of_file) == 1


def test_a_single_shard_has_no_index_and_many_have_one(tmp_path: Path) -> None:
    tensors = some_tensors()
    one = write(tmp_path / "one", tensors)
    assert sorted(p.name for p in one.iterdir()) == ["config.json", "manifest.json", SINGLE]
    many = write(tmp_path / "many", tensors, max_shard_bytes=2 * 256)
    shards = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in many.iterdir()) == ["config.json", "manifest.json", *shards, INDEX]
    index = json.loads((many / INDEX).read_text())
    assert index["metadata"] == {"total_parameters": 6 * 128, "total_size": 6 * 256}
    assert {f: sorted(n for n, g in index["weight_map"].items() if g == f) for f in shards} == {
        f: sorted(safe_open(many / f, "pt").keys()) for f in shards
    }
    assert safe_open(many / shards[0], "pt").metadata() == {"format": "pt"}


def test_the_order_of_adding_does_not_change_the_bytes(tmp_path: Path) -> None:
    tensors = {**some_tensors(), "norm": torch.randn(3), "odd": torch.randn(5).to(torch.float16)}
    backwards = dict(reversed(list(tensors.items())))
    assert content(write(tmp_path / "a", tensors)) == content(write(tmp_path / "b", backwards))


def test_a_tensor_is_taken_as_it_is_when_added(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    want = {"t": base.T.clone(), "part": base[1:3, ::2].clone(), "whole": base.clone(), "again": base.clone()}
    with CheckpointWriter(tmp_path / "out") as writer:
        for name, tensor in {"t": base.T, "part": base[1:3, ::2], "whole": base, "again": base}.items():
            writer.add(name, tensor)
        base.zero_()
        writer.add_file("config.json", "{}")
        writer.commit()
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(checkpoint.read(k), v) for k, v in want.items())


def test_transformers_reads_it_as_its_own(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    model = LlamaForCausalLM(config).bfloat16()
    with CheckpointWriter(tmp_path / "out", max_shard_bytes=10_000) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)
        writer.add_file("config.json", config.to_json_string())
        writer.commit()
    loading: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    loaded, info = loading
    assert not any(info.values())
    assert {k: bits(v) for k, v in loaded.state_dict().items()} == {k: bits(v) for k, v in model.state_dict().items()}
    assert verify(tmp_path / "out") == []


def test_read_gives_a_private_copy_and_slice_a_part(tmp_path: Path) -> None:
    tensors = some_tensors()
    out = write(tmp_path / "out", tensors)
    with Checkpoint.open(out) as checkpoint:
        name = "layer.3.weight"
        checkpoint.read(name).zero_()
        assert torch.equal(checkpoint.read(name), tensors[name])
        assert torch.equal(checkpoint.slice(name)[2:5], tensors[name][2:5])
        with pytest.raises(ModelError, match=r"layer\.9"):
            checkpoint.read("layer.9.weight")


def test_reading_leaves_no_mapping_behind(tmp_path: Path) -> None:
    out = write(tmp_path / "out", some_tensors())
    checkpoint = Checkpoint.open(out)
    kept = checkpoint.read("layer.0.weight")
    assert str(out) not in Path("/proc/self/maps").read_text()
    assert kept.isfinite().all()


def test_memory_while_writing_is_one_tensor_not_a_shard(tmp_path: Path) -> None:
    code = (
        "import sys, resource, torch\nfrom pared.writer import CheckpointWriter\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak()\n"
        "with CheckpointWriter(sys.argv[1]) as w:\n"
        "    for i in range(60): w.add(f't{i}', torch.full((1024, 1024), float(i)))\n"
        "    w.commit()\n"
        "print(peak() - before)"
    )
    process = run_python(code, tmp_path / "out")
    out, err = process.communicate()
    assert process.returncode == 0, err
    # 240 MiB in tensors of 4 MiB.
    assert int(out) < 60


# -- digest, side files, hub -----------------------------------------------------------------------------------------


def test_the_digest_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    tensors = some_tensors()
    one, two = write(tmp_path / "one", tensors), write(tmp_path / "two", tensors)
    digest = Checkpoint.open(one).digest()
    assert Checkpoint.open(two).digest() == digest
    (two / "README.md").write_text("words")
    assert Checkpoint.open(two).digest() == digest
    for file in ("config.json", SINGLE):
        changed = write(tmp_path / f"changed-{file}", tensors)
        data = bytearray((changed / file).read_bytes())
        data[-3] ^= 1
        (changed / file).write_bytes(data.replace(b"llame", b"llamb"))
        if file == "config.json":
            (changed / file).write_text('{"model_type": "mistral"}')
        assert Checkpoint.open(changed).digest() != digest


def test_side_files_are_what_a_copy_needs_and_nothing_else(tmp_path: Path) -> None:
    out = write(tmp_path / "out", some_tensors())
    carried = [
        *(
            "LICENSE",
            "LICENSE.txt",
            "NOTICE",
            "added_tokens.json",
            "chat_template.jinja",
            "generation_config.json",
            "merges.txt",
        ),
        *(
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "vocab.json",
            "qwen.tiktoken",
        ),
    ]
    left = [
        "README.md",
        "plan.json",
        "recipe.yaml",
        "training_args.bin",
        "optimizer.pt",
        "modeling_x.py",
        "notes.txt",
        ".gitattributes",
    ]
    for name in carried + left:
        (out / name).write_text(name)
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    files = Checkpoint.open(out).side_files()
    assert [p.name for p in files] == [*sorted(carried), "tool_use.jinja"]
    assert "modeling_x.py" in [p.name for p in Checkpoint.open(out, trust_remote_code=True).side_files()]
    with CheckpointWriter(tmp_path / "copy", source=out) as writer:
        writer.add("t", torch.zeros(1))
        for p in files:
            writer.copy_file(p)
        writer.commit()
    for p in files:
        assert (tmp_path / "copy" / p.relative_to(out)).read_bytes() == p.read_bytes()


def test_a_hub_id_is_read_from_the_cache_when_offline(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--someone--tiny"
    model = write(tmp_path / "model", some_tensors())
    snapshot = repo / "snapshots" / ("0" * 40)
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for p in model.iterdir():
        blob = repo / "blobs" / hashlib.sha256(p.read_bytes()).hexdigest()
        p.rename(blob)
        (snapshot / p.name).symlink_to(Path("../../blobs") / blob.name)
    code = (
        "import sys\nfrom pared.checkpoint import Checkpoint\nfrom pared.errors import MissingError\n"
        "print(len(Checkpoint.open('someone/tiny').tensors))\n"
        "try: Checkpoint.open('someone/absent')\n"
        "except MissingError as error: print(error.exit_code)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SRC), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert process.stdout.split() == ["6", "4"], process.stderr


def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    for model in (tmp_path / "absent", str(tmp_path / "absent"), "./absent", "a/b/c"):
        with pytest.raises(ModelError, match="no such model directory"):
            Checkpoint.open(model)
    with pytest.raises(MissingError):
        Checkpoint.open("not a valid id")

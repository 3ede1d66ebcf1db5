"""Reading tensors a slice at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pared import tensorfile
from pared.tensorfile import read_header, read_tensor


@pytest.mark.parametrize("slice_bytes", [8, 24, 1 << 20])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_read_in_slices_is_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slice_bytes: int, dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(tensorfile, "CHUNK", slice_bytes)
    tensors = {
        "a": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)),
        "b": torch.randn(3, 3, 2, generator=torch.Generator().manual_seed(1)).bfloat16(),
        "n": torch.arange(11),
        "none": torch.zeros(0, 4),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    for name, info in read_header(path, path.name).items():
        raw: list[bytes] = []
        got = read_tensor(path, info, dtype, lambda view, part, raw=raw: raw.append(bytes(view)))
        want = tensors[name].to(dtype) if dtype and tensors[name].is_floating_point() else tensors[name]
        assert got.dtype == want.dtype and torch.equal(got, want)
        assert b"".join(raw) == path.read_bytes()[info.offset : info.offset + info.nbytes]
        assert all(len(part) <= slice_bytes for part in raw)

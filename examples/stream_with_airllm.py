"""Generate from a checkpoint, uniform or per-layer, with airllm: one layer at a time is in memory, read from disk for each token.

    python examples/stream_with_airllm.py MODEL --prompt "Once upon a time" [--tokens 40]

Needs `pip install airllm`. airllm splits the weights into files beside the checkpoint, so it is given a copy, in a
temporary folder or in --copy DIR, which is kept for the next time. On a CPU it wants fp32 and no prefetching. airllm
takes weights of any shape without a word: the checkpoint is verified first.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer

from pared.verify import verify


@contextlib.contextmanager
def copied(model: Path, copy: Path | None) -> Iterator[Path]:
    """The folder that airllm may write into."""
    if copy is not None:
        if not copy.exists():
            shutil.copytree(model, copy)
        yield copy
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(model, Path(folder) / "model"))


def stream(folder: Path, ids: list[int], count: int) -> list[int]:
    """The greedy continuation of a prompt. folder: a copy of the checkpoint, which airllm adds files to."""
    from airllm import AutoModel

    with contextlib.redirect_stdout(sys.stderr):
        model = AutoModel.from_pretrained(str(folder), device="cpu", dtype=torch.float32, prefetching=False)
        row = torch.tensor([ids])
        out = model.generate(row, max_new_tokens=count, do_sample=False, use_cache=True, return_dict_in_generate=True)
    return out.sequences[0, len(ids) :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--copy", type=Path)
    args = parser.parse_args()
    if problems := verify(args.model):
        sys.exit("\n".join(f"{p.where}: {p.what}" for p in problems))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(args.prompt)["input_ids"]
    with copied(args.model, args.copy) as folder:
        print(args.prompt + tokenizer.decode(stream(folder, ids, args.tokens), skip_special_tokens=True))


if __name__ == "__main__":
    main()

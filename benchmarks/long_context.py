"""Long context of pruned models against quantised ones: loss and KL by position, keys found again, bytes, cache.

    python benchmarks/long_context.py MODEL --text TEST --calibration TRAIN --out benchmarks/results/long-context

Every row is a GGUF file that llama.cpp runs (cache in fp32), so bytes are those of files and all rows go through the same code; but
torchao's int8 and bitsandbytes' NF4 weights, which transformers runs, and whose bytes are those of the tensors held.
KL is to MODEL in fp32 in transformers. Pruned rows are stored as fp16, unless the row says otherwise. One thread.

Writes OUT.md, OUT.json and two plots. Each row is noted in OUT.partial.jsonl as it ends, and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from long_context_report import write
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import pared
from pared.calibration import inference
from pared.errors import ParedError
from pared.evaluate.long_context import by_position, edges, found, make_needles
from pared.evaluate.perplexity import Logits, logits_of, windows
from pared.evaluate.report import Subject
from pared.export import export_gguf
from pared.export.llamacpp import Engine

DEPTHS = (0.0, 0.5, 1.0)
UNIFORM: dict[str, Any] = {"shape": "uniform"}
PER_LAYER: dict[str, Any] = {"shape": "per-layer", "allocate": "global"}
DEPTH: dict[str, Any] = {"shape": "uniform", "structures": ("layer",)}


@dataclass(frozen=True)
class Row:
    """One way to make the model smaller: what is removed, and what the rest is stored as."""

    name: str
    remove: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    stored: str = "f16"


ROWS = [
    Row("dense"),
    Row("dense, Q8_0", stored="q8_0"),
    Row("dense, torchao int8", stored="int8"),
    Row("dense, Q4_0", stored="q4_0"),
    Row("dense, Q4_K_M", stored="q4_k_m"),
    Row("dense, NF4", stored="nf4"),
    *(Row(f"uniform {share:.0%}", share, UNIFORM) for share in (0.1, 0.2, 0.3, 0.5)),
    *(Row(f"per-layer {share:.0%}", share, PER_LAYER) for share in (0.1, 0.3, 0.5)),
    *(Row(f"layers {share:.0%}", share, DEPTH) for share in (0.15, 0.3, 0.5)),
    Row("uniform 20%, Q8_0", 0.2, UNIFORM, "q8_0"),
    Row("per-layer 30%, Q8_0", 0.3, PER_LAYER, "q8_0"),
    Row("uniform 20%, Q4_0", 0.2, UNIFORM, "q4_0"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="held-out text, .txt or .jsonl")
    parser.add_argument("--calibration", required=True, help="text for pruning, .txt or .jsonl")
    parser.add_argument("--out", type=Path, required=True, help="results, without an ending")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument(
        "--longest", type=int, help="tokens of a window, and of the longest sequence with keys; by default twice the trained"
    )
    parser.add_argument("--needles", type=int, default=8)
    parser.add_argument("--rows", default="", help="a semicolon-separated part of the table, in this order; by default all")
    parser.add_argument("--minutes", type=float, default=14, help="begin no row after this time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun, journal = time.monotonic(), args.out.with_suffix(".partial.jsonl")
    noted = {r["name"]: r for r in map(json.loads, journal.read_text().splitlines())} if journal.exists() else {}
    task = Task.make(args)
    with tempfile.TemporaryDirectory() as folder:
        wanted = [r for name in args.rows.split(";") for r in ROWS if r.name == name] or ROWS
        for row in wanted:
            if row.name in noted:
                continue
            if time.monotonic() - begun > 60 * args.minutes:
                print("time is up: run the command again for the rest", file=sys.stderr)
                break
            try:
                noted[row.name] = task.measure(row, Path(folder))
            except (ParedError, ImportError) as error:
                print(f"{row.name}: left out: {error}", file=sys.stderr)
                continue
            with journal.open("a") as stream:
                stream.write(json.dumps(noted[row.name]) + "\n")
            print(f"{row.name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    record = {**task.protocol(), "rows": [noted[r.name] for r in ROWS if r.name in noted]}
    write(record, args.out)


@dataclass
class Task:
    """The same windows and needles for every row, and what the dense model makes of the windows."""

    args: argparse.Namespace
    trained: int
    ids: Tensor
    needles: list[Any]
    reference: list[Tensor]

    @classmethod
    def make(cls, args: argparse.Namespace) -> Task:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        trained = Subject.open(args.model).max_positions or 0
        longest = args.longest or 2 * trained
        cut = windows(args.text, tokenizer, longest)
        ids = cut.ids[: args.windows]
        filler = cut.ids[args.windows :].flatten()
        lengths = (trained // 4, trained, longest)
        asked = [make_needles(tokenizer, filler, n, d, count=args.needles) for n in lengths for d in DEPTHS]
        dense = logits_of(pared.load(args.model, dtype=torch.float32))
        return cls(args, trained, ids, asked, [dense(row[None]) for row in ids])

    def protocol(self) -> dict[str, Any]:
        return {
            "model": self.args.model.name,
            "text": self.args.text.name,
            "calibration": Path(self.args.calibration).name,
            "samples": self.args.samples,
            "trained": self.trained,
            "windows": list(self.ids.shape),
            "needles": self.args.needles,
        }

    def dense(self, ids: Tensor) -> Tensor:
        return next(p for row, p in zip(self.ids, self.reference, strict=True) if torch.equal(row, ids[0]))

    def measure(self, row: Row, folder: Path) -> dict[str, Any]:
        source = self._pruned(row, folder)
        with _opened(row, source, folder, self.ids.shape[1]) as (logits, nbytes):
            ends = edges(self.trained, self.ids.shape[1])
            buckets = by_position(logits, self.ids, ends, against=self.dense)
            hits = [{"length": n.length, "depth": n.depth, "found": found(logits, n) / len(n.ids)} for n in self.needles]
        counts = Subject.open(source).counts
        return {
            "name": row.name,
            "params": counts.params,
            "bytes": nbytes,
            "kv_cache_per_token": counts.kv_cache,
            "positions": [{**vars(b), "perplexity": b.perplexity} for b in buckets],
            "retrieval": hits,
        }

    def _pruned(self, row: Row, folder: Path) -> Path:
        """The checkpoint of a row; made once for all that share it."""
        if not row.remove:
            return self.args.model
        out = folder / f"{row.settings['shape']}-{'layer' if 'structures' in row.settings else 'width'}-{row.remove}"
        if not out.exists():
            how = {"of": "block-params", "calibration": self.args.calibration, "samples": self.args.samples, "seq_len": 256}
            align = {} if "structures" in row.settings else {"align": 32}
            pared.prune(self.args.model, out=out, remove=row.remove, **how, **align, **row.settings)
        return out


@contextmanager
def _opened(row: Row, source: Path, folder: Path, length: int) -> Iterator[tuple[Logits, int]]:
    """A model as a function from ids to logits, and the bytes of its weights."""
    if row.stored in ("int8", "nf4"):
        model = {"int8": _int8, "nf4": _nf4}[row.stored](source, folder)
        with inference(model):
            yield logits_of(model), _held(model)
        return
    done = export_gguf(source, folder / "row.gguf", quantize=row.stored, overwrite=True)
    with Engine(done.path, context=length) as engine:
        yield engine.logits, done.nbytes


def _int8(source: Path, folder: Path) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = pared.load(source, dtype=torch.float32).requires_grad_(False)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def _nf4(source: Path, folder: Path) -> Any:
    copy = Path(shutil.copytree(source, folder / "nf4", dirs_exist_ok=True))
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(copy, quantization_config=how, dtype=torch.float32, device_map="cpu").eval()


def _held(model: Any) -> int:
    """Bytes of the weights that a live model holds, as fp16 where they are floating point and not quantised."""
    flat: dict[int, Tensor] = {}

    def add(tensor: Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__") and type(tensor) is not torch.nn.Parameter:
            for name in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, name))
            return
        flat[tensor.data_ptr()] = tensor
        if (state := getattr(tensor, "quant_state", None)) is not None:
            add(state.absmax)
            add(state.code)

    for parameter in model.parameters():
        add(parameter.data if type(parameter.data) is not Tensor else parameter)
    return sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in flat.values())


if __name__ == "__main__":
    main()

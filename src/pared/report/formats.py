"""Which quantised formats take the matrices of a model as they are, and which --align makes them fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from pared import modeling
from pared.per_layer import PerLayer
from pared.structure import Layout


@dataclass(frozen=True)
class Format:
    """A quantised form of weights: what the input and the output side of every matrix must be multiples of."""

    name: str
    inputs: int
    outputs: int


# From the code of each: torchao takes any shape, and bitsandbytes does but on a CPU with AVX-512 BF16, where it packs blocks
# of 64 in rows of 32; vLLM's CUTLASS kernels for int8 and fp8 (16 x 16), its W4A16 kernels on a CPU (32 x 32) and Marlin on a
# GPU (128 x 64, which is also the usual group); ggml's blocks.
FORMATS = (
    Format("int8 (torchao), NF4 (bitsandbytes)", 1, 1),
    Format("NF4 (bitsandbytes) on a CPU with AVX-512 BF16", 64, 32),
    Format("W8A8, FP8 in vLLM", 16, 16),
    Format("W4A16 in vLLM on a CPU", 32, 32),
    Format("W4A16 in groups of 128 (GPTQ, AWQ; Marlin)", 128, 64),
    Format("GGUF Q8_0, Q4_0", 32, 1),
    Format("GGUF K-quants", 256, 1),
)


def formats(config: PreTrainedConfig, per_layer: PerLayer, layout: Layout) -> list[dict[str, Any]]:
    """For each format whether all matrices of the blocks fit, and of those that do not, how many and the first.

    align: the alignment of FFN channels with which they would; None where the misfit lies in heads or the hidden size,
    which no alignment of channels mends.
    """
    found = list(_matrices(config, per_layer))
    hidden = layout.sizes["hidden"]
    out: list[dict[str, Any]] = []
    for form in FORMATS:
        bad = [(n, i, o) for n, i, o in found if i % form.inputs or o % form.outputs]
        heads = any({"kv", "query"} & layout.tensors[n].axes for n, _, _ in bad if n in layout.tensors)
        mended = not heads and hidden % form.inputs == hidden % form.outputs == 0
        out.append(
            {
                "format": form.name,
                "inputs": form.inputs,
                "outputs": form.outputs,
                "fits": not bad,
                "misfits": len(bad),
                "first": None if not bad else f"{bad[0][0]} ({bad[0][1]} to {bad[0][2]})",
                "align": math.lcm(form.inputs, form.outputs) if bad and mended else None,
            }
        )
    return out


def _matrices(config: PreTrainedConfig, per_layer: PerLayer) -> Iterator[tuple[str, int, int]]:
    """(name, input size, output size) of every matrix of the blocks that a quantiser takes."""
    model = modeling.skeleton(config, per_layer)
    prefix, blocks = modeling.blocks(model)
    for i, block in enumerate(blocks):
        for name, module in block.named_modules():
            for leaf, weight in module.named_parameters(recurse=False):
                if weight.ndim < 2:
                    continue
                outputs, inputs = weight.shape[-2:]
                if type(module).__name__ == "Conv1D":  # transformers' transposed linear
                    inputs, outputs = outputs, inputs
                elif not isinstance(module, nn.Linear) and weight.ndim == 2:
                    continue  # routers and tables, which are not quantised
                yield f"{prefix}.{i}.{name}.{leaf}".replace("..", "."), inputs, outputs

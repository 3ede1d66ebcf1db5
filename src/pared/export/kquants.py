"""K-quants by llama.cpp's own quantiser, through llama-cpp-python: the package gguf can read them and not make them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from pared.errors import MissingError, ModelError
from pared.export.llamacpp import hush


def require() -> Any:
    """The bindings of llama.cpp. MissingError where they are not installed."""
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingError(
            "K-quants are made by llama.cpp itself, and llama-cpp-python is not installed",
            fix="pip install llama-cpp-python, or --quantize q8_0 or q4_0, which need nothing more",
        ) from error
    return llama_cpp


def quantize(library: Any, source: Path, out: Path, file_type: int) -> None:
    """Quantise a GGUF file into another one. ModelError where llama.cpp refuses, with the last that it said."""
    said: list[str] = []

    @library.llama_log_callback
    def hear(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        said.append(text.decode(errors="replace").strip())

    library.llama_log_set(hear, ctypes.c_void_p(0))
    try:
        parameters = library.llama_model_quantize_default_params()
        parameters.ftype = file_type
        parameters.allow_requantize = True  # bf16 counts as quantised
        failed = library.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
    finally:
        hush(library)
    if failed:
        reason = next((s for s in reversed(said) if s), "no reason given")
        raise ModelError(f"llama.cpp does not quantise this: {reason}", where=out, fix="use --quantize q8_0 or q4_0")

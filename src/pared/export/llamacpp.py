"""A GGUF file run by llama.cpp itself, through llama-cpp-python: logits of given tokens, greedy continuation, the tokenizer."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from pared.errors import MissingError, ModelError

_F32, _F16 = 0, 1  # ggml's numbers of the types that the cache can have


class Engine:
    """A loaded model and one context. exact: the key-value cache in fp32; else in fp16, as llama.cpp has it by default."""

    def __init__(self, path: str | Path, *, context: int = 512, threads: int = 1, exact: bool = True) -> None:
        self.lib = _library()
        self.lib.llama_backend_init()
        hush(self.lib)
        model_options = self.lib.llama_model_default_params()
        model_options.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), model_options)
        if not self.model:
            raise ModelError("llama.cpp does not load this file", where=path, fix="export it again")
        options = self.lib.llama_context_default_params()
        options.n_ctx = options.n_batch = context
        options.n_ubatch = min(context, 512)
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = _F32 if exact else _F16
        options.flash_attn_type = 0
        options.no_perf = True
        self.context = self.lib.llama_init_from_model(self.model, options)
        if not self.context:
            self.lib.llama_model_free(self.model)
            raise ModelError("llama.cpp makes no context for this file", where=path, fix="a smaller context")
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.size = int(self.lib.llama_vocab_n_tokens(self.vocab))
        self.batch = self.lib.llama_batch_init(context, 0, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def feed(self, ids: list[int], start: int, *, all_logits: bool) -> Tensor:
        """Tokens at positions start, start + 1, ... after what the cache holds -> their logits [s, vocab], or the last's [1, vocab]."""
        self.batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i] = token, start + i, 1
            self.batch.seq_id[i][0] = 0
            self.batch.logits[i] = all_logits or i == len(ids) - 1
        if code := self.lib.llama_decode(self.context, self.batch):
            raise ModelError(f"llama.cpp can not run {len(ids)} tokens at position {start} (code {code})")
        rows = len(ids) if all_logits else 1
        out = ctypes.cast(self.lib.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float * (rows * self.size)))
        return torch.frombuffer(out.contents, dtype=torch.float32).view(rows, self.size).clone()

    def forget(self) -> None:
        """Empty the cache."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def logits(self, ids: Tensor) -> Tensor:
        """ids [b, s] -> logits [b, s, vocab], each row on its own."""
        out = []
        for row in ids.tolist():
            self.forget()
            out.append(self.feed(row, 0, all_logits=True))
        return torch.stack(out)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The most likely continuation, token by token."""
        self.forget()
        position, out, new = 0, [], ids
        for _ in range(count):
            choice = int(self.feed(new, position, all_logits=False)[0].argmax())
            position, new = position + len(new), [choice]
            out.append(choice)
        return out

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text, with those that the tokenizer puts around it."""
        raw = text.encode()
        buffer = (ctypes.c_int32 * (len(raw) + 16))()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), buffer, len(buffer), True, True)
        return list(buffer[: max(0, count)])


def _library() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingError(
            "GGUF files are run with llama-cpp-python, which is not installed", fix="pip install llama-cpp-python"
        ) from error
    return llama_cpp


_KEPT: list[Any] = []  # llama.cpp keeps the function's address, not the function


def hush(library: Any) -> None:
    """Let llama.cpp say nothing on stderr."""
    if not _KEPT:
        _KEPT.append(library.llama_log_callback(lambda level, text, data: None))
    library.llama_log_set(_KEPT[0], ctypes.c_void_p(0))

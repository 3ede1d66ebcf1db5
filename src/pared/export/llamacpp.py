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
    """A loaded model and one context. exact: the key-value cache in fp32; else in fp16, as llama.cpp has it by default.

    context: tokens of a sequence. sequences: how many may run at once, each with a cache of its own.
    """

    def __init__(
        self, path: str | Path, *, context: int = 512, sequences: int = 1, threads: int = 1, exact: bool = True
    ) -> None:
        self.lib = _library()
        self.lib.llama_backend_init()
        hush(self.lib)
        model_options = self.lib.llama_model_default_params()
        model_options.n_gpu_layers = 0
        # Its kernels for AMX crash on quantised weights (ggml-org/llama.cpp#20824); the others take them as they are stored.
        if b"AMX_INT8 = 1" in self.lib.llama_print_system_info():
            model_options.use_extra_bufts = False
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), model_options)
        if not self.model:
            raise ModelError("llama.cpp does not load this file", where=path, fix="export it again")
        options = self.lib.llama_context_default_params()
        options.n_ctx = options.n_batch = context * sequences
        options.n_seq_max = sequences
        options.n_ubatch = min(context * sequences, 512)
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
        self.batch = self.lib.llama_batch_init(context * sequences, 0, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def feed(self, ids: list[int], start: int, *, all_logits: bool) -> Tensor:
        """Tokens at positions start, start + 1, ... after what the cache holds -> their logits [s, vocab], or the last's [1, vocab]."""
        return self._decode([ids], start, all_logits=all_logits)

    def feed_together(self, rows: list[list[int]], start: int) -> Tensor:
        """As many tokens of each of several sequences, at positions start, start + 1, ... -> the last's logits [rows, vocab]."""
        return self._decode(rows, start, all_logits=False)

    def _decode(self, rows: list[list[int]], start: int, *, all_logits: bool) -> Tensor:
        """One batch of sequences 0, 1, ... of one length -> logits in the order in which they were asked for."""
        places = [(r, i, token) for r, ids in enumerate(rows) for i, token in enumerate(ids)]
        self.batch.n_tokens = len(places)
        for at, (row, i, token) in enumerate(places):
            self.batch.token[at], self.batch.pos[at], self.batch.n_seq_id[at] = token, start + i, 1
            self.batch.seq_id[at][0] = row
            self.batch.logits[at] = all_logits or i == len(rows[row]) - 1
        if code := self.lib.llama_decode(self.context, self.batch):
            raise ModelError(f"llama.cpp can not run {len(places)} tokens at position {start} (code {code})")
        count = len(places) if all_logits else len(rows)
        out = ctypes.cast(self.lib.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float * (count * self.size)))
        return torch.frombuffer(out.contents, dtype=torch.float32).view(count, self.size).clone()

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

"""A GGUF model in llama.cpp: weights, tokenizer, identity."""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from sae.errors import LlamaError, ShapeError

from ..chat import ChatTemplate
from . import amx, identity
from .log import log_tail
from .symbols import lc
from .truncated import first_blocks

if TYPE_CHECKING:
    from .graph import GraphMap
    from .session import Session
    from .unembed import Unembedding

_log = logging.getLogger(__name__)


class Model:
    """The weights of one GGUF file. Use it as a context manager; closing it closes its sessions.

    `n_gpu_layers` is passed to llama.cpp (-1: all; without a GPU it changes nothing). `progress` gets the share
    loaded, 0 to 1. FormatError for a file that is missing, truncated or not GGUF; LlamaError with llama.cpp's own
    words when it cannot load it.

    `blocks`: load only so many of the first blocks (0: all), for captures that stop there; there are no logits then,
    and the file is read, not mapped. Where that cannot be had (truncated.py) all are loaded, which is logged.
    `blocks` says what was loaded; `id` and `n_layer` stay those of the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_gpu_layers: int = 0,
        use_mmap: bool = True,
        blocks: int = 0,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self._handle: Any = None
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self.path = Path(path)
        self.id = identity.model_id(self.path)
        self.offloads: bool = n_gpu_layers != 0 and lc.llama_supports_gpu_offload()
        loading = _Loading(self.path, n_gpu_layers, use_mmap, progress)
        if 0 < blocks < self.id.n_layer:
            self._handle = _load_first(loading, self.id.architecture, blocks)
        self.truncated = self._handle is not None
        if not self.truncated:
            self._handle = loading.load()
        self._vocab = lc.llama_model_get_vocab(self._handle)
        self.n_embd: int = lc.llama_model_n_embd(self._handle)
        self.blocks: int = lc.llama_model_n_layer(self._handle)
        self.n_layer: int = self.id.n_layer if self.truncated else self.blocks
        self.n_vocab: int = lc.llama_vocab_n_tokens(self._vocab)
        self.n_ctx_train: int = lc.llama_model_n_ctx_train(self._handle)
        self.bos = _token_or_none(lc.llama_vocab_bos(self._vocab))
        self.eos = _token_or_none(lc.llama_vocab_eos(self._vocab))
        self.add_bos = bool(lc.llama_vocab_get_add_bos(self._vocab))

    @property
    def handle(self) -> Any:
        """llama.cpp's pointer; LlamaError once closed."""
        if self._handle is None:
            raise LlamaError(f"the model {self.path.name} is closed")
        return self._handle

    def tokenize(self, data: bytes | str, *, parse_special: bool = False) -> np.ndarray:
        """Token ids (T,) int32 of UTF-8 text, never with BOS. Special tokens spelled out stay text unless parsed.

        Bytes that are not UTF-8 become U+FFFD, as llama.cpp reads them: the pieces then differ from the input.
        """
        text = data.encode("utf-8") if isinstance(data, str) else bytes(data)
        if self._handle is None:
            raise LlamaError(f"the model {self.path.name} is closed")
        capacity = len(text) + 8
        tokens_T = np.empty(capacity, np.int32)
        pointer = ctypes.cast(tokens_T.ctypes.data, lc.llama_token_p)
        count = lc.llama_tokenize(self._vocab, text, len(text), pointer, capacity, False, parse_special)
        if count < 0:
            tokens_T = np.empty(-count, np.int32)
            pointer = ctypes.cast(tokens_T.ctypes.data, lc.llama_token_p)
            count = lc.llama_tokenize(self._vocab, text, len(text), pointer, -count, False, parse_special)
        if count < 0:
            raise LlamaError(f"llama.cpp cannot tokenise {len(text)} bytes of text")
        return tokens_T[:count].copy()

    def piece(self, token: int) -> bytes:
        """The bytes of one token; special tokens as they are spelled."""
        token = self._checked(token)
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = lc.llama_token_to_piece(self._vocab, token, buffer, size, 0, True)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def is_special(self, token: int) -> bool:
        """A control token (BOS, end of text, chat markers), not text."""
        token = self._checked(token)
        return bool(lc.llama_vocab_is_control(self._vocab, token) or lc.llama_vocab_is_eog(self._vocab, token))

    def is_end(self, token: int) -> bool:
        """A token that ends a generation."""
        return bool(lc.llama_vocab_is_eog(self._vocab, self._checked(token)))

    @property
    def chat_template(self) -> str | None:
        """The template's text, as the file has it."""
        found = lc.llama_model_chat_template(self.handle, None)
        return found.decode("utf-8", "surrogateescape") if found else None

    def chat(self, messages: list[dict[str, str]], *, add_assistant: bool = True) -> str:
        """The messages in the model's own chat template, ready for the answer where asked for.

        LlamaError for a model without a template; ConfigError for a template that cannot be used, or that refuses them.
        """
        rendered = self._chat.render(messages, add_assistant=add_assistant)
        return rendered.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    @cached_property
    def _chat(self) -> ChatTemplate:
        if (text := self.chat_template) is None:
            raise LlamaError(f"{self.path.name} has no chat template; give a plain prompt")
        bos, eos = ("" if t is None else self.piece(t).decode("utf-8", "replace") for t in (self.bos, self.eos))
        return ChatTemplate(text, name=self.path.name, bos=bos, eos=eos)

    @cached_property
    def graph(self) -> GraphMap:
        """The graph without flash attention, where every hook point this model has exists."""
        from .session import Session

        with Session(self, n_ctx=64, n_threads=1, flash_attn="off") as session:
            return session.graph

    def hook_points(self) -> dict[str, str]:
        """Hook point -> ggml tensor, resolved on the graph without flash attention, in the order of computation."""
        return self.graph.hook_points()

    def unembed(self) -> Unembedding:
        """The final norm and the output matrix of this file, float32; read once."""
        return self._unembedding

    @cached_property
    def _unembedding(self) -> Unembedding:
        from .unembed import read_unembedding

        return read_unembedding(self.path)

    def adopt(self, session: Session) -> None:
        """Remember a session, to close it before the weights go."""
        self._sessions.add(session)

    def close(self) -> None:
        """Free the weights and every session on them; harmless when done before."""
        for session in list(self._sessions):
            session.close()
        if self._handle is not None:
            lc.llama_model_free(self._handle)
            self._handle = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def _checked(self, token: int) -> int:
        if not 0 <= int(token) < self.n_vocab:
            raise ShapeError(f"token {token} is outside the vocabulary of {self.n_vocab}")
        if self._handle is None:
            raise LlamaError(f"the model {self.path.name} is closed")
        return int(token)


def _token_or_none(token: int) -> int | None:
    return None if token < 0 else int(token)


class _Loading:
    """One way of loading a file."""

    def __init__(self, path: Path, n_gpu_layers: int, use_mmap: bool, progress: Callable[[float], None] | None) -> None:
        self.path, self.n_gpu_layers, self.use_mmap, self._progress = path, n_gpu_layers, use_mmap, progress

    def load(self, stream: int | None = None) -> Any:
        """llama.cpp's pointer, of the file or of a C stream; LlamaError, or what `progress` raised."""
        log_tail.install()
        log_tail.clear()
        lc.llama_backend_init()
        failure: list[BaseException] = []

        def report(share: float, _user_data: Any) -> bool:
            try:
                if self._progress is not None:
                    self._progress(float(share))
            except BaseException as error:  # noqa: BLE001 - a C callback: raised again below
                failure.append(error)
            return not failure

        params = lc.llama_model_default_params()
        params.n_gpu_layers = self.n_gpu_layers
        params.use_extra_bufts = amx.usable()
        mapped = self.use_mmap and stream is None
        params.load_mode = lc.LLAMA_LOAD_MODE_MMAP if mapped else lc.LLAMA_LOAD_MODE_NONE
        callback = lc.llama_progress_callback(report)
        params.progress_callback = callback
        if stream is None:
            handle = lc.llama_model_load_from_file(os.fsencode(self.path), params)
        else:
            handle = lc.llama_model_load_from_file_ptr(stream, params)
        if failure:
            if handle:
                lc.llama_model_free(handle)
            raise failure[0]
        if not handle:
            raise LlamaError(f"llama.cpp cannot load {self.path}: {log_tail.reason('no reason given')}")
        return handle


def _load_first(loading: _Loading, architecture: str, blocks: int) -> Any:
    """The first blocks alone, or None where only the whole file can be loaded."""
    try:
        with first_blocks(loading.path, architecture, blocks) as stream:
            return loading.load(stream)
    except (LlamaError, OSError) as error:
        _log.info("loading all blocks of %s, not the first %d: %s", loading.path.name, blocks, error)
        return None

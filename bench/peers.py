"""The other side, in the benchmark's own environment: HF forward hooks, TransformerLens, nnsight. No ggscope, no llama.cpp.

Each captures one residual stream the way its users do, and keeps what comes out in memory: it writes nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.common import forget_peak, peak_bytes, random_windows, resident_bytes, serve


class _Enough(Exception):
    pass


class Side(ABC):
    """A loaded model; `capture` gives the output of block `block` for (B, T) tokens, (B, T, D)."""

    vocab: int

    @abstractmethod
    def capture(self, tokens_BT: torch.Tensor, block: int, *, stop: bool) -> torch.Tensor: ...


def _hf(folder: str, dtype: str) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


class HuggingFace(Side):
    """A forward hook on the block; without the LM head, and with `stop` an exception out of the hook."""

    def __init__(self, folder: str, dtype: str) -> None:
        self.model = _hf(folder, dtype)
        self.vocab = self.model.config.vocab_size

    def capture(self, tokens_BT: torch.Tensor, block: int, *, stop: bool) -> torch.Tensor:
        kept: list[torch.Tensor] = []

        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)
            if stop:
                raise _Enough

        handle = self.model.model.layers[block].register_forward_hook(hook)
        try:
            with contextlib.suppress(_Enough):
                self.model.model(tokens_BT, use_cache=False)
        finally:
            handle.remove()
        return kept[0]


class TransformerLens(Side):
    """`run_with_cache` with one name and, with `stop`, `stop_at_layer`."""

    def __init__(self, folder: str, dtype: str) -> None:
        _add_tokenizer(folder)
        bridge = importlib.import_module("transformer_lens").TransformerBridge
        self.model = bridge.boot_transformers(folder, dtype=getattr(torch, dtype), device="cpu")
        self.vocab = self.model.cfg.d_vocab

    def capture(self, tokens_BT: torch.Tensor, block: int, *, stop: bool) -> torch.Tensor:
        name = f"blocks.{block}.hook_resid_post"
        more = {"stop_at_layer": block + 1} if stop else {"return_type": None}
        _, cache = self.model.run_with_cache(tokens_BT, names_filter=name, **more)
        return cache[name]


class NNSight(Side):
    """A trace that saves the block's output and, with `stop`, ends there."""

    def __init__(self, folder: str, dtype: str) -> None:
        model = _hf(folder, dtype)
        self.vocab = model.config.vocab_size
        self.model = importlib.import_module("nnsight").NNsight(model.model)

    def capture(self, tokens_BT: torch.Tensor, block: int, *, stop: bool) -> torch.Tensor:
        with self.model.trace(tokens_BT, use_cache=False) as tracer:
            kept = self.model.layers[block].output.save()
            if stop:
                tracer.stop()
        return kept[0] if isinstance(kept, tuple) else kept


def _add_tokenizer(folder: str) -> None:
    """TransformerLens wants one in the model's folder; no text is read here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)


SIDES: dict[str, Callable[[str, str], Side]] = {
    "hf": HuggingFace,
    "transformerlens": TransformerLens,
    "nnsight": NNSight,
}
loaded: dict[str, Any] = {}


def load(library: str, folder: str, dtype: str, threads: int) -> dict[str, Any]:
    """Read the model; then the memory it took is that above the imports."""
    torch.set_num_threads(threads)
    importlib.import_module({"hf": "transformers", "transformerlens": "transformer_lens"}.get(library, library))
    from transformers import LlamaForCausalLM  # noqa: F401 - counted as an import

    forget_peak()
    loaded["imports"] = resident_bytes()
    loaded["side"] = SIDES[library](folder, dtype)
    return {"vocab": loaded["side"].vocab}


def save_as(folder: str, out: str, dtype: str) -> dict[str, Any]:
    """The model with its weights in `dtype`, as its users would have it on disk."""
    _hf(folder, dtype).save_pretrained(out)
    return {}


@torch.inference_mode()
def run(windows: int, context: int, batch: int, block: int, stop: bool, seed: int) -> dict[str, Any]:
    """Capture `windows` sequences, `batch` at a time; tokens/s."""
    side: Side = loaded["side"]
    tokens_BT = torch.from_numpy(random_windows(windows, context, side.vocab, seed))
    started = time.perf_counter()
    for start in range(0, windows, batch):
        side.capture(tokens_BT[start : start + batch], block, stop=stop)
    seconds = time.perf_counter() - started
    return {"tokens_per_s": windows * context / seconds}


@torch.inference_mode()
def activation(path: str, windows: int, context: int, block: int, stop: bool, seed: int) -> dict[str, Any]:
    """Write the values (rows, D) float32, sequence after sequence."""
    side: Side = loaded["side"]
    tokens_BT = torch.from_numpy(random_windows(windows, context, side.vocab, seed))
    values_BTD = side.capture(tokens_BT, block, stop=stop)
    np.save(path, values_BTD.float().numpy().reshape(windows * context, -1))
    return {}


def memory() -> dict[str, Any]:
    """Peak resident bytes since the imports, less those of the imports."""
    return {"bytes": peak_bytes() - loaded["imports"]}


if __name__ == "__main__":
    serve({"load": load, "save_as": save_as, "run": run, "activation": activation, "memory": memory})

"""What people use today, in the environment of `make bench-env` that has SAELens: HF transformers with a forward hook that
encodes, decodes and ranks with SAELens. No ggscope, no llama.cpp.

Shape letters: D width, F latents, K top-k.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

import numpy as np
import torch

from bench.common import serve

loaded: dict[str, Any] = {}


def load(folder: str, dtype: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    transformers = importlib.import_module("transformers")
    loaded["model"] = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    return {"transformers": transformers.__version__}


def sae(path: str, k: int, dtype: str) -> dict[str, Any]:
    """A TopK SAE of SAELens whose W_enc^T and W_dec are the (F, D) array in `path`, without biases."""
    module = importlib.import_module("sae_lens.saes.topk_sae")
    W_FD = torch.from_numpy(np.load(path)).to(getattr(torch, dtype))
    F, D = W_FD.shape
    coder = module.TopKSAE(module.TopKSAEConfig(d_in=D, d_sae=F, k=k, device="cpu", dtype=dtype))
    zeros = {"b_enc": torch.zeros(F), "b_dec": torch.zeros(D)}
    coder.load_state_dict({"W_enc": W_FD.T.contiguous(), "W_dec": W_FD, **zeros})
    loaded.update(sae=coder, k=k)
    return {"sae_lens": importlib.import_module("sae_lens").__version__}


@torch.inference_mode()
def generate(prompt: int, tokens_T: list[int], block: int, read: bool) -> dict[str, Any]:
    """Seconds of each of the tokens given after a prompt of `prompt`, and the last token's latents, strongest first."""
    model, found = loaded["model"], {}

    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        x_D = (output[0] if isinstance(output, tuple) else output)[0, -1]
        coder = loaded["sae"]
        x_D = x_D.to(coder.W_enc.dtype)
        acts_F = coder.encode(x_D[None])
        values_K, latents_K = acts_F[0].topk(loaded["k"])
        gap_D = x_D - coder.decode(acts_F)[0]
        found["fvu"] = float((gap_D * gap_D).sum())
        found["latents"], found["values"] = latents_K.tolist(), values_K.tolist()

    handle = model.model.layers[block].register_forward_hook(hook) if read else None
    try:
        start = torch.arange(3, 3 + prompt)[None]
        past = model(start, use_cache=True, logits_to_keep=1).past_key_values
        seconds = []
        for token in tokens_T:
            started = time.perf_counter()
            out = model(torch.tensor([[token]]), past_key_values=past, use_cache=True, logits_to_keep=1)
            int(out.logits[0, -1].argmax())
            seconds.append(time.perf_counter() - started)
    finally:
        if handle is not None:
            handle.remove()
    return {"seconds": seconds, **found}


if __name__ == "__main__":
    serve({"load": load, "sae": sae, "generate": generate})

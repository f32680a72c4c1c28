"""ReLU SAEs of two linear layers in one torch file, a = ReLU(W_enc x + b_enc), x_hat = W_dec a + b_dec:

goodfire      encoder_linear, decoder_linear: Goodfire's Llama 3.1 8B (block 19) and 3.3 70B (block 50)
r1_distill    encoder, decoder: qresearch's DeepSeek-R1-Distill-Llama-8B, the block is in the file's name
"""

from __future__ import annotations

from .building import Foreign, required
from .hook_names import layer_in, to_hook
from .source import Source

GOODFIRE_MODELS = {
    "Llama-3.1-8B-Instruct-SAE-l19": "meta-llama/Llama-3.1-8B-Instruct",
    "Llama-3.3-70B-Instruct-SAE-l50": "meta-llama/Llama-3.3-70B-Instruct",
}


class Goodfire:
    NAME = "goodfire"
    FILES = ()

    @staticmethod
    def recognises(source: Source) -> bool:
        return {"encoder_linear.weight", "decoder_linear.weight"} <= source.torch_names()

    @staticmethod
    def load(source: Source, hook: str = "", hook_out: str = "") -> Foreign:
        name = next((model for release, model in GOODFIRE_MODELS.items() if release in source.label), "")
        return _two_layers(source, hook, ("encoder_linear", "decoder_linear"), r"-SAE-l(\d+)", name)


class R1Distill:
    NAME = "r1_distill"
    FILES = ()

    @staticmethod
    def recognises(source: Source) -> bool:
        layers = {f"{layer}.{kind}" for layer in ("encoder", "decoder") for kind in ("weight", "bias")}
        return source.torch_names() == layers

    @staticmethod
    def load(source: Source, hook: str = "", hook_out: str = "") -> Foreign:
        name = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B" if "DeepSeek-R1-Distill-Llama-8B" in source.label else ""
        return _two_layers(source, hook, ("encoder", "decoder"), r"[-_.]l(\d+)(?:\D[^/]*)?\.pt", name)


def _two_layers(source: Source, hook: str, layers: tuple[str, str], pattern: str, model_name: str) -> Foreign:
    label, arrays, notes = source.label, source.arrays(), []
    encoder, decoder = layers
    layer = layer_in(source.named, pattern)
    return Foreign(
        W_enc_FD=required(arrays, f"{encoder}.weight", label, 2),
        b_enc_F=required(arrays, f"{encoder}.bias", label, 1),
        W_dec_FO=required(arrays, f"{decoder}.weight", label, 2).T,
        b_dec_O=required(arrays, f"{decoder}.bias", label, 1),
        hook=to_hook(f"blocks.{layer}.hook_resid_post" if layer else "", hook, label, notes),
        model_name=model_name,
        notes=notes,
    )

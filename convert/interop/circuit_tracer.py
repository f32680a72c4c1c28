"""Transcoders of circuit-tracer (one layer each; Dunefsky et al. 2406.11944): `layer_<L>.safetensors` beside `config.yaml`.

    a = ReLU(W_enc x + b_enc), or pre where pre > threshold,  y = W_dec^T a + b_dec (+ W_skip x)

W_enc (F, D), W_dec (F, O), `W_skip` (O, D), `activation_function.threshold` (F). x and y are the input and the output
of the MLP unless config.yaml says otherwise (`feature_input_hook`, `feature_output_hook`).
"""

from __future__ import annotations

from .building import Foreign, optional, required
from .hook_names import layer_in, to_hook
from .source import Source

NAME = "circuit_tracer"
CONFIG = "config.yaml"
KEYS = ("model_name", "feature_input_hook", "feature_output_hook")
FILES = (CONFIG,)
TENSORS = {"W_enc", "W_dec", "b_enc", "b_dec"}
# what a config calls the input and the output of a block's MLP, as a module's place
_MLP = {
    "mlp.hook_in": "mlp.input",
    "mlp.hook_out": "mlp.output",
    "hook_mlp_out": "mlp.output",
}
_LAYER = r"layer_(\d+)\.safetensors"


def recognises(source: Source) -> bool:
    if source.weights is None or not layer_in(source.weights.name, _LAYER):
        return False
    return set(source.arrays()) >= TENSORS


def load(source: Source, hook: str = "", hook_out: str = "") -> Foreign:
    label, arrays, settings = source.label, source.arrays(), source.yaml(CONFIG, *KEYS)
    layer = layer_in(source.weights.name if source.weights else "", _LAYER)
    notes: list[str] = []
    return Foreign(
        W_enc_FD=required(arrays, "W_enc", label, 2),
        b_enc_F=required(arrays, "b_enc", label, 1),
        W_dec_FO=required(arrays, "W_dec", label, 2),
        b_dec_O=required(arrays, "b_dec", label, 1),
        threshold_F=optional(arrays, "activation_function.threshold", label, 1),
        W_skip_OD=optional(arrays, "W_skip", label, 2),
        hook=to_hook(_place(settings.get("feature_input_hook", "mlp.hook_in"), layer), hook, label, notes),
        hook_out=to_hook(
            _place(settings.get("feature_output_hook", "mlp.hook_out"), layer),
            hook_out,
            label,
            notes,
            key="convert.hook_out",
        ),
        model_name=settings.get("model_name", ""),
        notes=notes,
    )


def _place(name: str, layer: str) -> str:
    if not layer:
        return ""
    return f"layers.{layer}.{_MLP[name]}" if name in _MLP else f"blocks.{layer}.{name}"

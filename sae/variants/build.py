"""From settings and the statistics of the rows to a model and its loss: what a training starts from.

Shape letters: N rows, W columns of a batch, D d_in, F latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..centre import geometric_median
from ..errors import ConfigError
from ..initial import scale_encoder_, share_above
from ..kernels import encoder_dtype, has_fast_step
from ..losses import LossSettings
from ..model import SparseCoder, input_scale, layer_normalise
from ..native.library import finds_in_int8
from ..options import WITHOUT_K
from ..pre_acts import finds_by_bounds
from ..steppers import pick_kernel
from ..train_config import TrainConfig
from ..weights import SAEWeights
from ..wiring import SAME, Wiring
from . import VARIANTS
from .jumprelu import JumpReLUSAE
from .start import load_start_


def needs_sample(config: TrainConfig) -> bool:
    """Whether `build` wants rows beside their mean and variance."""
    return config.options.input_norm == "layer" or config.options.b_dec_init == "geometric_median"


def build(
    config: TrainConfig,
    *,
    width: int,
    mean_D: np.ndarray,
    variance: float,
    generator: torch.Generator,
    device: torch.device,
    sample_ND: np.ndarray | None = None,
    start: SAEWeights | None = None,
    wiring: Wiring = SAME,
    variances: tuple[float, ...] = (),
    shard_: Callable[[SparseCoder], None] | None = None,
) -> tuple[SparseCoder, LossSettings]:
    """The model, where its weights start, and the settings of its loss.

    `sample_ND`: raw rows, for `needs_sample`. `start`: an SAE to go on from. With several hook points: the wiring, and
    E||x - mean||^2 at each of its ports. `shard_` leaves some of the latents, before the model goes to the device.

    Raises:
        ConfigError: settings that do not go together; a start that does not fit.
    """
    options = config.options
    if options.input_norm == "layer" and wiring.kind != "sae":
        raise ConfigError("input_norm=layer is for SAEs on one hook point")
    scale = scale_of(options.input_norm, width, variance, wiring, variances)
    scale_W = np.broadcast_to(np.asarray(scale, np.float64), (width,))
    target = wiring.target
    centre_W, target_variance = np.asarray(mean_D, np.float64), variance / float(scale_W[0]) ** 2
    if wiring.inputs:
        chosen = slice(len(wiring.inputs), None) if wiring.two_sided else slice(None)
        ports = zip(wiring.parts[chosen], variances[chosen], strict=True)
        target_variance = sum(v / float(scale_W[columns.start]) ** 2 for columns, v in ports)
    if options.input_norm == "layer":
        assert sample_ND is not None, "needs_sample said so"
        sample_ND = layer_normalise(torch.from_numpy(sample_ND.astype(np.float64)))[0].numpy()
        centre_W = sample_ND.mean(0)
        target_variance = float(((sample_ND - centre_W) ** 2).sum(1).mean())
    if options.b_dec_init == "geometric_median":
        assert sample_ND is not None, "needs_sample said so"
        centre_W = centre_W.copy()
        centre_W[target] = geometric_median((sample_ND / scale_W)[:, target]) * scale_W[target]
    arguments: dict[str, Any] = {"deviation": target_variance**0.5} if config.variant == "jumprelu" else {}
    model = VARIANTS[config.variant](
        d_in=width, num_latents=config.num_latents, k=config.k, mean_D=centre_W, scale=scale, generator=generator,
        options=options, wiring=wiring, **arguments,
    )  # fmt: skip
    if options.b_dec_init == "zero":
        torch.nn.init.zeros_(model.b_dec_D)
    if start is not None:
        load_start_(model, start)
    else:
        if config.init_scale or not wiring.two_sided:
            scale_encoder_(model, config.init_scale, first_active(config))
        if isinstance(model, JumpReLUSAE):
            model.start_thresholds_()
    if shard_ is not None:
        shard_(model)
    model = model.to(device)
    settings = LossSettings(
        variance=target_variance,
        auxk_k=config.auxk_k or max(1, model.W_dec_FD.shape[1] // 2),
        auxk_coef=config.auxk_coef,
        encoder_dtype=dtype_of(config, model, device),
        auxk_dtype=auxk_dtype_of(config, model, device),
    )
    return model, settings


def first_active(config: TrainConfig) -> float:
    """How many latents fire on a row when training starts: k, or those above the first threshold."""
    if config.variant not in WITHOUT_K:
        return config.k
    first = config.options.threshold_start if config.variant == "jumprelu" else 0.0
    return max(1.0, config.num_latents * share_above(first))


def scale_of(
    input_norm: str, width: int, variance: float, wiring: Wiring, variances: tuple[float, ...]
) -> float | np.ndarray:
    """One power of two for the activations, or one for each hook point over its columns; 1 where none is wanted."""
    found = input_scale(variance, width)  # refuses a variance that is not positive, whatever the mode
    if input_norm != "dataset":
        return 1.0
    if not wiring.inputs:
        return found
    ports = (*wiring.inputs, *wiring.outputs)
    if len(variances) != len(ports):
        raise ConfigError(f"expected a variance for each of the {len(ports)} hook points, got {len(variances)}")
    return np.concatenate([np.full(w, input_scale(v, w)) for (_, w), v in zip(ports, variances, strict=True)])


def dtype_of(config: TrainConfig, model: SparseCoder, device: torch.device) -> torch.dtype:
    """bfloat16 chooses latents only where the step has that choice; "auto" means float32 elsewhere."""
    if has_fast_step(model):
        kernel = pick_kernel(model, config, device)
        most_k = max(config.k, config.options.k_start)
        exact = (kernel == "native" and finds_in_int8(model, config)) or (
            kernel == "torch" and finds_by_bounds(model, most_k)
        )
        return encoder_dtype(config.encoder_dtype, device, float32_is_fast=exact)
    found = encoder_dtype("float32" if config.encoder_dtype == "auto" else config.encoder_dtype, device)
    if found != torch.float32:
        raise ConfigError(
            f"this {config.variant} SAE trains by autograd, in float32; use encoder_dtype=auto or float32"
        )
    return found


def auxk_dtype_of(config: TrainConfig, model: SparseCoder, device: torch.device) -> torch.dtype:
    """Like `dtype_of`, of AuxK's matrix products; there "auto" is bfloat16 wherever that is fast."""
    sparse = has_fast_step(model)
    name = "float32" if config.auxk_dtype == "auto" and not sparse else config.auxk_dtype
    found = encoder_dtype(name, device, key="auxk_dtype")
    if found != torch.float32 and not sparse:
        raise ConfigError(f"this {config.variant} SAE trains by autograd, in float32; use auxk_dtype=auto or float32")
    return found

"""`ggscope cvector`: latents, one or several, of one SAE or several at other blocks, as a stock llama.cpp control vector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convert.control_vector import read_control_vector, write_control_vector
from sae.errors import ConfigError
from sae.weights import SAEWeights

from ..config import CVectorConfig, DirectionConfig
from ..interventions.steer import Steer
from ..llama.hooks import HookPoint
from ..llama.model import Model
from ..run import RunContext, file_sha256
from .inputs import check_host, check_one_point, describe_model, load_sae, open_model, relative, sae_path, sae_sha256
from .sae_files import located

VECTOR_NAME = "control_vector.gguf"


def run(context: RunContext) -> None:
    config = context.config.cvector
    wanted = directions_of(config)
    own = Path() if all(one.sae for one in wanted) else sae_path(context)
    with open_model(context) as model:
        found = [resolved(context, model, one, own) for one in wanted]
        path = Path(config.out).expanduser() if config.out else context.folder / VECTOR_NAME
        vectors = summed(found)
        write_control_vector(path, vectors, model_hint=model.id.architecture, n_layer=model.n_layer)
        given = describe_model(model)
    context.outputs["control_vector"] = str(path)
    norms = {block: float(np.linalg.norm(vector_D)) for block, vector_D in sorted(read_control_vector(path).items())}
    context.metrics = {"latents": sum(len(one.latents) for one in wanted), "norms": norms}
    context.three_lines(
        f"{given}, {', '.join(item['path'] for item in context.inputs.values() if item is not context.inputs['model'])}",
        ", ".join(f"after block {block}: norm {norm:.3f}" for block, norm in norms.items()),
        f"{relative(path)} (sha256 {file_sha256(path)[:12]}): llama-cli -m MODEL --control-vector {relative(path)}",
    )


def directions_of(config: CVectorConfig) -> list[DirectionConfig]:
    """All that are summed. ConfigError where there is none, or not one coefficient for each latent."""
    own = [DirectionConfig(latents=config.latents, coeffs=config.coeffs)] if config.latents or config.coeffs else []
    wanted = [*own, *config.directions]
    if not wanted:
        raise ConfigError("expected latents: cvector.latents=[123] cvector.coeffs=[8]")
    for one in wanted:
        if not one.latents or len(one.latents) != len(one.coeffs):
            raise ConfigError(f"cvector: expected a coefficient for each latent, got {one.latents} and {one.coeffs}")
    return wanted


def resolved(context: RunContext, model: Model, one: DirectionConfig, own: Path) -> tuple[int, np.ndarray]:
    """The block and the direction of one sum; `own`: the SAE where none is named."""
    path = located(one.sae) if one.sae else own
    weights = load_sae(path, stored=True)
    check_one_point(weights, path)
    check_host(context, weights, model)
    context.add_input(f"sae:{path}", path, sae_sha256(path))
    return direction(weights, one.latents, one.coeffs, block=one.block)


def direction(
    weights: SAEWeights, latents: Sequence[int], coeffs: Sequence[float], *, block: int = -1
) -> tuple[int, np.ndarray]:
    """(block, sum_f coeffs_f W_dec[f] float32): what `intervention=steer` adds, bit for bit.

    The residual before a block is the output of the one before it. ConfigError for an SAE whose hook point is no
    block's output, unless `block` names one, and for layer norm.
    """
    point = HookPoint.parse(weights.hook)
    if weights.norm_mode != "none":
        raise ConfigError("a control vector is the same at every token, this SAE's latents are in units of its sigma")
    steer = Steer(point=point, weights=weights, latents=tuple(latents), coeffs=tuple(coeffs))
    return output_block(point, latents, coeffs) if block < 0 else block, steer.direction()


def output_block(point: HookPoint, latents: Sequence[int], coeffs: Sequence[float]) -> int:
    """The block whose output the hook point is. ConfigError for a point that is none, with the command for it."""
    if point.block is not None and point.site == "resid_post":
        return point.block
    if point.block and point.site == "resid_pre":
        return point.block - 1
    wanted = ",".join(
        f"{key}:[{','.join(map(str, numbers))}]" for key, numbers in (("latents", latents), ("coeffs", coeffs))
    )
    raise ConfigError(
        f"a control vector is added to a block's output, this SAE reads {point}; name the block: "
        f"ggscope cvector 'cvector.directions=[{{{wanted},block:{point.block or 1}}}]'"
    )


def summed(found: Sequence[tuple[int, np.ndarray]]) -> dict[int, np.ndarray]:
    """One float32 direction a block; several of a block are added in float64."""
    total: dict[int, np.ndarray] = {}
    for block, direction_D in found:
        total[block] = total.get(block, np.zeros(1)) + direction_D.astype(np.float64)
    return {block: vector_D.astype(np.float32) for block, vector_D in total.items()}

"""Whether the batches and SAEs that the settings ask for can be trained at all, said before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sae.errors import ConfigError
from sae.wiring import SAME, Wiring

from ..config import TrainerConfig

if TYPE_CHECKING:
    from sae.trainer import TrainConfig

MEMINFO = Path("/proc/meminfo")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container
ROW_COPIES = 4  # float32 arrays of all rows that every step holds at least: two batches, the reconstruction, its error
PAIR_FLOATS = 3  # a value and an index of 8 bytes
STATES = {"adam": 3, "signum": 3, "muon": 2}  # a parameter and what its optimizer keeps of it, float32; no gradients


def check_batch(trainer: TrainerConfig) -> None:
    """ConfigError for a batch of more rows than are trained on in all."""
    if trainer.batch_tokens > trainer.tokens:
        raise ConfigError(
            f"trainer.batch_tokens={trainer.batch_tokens} is more than trainer.tokens={trainer.tokens}, "
            "the rows trained on in all; lower one or raise the other"
        )


def check_memory(
    configs: Mapping[str, TrainConfig], d_in: int, *, wiring: Wiring = SAME, stays_here: bool = True
) -> None:
    """ConfigError for a batch or SAEs that alone are more than the memory there is: Linux would end the process without a word.

    `stays_here`: all SAEs are trained in this process' memory; else each is only made there, then goes to a GPU or
    is shared out among ranks.
    """
    batch, k = (max(getattr(config, key) for config in configs.values()) for key in ("batch_tokens", "k"))
    rows, free = 4 * batch * (ROW_COPIES * d_in + PAIR_FLOATS * k), available_memory()
    if free is None:
        return
    if rows > free:
        raise ConfigError(
            f"a step on trainer.batch_tokens={batch} rows of width {d_in} needs at least {rows / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB of memory are free; lower trainer.batch_tokens"
        )
    sizes = [state_bytes(config, d_in, wiring, copies=STATES if stays_here else {}) for config in configs.values()]
    needed = rows + (sum(sizes) if stays_here else max(sizes))
    if needed > free:
        latents = ", ".join(str(number) for number in sorted({config.num_latents for config in configs.values()}))
        several = len(configs) > 1
        raise ConfigError(
            f"{f'{len(configs)} SAEs' if several else 'an SAE'} of sae.num_latents={latents} at width {d_in} "
            f"{'need' if several else 'needs'} at least {needed / 1e9:.1f} GB to train, {free / 1e9:.1f} GB of memory "
            f"are free; lower sae.num_latents{' or name fewer values in together.*' if several else ''}"
        )


def state_bytes(config: TrainConfig, d_in: int, wiring: Wiring, copies: Mapping[str, int]) -> int:
    """Of W_enc and W_dec in `copies` of the optimizer, one where it names none; biases and counters are small beside them."""
    read = wiring.inputs[0][1] if wiring.two_sided else d_in  # a cross-layer latent reads one hook point
    written = len(range(*wiring.target.indices(d_in)))
    return 4 * config.num_latents * (read + written) * copies.get(config.optimizer, 1)


def available_memory() -> int | None:
    """Bytes that this process can still have, None where the system does not say."""
    found = [memory_free(), cgroup_limit()]
    return min((size for size in found if size is not None), default=None)


def memory_free() -> int | None:
    try:
        for line in MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:  # not Linux
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def cgroup_limit() -> int | None:
    try:
        text = CGROUP_LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None

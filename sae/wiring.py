"""Which columns of a batch a dictionary reads, and which it reconstructs. No torch here.

A batch holds the rows of one or several hook points side by side, W columns in all.

    sae           reads and reconstructs the same columns: one hook point
    crosscoder    ... of several hook points: one latent has a direction at each (Lindsey et al. 2024)
    transcoder    reads one hook point, reconstructs another (Dunefsky et al. 2024)
    cross_layer   L pairs of hook points; a latent reads the input of its own pair and writes to the outputs of that
                  pair and the later ones (Ameisen et al. 2025)

With `skip` a linear map of the input is added: y_hat = sum_i a_i W_dec[i] + W_skip (u - centre) + b_dec
(Paulo, Shabalin and Belrose 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError

KINDS = ("sae", "crosscoder", "transcoder", "cross_layer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wiring:
    """`inputs` and `outputs`: (hook point, width), in the order of the batch's columns.

    An SAE or crosscoder has only inputs; they are its outputs too.

    Raises:
        ConfigError: hook points or widths that do not fit the kind.
    """

    kind: str = "sae"
    inputs: tuple[tuple[str, int], ...] = ()
    outputs: tuple[tuple[str, int], ...] = ()
    skip: bool = False

    def __post_init__(self) -> None:
        counts = {"sae": (0, 1), "crosscoder": (2, 1 << 20), "transcoder": (1, 1), "cross_layer": (2, 1 << 20)}
        if self.kind not in KINDS:
            raise ConfigError(f"unknown kind {self.kind!r}; known are {', '.join(KINDS)}")
        least, most = counts[self.kind]
        if not least <= len(self.inputs) <= most:
            wanted = "one hook point" if most == 1 else f"at least {least} hook points"
            raise ConfigError(f"a {self.kind} reads {wanted}, got {len(self.inputs)}")
        if len(self.outputs) != (len(self.inputs) if self.two_sided else 0):
            raise ConfigError(
                f"a {self.kind} needs as many outputs as inputs, got {len(self.outputs)} and {len(self.inputs)}"
                if self.two_sided
                else f"a {self.kind} reconstructs what it reads; leave the outputs out"
            )
        if self.kind == "cross_layer" and len({width for _, width in self.inputs}) > 1:
            raise ConfigError(f"the inputs of a cross-layer transcoder are equally wide, got {self.inputs}")
        if self.skip and self.kind != "transcoder":
            raise ConfigError(f"a skip matrix is a transcoder's, not a {self.kind}'s")

    @property
    def two_sided(self) -> bool:
        """Whether what is reconstructed is not what is read."""
        return self.kind in ("transcoder", "cross_layer")

    @property
    def d_in(self) -> int:
        """Columns read."""
        return sum(width for _, width in self.inputs)

    @property
    def width(self) -> int:
        """W."""
        return self.d_in + sum(width for _, width in self.outputs)

    @property
    def parts(self) -> tuple[slice, ...]:
        """The columns of every hook point, inputs first."""
        return spans((*self.inputs, *self.outputs))

    @property
    def target(self) -> slice:
        """The columns that are reconstructed."""
        return slice(self.d_in, self.width) if self.two_sided else slice(0, self.width) if self.inputs else slice(None)


def spans(ports: tuple[tuple[str, int], ...]) -> tuple[slice, ...]:
    """Consecutive columns, one slice a port."""
    found, start = [], 0
    for _, width in ports:
        found.append(slice(start, start + width))
        start += width
    return tuple(found)


SAME = Wiring()  # one hook point of any width

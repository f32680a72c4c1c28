"""How long the encoder's rows are when training starts: W_enc = c / 2 W_dec, with the c that reconstructs best.

Tied rows of norm 1 overshoot. The k rows chosen for a u agree with it, so they agree with each other, and their sum
is too long. <w, u> of random unit rows w in D dimensions is |u| g / sqrt(D) with g standard normal, whatever u is; the k
largest of F lie beyond z, where P(g > z) = p = k / F. With S the sum of their g^2 and Q that of their g^4,

    r = sum_i <w_i, u> w_i      <u, r> = |u|^2 S / D      |r|^2 = |u|^2 (S^2 / D^2 + S / D - Q / D^2)

    c = <u, r> / |r|^2 = 1 / (1 + S / D - Q / (S D))      the minimum of |u - c r|^2
    S = k m2,  Q = k m4      m2 = E[g^2 | g > z] = 1 + z phi(z) / p      m4 = E[g^4 | g > z] = 3 m2 + z^3 phi(z) / p

The choice of the k does not depend on c. Without one every latent above a threshold fires: half of them above 0 (ReLU and
gated), P(g > z) F above z standard deviations of the pre-activations (JumpReLU), and k is that many. Half of c, because Adam's steps have a fixed length: shorter rows turn faster
and fewer latents fall silent. Measured in runs/reports/training.md.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch

from .model import SparseCoder

START = 0.5  # of the scale that reconstructs best


def best_encoder_scale(d_in: int, num_latents: int, k: float) -> float:
    """The module docstring's c; 1 / (1 + (k - 3) / D) as k reaches F."""
    p = k / num_latents
    if p >= 1:
        m2, m4 = 1.0, 3.0
    else:
        z = NormalDist().inv_cdf(1 - p)
        tail = math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / p
        m2 = 1 + z * tail
        m4 = 3 * m2 + z**3 * tail
    return 1 / (1 + k * m2 / d_in - m4 / (m2 * d_in))


@torch.no_grad()
def scale_encoder_(model: SparseCoder, init_scale: float, active: float) -> None:
    """W_enc times init_scale (0: half of `best_encoder_scale`), in place; for a model not yet trained, of which `active`
    latents fire on a row."""
    model.W_enc_FD.mul_(init_scale or START * best_encoder_scale(model.d_in, model.num_latents, active))


def share_above(z: float) -> float:
    """P(g > z), g standard normal: the share of latents that fire at the start where all pre > z deviations do."""
    return math.erfc(z / math.sqrt(2)) / 2

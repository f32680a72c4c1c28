"""The variants of the sparse autoencoder, by name. TopK is in `sae/model.py`, each other one in a file here."""

from __future__ import annotations

from ..model import SparseCoder, TopKSAE
from .batchtopk import BatchTopKSAE
from .gated import GatedSAE
from .groupmax import GroupMaxSAE
from .jumprelu import JumpReLUSAE
from .matryoshka import MatryoshkaSAE
from .relu import ReLUSAE

VARIANTS: dict[str, type[SparseCoder]] = {
    variant.name: variant
    for variant in (TopKSAE, BatchTopKSAE, MatryoshkaSAE, GroupMaxSAE, JumpReLUSAE, ReLUSAE, GatedSAE)
}

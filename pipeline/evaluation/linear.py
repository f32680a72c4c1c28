"""The best linear maps from what a transcoder or crosscoder reads to what it reconstructs: the baselines beside it.

Among all maps y_hat = A x + b whose A has rank K at most, the one of least sum_p ||y_p - y_hat_p||^2 / s_p^2 (s_p: the
scale of output p) is the projection of the least-squares map on the K leading principal directions of what that
predicts, with y in units of s (reduced-rank regression, Izenman 1975). Where the same columns are read and
reconstructed it is PCA.

N rows, I columns read, O columns reconstructed, K values a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import final

import numpy as np

from sae.errors import ShapeError
from sae.metrics import Moments
from sae.weights import SAEWeights
from sae.wiring import spans

from .baselines import Replacement
from .fitted import PCA_ROWS
from .ports import output_scales, ports_of

MOST_COLUMNS = 4096  # on either side: the sums take O(N I^2), the directions O(I^3) and O(O^3)
LEAST_SHARE = 1e-12  # of the largest variance: a direction of less (columns in units of their spread) is rounding

PairSource = Callable[[int], Iterable[tuple[np.ndarray, np.ndarray]]]  # at most so many rows (x_NI, y_NO), in chunks


@final
class LinearReplacement(Replacement):
    """y_hat = mean_y + (E (x - mean_x)) D with E_KI and D_KO: K values of both signs, on in every row."""

    def __init__(self, mean_I: np.ndarray, encode_KI: np.ndarray, decode_KO: np.ndarray, mean_O: np.ndarray) -> None:
        self.mean_I, self.encode_KI = mean_I, encode_KI  # float64: of columns much alike, large numbers cancel
        self.mean_O, self.decode_KO = mean_O.astype(np.float32), decode_KO.astype(np.float32)
        self.num_latents = len(encode_KI)

    def code(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        vals_NK = ((x_ND - self.mean_I) @ self.encode_KI.T).astype(np.float32)
        return np.broadcast_to(np.arange(self.num_latents, dtype=np.int32), vals_NK.shape), vals_NK

    def decode(self, idx_NK: np.ndarray, vals_NK: np.ndarray, x_ND: np.ndarray) -> np.ndarray:
        return vals_NK @ self.decode_KO + self.mean_O


def linear_baselines(weights: SAEWeights, rows: PairSource) -> dict[str, Replacement]:
    """The best linear map of rank k (`pca` of a crosscoder, else `linear`) and of any rank (`affine`, not of a crosscoder,
    whose is the identity). None where either side has more than MOST_COLUMNS columns."""
    inputs, outputs = ports_of(weights)
    if max(weights.d_in, weights.d_out) > MOST_COLUMNS:
        return {}
    full = min(weights.d_in, weights.d_out)
    ranks = [min(weights.k, full)] + [full] * (inputs != outputs)

    def scale_of(moments: list[Moments]) -> np.ndarray:
        return np.repeat(output_scales(weights, moments), [width for _, width in outputs])

    names = ["pca"] if inputs == outputs else ["linear", "affine"]
    return dict(zip(names, fit_linear(rows(PCA_ROWS), spans(outputs), scale_of, ranks), strict=True))


def fit_linear(
    chunks: Iterable[tuple[np.ndarray, np.ndarray]],
    parts: Sequence[slice],
    scale_of: Callable[[list[Moments]], np.ndarray],
    ranks: list[int],
) -> list[LinearReplacement]:
    """Maps of these ranks on streamed rows; `parts`: the columns of each output, `scale_of` their moments gives s of
    every column (O,). Sums in float64 about the first chunk's means, as `baselines.fit_pca`.

    Raises:
        ShapeError: no rows.
    """
    moments = [Moments(part.stop - part.start) for part in parts]
    shift_I = shift_O = sum_I = np.zeros(0)
    second_II = second_IO = np.zeros((0, 0))
    count = 0
    for x_NI, y_NO in chunks:
        if not len(x_NI):
            continue
        for found, part in zip(moments, parts, strict=True):
            found.update(y_NO[:, part])
        x_NI, y_NO = x_NI.astype(np.float64), y_NO.astype(np.float64)
        if not count:
            shift_I, shift_O = x_NI.mean(axis=0), y_NO.mean(axis=0)
            sum_I = np.zeros_like(shift_I)
            second_II, second_IO = np.zeros((len(shift_I), len(shift_I))), np.zeros((len(shift_I), len(shift_O)))
        x_NI -= shift_I
        sum_I += x_NI.sum(axis=0)
        second_II += x_NI.T @ x_NI
        second_IO += x_NI.T @ (y_NO - shift_O)
        count += len(x_NI)
    if not count:
        raise ShapeError("expected rows to fit a linear map on, got none; give a store with committed, unflagged rows")
    mean_O, scale_O = np.concatenate([found.mean_D for found in moments]), scale_of(moments)
    mean_I = sum_I / count
    covariance_II = second_II / count - np.outer(mean_I, mean_I)
    covariance_IO = (second_IO / count - np.outer(mean_I, mean_O - shift_O)) / scale_O
    # least squares with x in units of its spread, so that wide columns do not hide narrow ones
    spread_I = np.sqrt(np.maximum(np.diag(covariance_II), 0))
    spread_I[spread_I == 0] = 1
    variance_I, directions_II = np.linalg.eigh(covariance_II / np.outer(spread_I, spread_I))
    kept = variance_I > LEAST_SHARE * variance_I[-1]
    inverse_I = np.where(kept, 1 / np.where(kept, variance_I, 1), 0)
    half_IO = directions_II.T @ (covariance_IO / spread_I[:, None])
    map_IO = (directions_II * inverse_I) @ half_IO / spread_I[:, None]
    _, leading_OO = np.linalg.eigh(half_IO.T @ (inverse_I[:, None] * half_IO))  # of the predicted y; largest last
    found = []
    for rank in ranks:
        leading_OK = leading_OO[:, ::-1][:, :rank]
        found.append(LinearReplacement(shift_I + mean_I, (map_IO @ leading_OK).T, leading_OK.T * scale_O, mean_O))
    return found

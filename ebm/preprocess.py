"""Per-feature preprocessing u = (t(x) - mean) / std, fitted on background and kept with the model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields

import numpy as np

from ebm.events import DataError, Schema

IDENTITY, LOG1P, ASINH = 0, 1, 2
TRANSFORMS = ("identity", "log1p", "asinh")

# A column with a long tail is compressed: momenta and masses fall off as powers, angles and counts do not. asinh in
# units of the median is linear for most values; log1p, which older models have, makes outliers of the smallest.
LONG_TAIL = 6.0  # kurtosis; a Gaussian has 3
FAR_OUT = 8.0  # standard deviations, of the farthest value
FEW_VALUES = 32  # a count, or a category
VALUES_LOOKED_AT = 20_000


@dataclass(frozen=True)
class Preprocessing:
    """Six float32 numbers per feature; every backend and the float64 reference use these same values.

    marker    the number that stands for a missing value (NaN: only NaN does)
    impute    what a missing value becomes, in raw units; NaN: the feature may not be missing, and the
              NaN goes through to the energy, where the Scorer finds it
    transform 0 identity, 1 sign(x) log1p(|x|), 2 asinh(x / scale)
    mean, inv_std of the transformed background; inv_std = 0 for a constant feature
    """

    marker: np.ndarray
    impute: np.ndarray
    transform: np.ndarray
    scale: np.ndarray
    mean: np.ndarray
    inv_std: np.ndarray

    def __post_init__(self) -> None:
        for f in fields(self):
            dtype = np.int32 if f.name == "transform" else np.float32
            object.__setattr__(self, f.name, np.ascontiguousarray(getattr(self, f.name), dtype))

    @property
    def n_features(self) -> int:
        return len(self.mean)

    @classmethod
    def identity(cls, n_features: int) -> Preprocessing:
        """u = x: what `load_scorer(..., preprocess=False)` uses."""
        nan, one, zero = (np.full(n_features, v) for v in (np.nan, 1.0, 0.0))
        return cls(nan, nan, zero, one, zero, one)

    @classmethod
    def fit(cls, x: np.ndarray, schema: Schema) -> Preprocessing:
        """Fit on background events x (n, D), NaN or the schema's marker where missing.

        Raises DataError where a feature has no value at all or an infinite one.
        """
        n = schema.n_features
        if x.ndim != 2 or x.shape[1] != n or len(x) == 0:
            raise DataError(f"expected background events of shape (n, {n}) with n > 0, given {x.shape}")
        x = np.array(x, np.float64)
        marker = np.nan if schema.missing_marker is None else schema.missing_marker
        x[x == np.float32(marker)] = np.nan
        impute, scale = np.full(n, np.nan), np.ones(n)
        transform, mean, inv_std = np.zeros(n, int), np.zeros(n), np.zeros(n)
        constant = []
        for j, name in enumerate(schema.features):
            values = x[~np.isnan(x[:, j]), j]
            if len(values) == 0 and not (schema.optional and schema.optional[j]):
                raise DataError(f"feature {name!r} is missing in all {len(x)} background events: leave it out")
            if len(values) == 0:  # no event has so many objects
                impute[j] = 0.0
                constant.append(name)
                continue
            if np.isinf(values).any():
                raise DataError(f"feature {name!r} is infinite in {np.isinf(values).sum()} background events")
            if len(values) < len(x) or (schema.optional is not None and schema.optional[j]):
                impute[j] = np.median(values)
            transform[j], scale[j] = _choose_transform(values)
            t = apply_transform(values, transform[j], np.float32(scale[j]))
            mean[j] = t.mean()
            if t.std() > 1e-6 * max(1.0, abs(mean[j])):
                inv_std[j] = 1 / t.std()
            else:
                constant.append(name)
        if constant:
            warnings.warn(f"constant in background, so without influence: {', '.join(constant)}", stacklevel=2)
        return cls(np.full(n, marker), impute, transform, scale, mean, inv_std)

    def missing(self, x: np.ndarray) -> np.ndarray:
        """(n, D) -> (n, D) bool, true where a value is absent."""
        return np.isnan(x) | (x == self.marker)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(n, D) raw -> (n, D) preprocessed, in the precision of x (float32 or float64)."""
        x = np.where(self.missing(x), self.impute, x).astype(x.dtype, copy=False)
        t = np.empty_like(x)
        for code in np.unique(self.transform):
            columns = self.transform == code
            t[:, columns] = apply_transform(x[:, columns], code, self.scale[columns].astype(x.dtype))
        return (t - self.mean.astype(x.dtype)) * self.inv_std.astype(x.dtype)

    def inverse(self, u: np.ndarray) -> np.ndarray:
        """(n, D) preprocessed -> (n, D) raw, float64; a constant feature is given its background's value."""
        x = self.mean + np.divide(u, self.inv_std, out=np.zeros(np.shape(u)), where=self.inv_std > 0)
        log1p, asinh = self.transform == LOG1P, self.transform == ASINH
        x[:, log1p] = np.sign(x[:, log1p]) * np.expm1(np.abs(x[:, log1p]))
        x[:, asinh] = self.scale[asinh] * np.sinh(x[:, asinh])
        return x

    def derivative(self, x: np.ndarray) -> np.ndarray:
        """du/dx, (n, D); 0 where the value is imputed and for a constant feature."""
        slope = np.ones_like(x)
        log1p, asinh = self.transform == LOG1P, self.transform == ASINH
        slope[:, log1p] = 1 / (1 + np.abs(x[:, log1p]))
        slope[:, asinh] = 1 / np.hypot(x[:, asinh], self.scale[asinh].astype(x.dtype))
        return np.where(self.missing(x), 0, slope * self.inv_std.astype(x.dtype))


def apply_transform(x: np.ndarray, code: int, scale: np.ndarray | float) -> np.ndarray:
    """The monotone transform t(x) of one code."""
    if code == LOG1P:
        return np.sign(x) * np.log1p(np.abs(x))
    if code == ASINH:
        return np.arcsinh(x / scale)
    return x


def _choose_transform(values: np.ndarray) -> tuple[int, float]:
    z = values - values.mean()
    variance = np.mean(z**2)
    if variance == 0 or len(np.unique(values[:VALUES_LOOKED_AT])) <= FEW_VALUES:
        return IDENTITY, 1.0
    if np.mean(z**4) <= LONG_TAIL * variance**2 and np.abs(z).max() <= FAR_OUT * variance**0.5:
        return IDENTITY, 1.0
    size = np.abs(values)
    return ASINH, float(np.median(size) or size.mean())

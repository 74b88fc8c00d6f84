"""Ridge probe: a linear map from a layer's residual stream to the last layer's, N tokens on."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from ..cache.errors import NotFoundError, UsageError
from ..cache.store import ActivationCache
from .collect import Progress, collect, collect_passes, collect_rows, cores, one_blas_thread
from .moments import PRODUCTS, MomentSet, Pair
from .readout import Batch
from .solve import AffineMap, RidgeFit, fit_ridge, held_out_sse

if TYPE_CHECKING:
    import torch


class RidgeProbe(RegressorMixin, BaseEstimator):
    """Predicts residual_L[t+N] from residual_l[t] by ridge regression, for every layer and offset.

    `alpha` is scikit-learn's penalty (squared error + alpha |weight|^2, free intercept); without
    it, exact cross-validation over `folds` chooses one per (layer, offset) out of `alphas`
    (default: `GRID` times the mean eigenvalue of the second moments). `layers` defaults to all.
    `products="float32"` halves the time of the pass, at a relative error of about 1e-6 in the
    moments. Read through the head, it is a lens (offset 0) or a future lens.
    """

    kind = "ridge"

    def __init__(
        self,
        offset: int | Sequence[int] = 0,
        layers: Sequence[int] | None = None,
        alpha: float | None = None,
        alphas: Sequence[float] | np.ndarray | None = None,
        folds: int = 5,
        products: str = "float64",
    ) -> None:
        self.offset = offset
        self.layers = layers
        self.alpha = alpha
        self.alphas = alphas
        self.folds = folds
        self.products = products

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        client: Any = None,
        memory: int | None = None,
        progress: Progress | None = None,
    ) -> "RidgeProbe":
        """Fit a cache (its train split), saved moments, or rows `X` `(n, d_in)`, `y` `(n, d_out)`.

        Rows are numpy or dask arrays and give one map; their folds are contiguous. `memory` is
        the budget in bytes for a cache's moments, `client` one of `dask.distributed`.
        """
        self._check()
        if isinstance(X, ActivationCache):
            passes = collect_passes(
                X, self.layers, numbers(self.offset), folds=self.folds, products=self.products,
                memory=memory, client=client, progress=progress,
            )  # fmt: skip
            return self._fit_all(passes, np.float32)
        if isinstance(X, MomentSet):
            return self._fit_all([X], np.float32)
        pair = (numbers(self.layers)[0] if self.layers else 0, numbers(self.offset)[0])
        self._fit_all(
            [MomentSet({pair: collect_rows(X, y, self.folds, self.products, client)})], None
        )
        self._is_flat = y.ndim == 1
        found = self.maps_[pair]
        self.coef_ = found.weight[:, 0] if self._is_flat else found.weight.T
        self.intercept_ = found.bias[0] if self._is_flat else found.bias
        return self

    def _check(self) -> None:
        if self.alpha is not None and self.alphas is not None:
            raise UsageError("give alpha (one penalty) or alphas (penalties to choose from)")
        given = [self.alpha] if self.alphas is None else list(self.alphas)
        if not given or any(a is not None and not (np.isfinite(a) and a >= 0) for a in given):
            raise UsageError(f"penalties must be finite and 0 or more, not {given}")
        if self.folds < (2 if self.alpha is None else 1):
            raise UsageError(f"choosing a penalty needs at least 2 folds, not {self.folds}")
        if self.products not in PRODUCTS:
            raise UsageError(
                f"products must be one of {', '.join(PRODUCTS)}, not {self.products!r}"
            )

    def _fit_all(self, passes: Iterable[MomentSet], dtype: Any) -> "RidgeProbe":
        self._clear()
        for moments in passes:
            self.cache_id_, self.geometry_ = moments.cache_id, moments.geometry
            self.split_ = moments.split
            for pair, found in self._solve(moments).items():
                self._keep(pair, found, found.map if dtype is None else found.map.astype(dtype))
            # Else these matrices would stay while the next pass makes its own.
            del moments
        if not self.maps_:
            raise UsageError("there are no moments to fit")
        shape = next(iter(self.maps_.values())).weight.shape
        self.n_features_in_ = shape[0]
        return self

    def _clear(self) -> None:
        self.maps_: dict[Pair, AffineMap] = {}
        self.alpha_: dict[Pair, float] = {}
        self.alphas_: dict[Pair, np.ndarray] = {}
        self.cv_mse_path_: dict[Pair, np.ndarray] = {}
        self.r2_: dict[Pair, float] = {}
        self.mse_: dict[Pair, float] = {}
        self.n_: dict[Pair, int] = {}
        self._is_flat = False
        self._tensors: dict[tuple[Pair, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def _solve(self, moments: MomentSet) -> dict[Pair, RidgeFit]:
        from dask.base import compute
        from dask.delayed import delayed

        calls = [
            partial(fit_ridge, folds, self.alpha, self.alphas, f"layer {pair[0]}, offset {pair[1]}")
            for pair, folds in moments.pairs.items()
        ]
        work = [delayed(call, pure=False)() for call in calls]
        with one_blas_thread():
            found = compute(*work, scheduler="threads", num_workers=cores())
        return dict(zip(moments.pairs, found, strict=True))

    def _keep(self, pair: Pair, found: RidgeFit, fitted: AffineMap) -> None:
        self.maps_[pair] = fitted
        self.alpha_[pair] = found.alpha
        self.alphas_[pair] = found.alphas
        self.cv_mse_path_[pair] = found.path
        self.r2_[pair], self.mse_[pair], self.n_[pair] = found.r2, found.mse, found.n

    def pairs(self) -> list[tuple[int | None, int]]:
        """The fitted (layer, offset) pairs."""
        check_is_fitted(self, "maps_")
        return list(self.maps_)

    def map(self, layer: int | None = None, offset: int | None = None) -> AffineMap:
        """The map of a (layer, offset); either may be left out where only one was fitted."""
        pair = self._pair(layer, offset)
        return self.maps_[pair]

    def _pair(self, layer: int | None, offset: int | None) -> Pair:
        check_is_fitted(self, "maps_")
        found = [p for p in self.maps_ if layer in (None, p[0]) and offset in (None, p[1])]
        if len(found) == 1:
            return found[0]
        fitted = ", ".join(f"({la}, {n})" for la, n in self.maps_)
        if not found:
            raise NotFoundError(f"no map for layer {layer}, offset {offset}; fitted are {fitted}")
        raise UsageError(f"name a layer and an offset; fitted (layer, offset) are {fitted}")

    def predict(self, X: Any, layer: int | None = None, offset: int | None = None) -> Any:
        """The predicted residual_L[t+N] of rows `(n, d_in)`, `(n, d_out)`; dask stays lazy."""
        found, X = self.map(layer, offset), X if hasattr(X, "ndim") else np.asarray(X)
        if X.ndim != 2 or X.shape[1] != len(found.weight):
            raise UsageError(f"expected rows (n, {len(found.weight)}), found shape {X.shape}")
        out = found(X)
        return out[:, 0] if self._is_flat else out

    def score(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        X: Any,
        y: Any = None,
        *,
        layer: int | None = None,
        offset: int | None = None,
        split: str = "validation",
    ) -> float:
        """R2 of all outputs together (`r2_score(multioutput="variance_weighted")`).

        `X` is a cache, of which `split` is read, or rows with their targets `y`.
        """
        pair = self._pair(layer, offset)
        if isinstance(X, ActivationCache):
            moments = collect(X, pair[:1], pair[1:], folds=1, split=split).total(pair)
            if moments.n == 0:
                raise UsageError(f"split {split!r} has no pair at offset {pair[1]}")
            sse, spread = held_out_sse(self.maps_[pair], moments), moments.yy
        else:
            sse = float(((y - self.predict(X, *pair)) ** 2).sum())
            spread = float(((y - y.mean(axis=0)) ** 2).sum())
        return 1 - sse / spread if spread else float(sse == 0)

    def logits(self, batch: Batch, layer: int | None, offset: int) -> "torch.Tensor":
        """Logits `(n, vocab)` that the head gives for the predicted residual; float32."""
        import torch

        if batch.hidden is None:
            raise UsageError("the ridge probe reads a layer; this batch has none")
        pair, device = self._pair(layer, offset), str(batch.hidden.device)
        if (pair, device) not in self._tensors:
            found = self.maps_[pair].astype(np.float32)
            arrays = found.weight, found.bias
            weight, bias = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays)
            self._tensors[pair, device] = weight, bias
        weight, bias = self._tensors[pair, device]
        return batch.head(torch.addmm(bias, batch.hidden, weight))

    def metrics(self) -> list[dict[str, Any]]:
        """One row per (layer, offset): penalty, cross-validated R2 and error, number of pairs."""
        check_is_fitted(self, "maps_")
        return [
            {
                "layer": pair[0],
                "offset": pair[1],
                "alpha": self.alpha_[pair],
                "r2": self.r2_[pair],
                "mse": self.mse_[pair],
                "n": self.n_[pair],
            }
            for pair in self.maps_
        ]

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())  # pyright: ignore
        if "_tensors" in state:
            state["_tensors"] = {}
        return state

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What `save_probe` writes: a JSON object and tensors."""
        rows = [{k: None if v != v else v for k, v in row.items()} for row in self.metrics()]
        about = {"cache": self.cache_id_, "geometry": self.geometry_, "split": self.split_}
        config = {**about, "d_model": self.n_features_in_, "flat": self._is_flat, "pairs": rows}
        tensors = {}
        for (layer, offset), found in self.maps_.items():
            key = f"{layer}.{offset}"
            tensors[f"{key}.weight"], tensors[f"{key}.bias"] = found.weight, found.bias
            tensors[f"{key}.alphas"] = self.alphas_[layer, offset]
            tensors[f"{key}.path"] = self.cv_mse_path_[layer, offset]
        return config, tensors

    @classmethod
    def restore(
        cls, params: dict[str, Any], config: dict[str, Any], tensors: dict[str, np.ndarray]
    ) -> "RidgeProbe":
        """The probe that `state` described."""
        probe = cls(**params)
        probe._clear()
        probe.cache_id_, probe.geometry_ = config["cache"], config["geometry"]
        probe.split_, probe._is_flat = config["split"], config["flat"]
        probe.n_features_in_ = config["d_model"]
        for row in config["pairs"]:
            pair = row["layer"], row["offset"]
            weight, bias, alphas, path = (
                tensors[f"{pair[0]}.{pair[1]}.{name}"]
                for name in ("weight", "bias", "alphas", "path")
            )
            r2 = np.nan if row["r2"] is None else row["r2"]
            found = AffineMap(weight, bias)
            probe._keep(pair, RidgeFit(found, row["alpha"], alphas, path, r2, row["n"]), found)
        return probe


def numbers(value: int | Iterable[int]) -> tuple[int, ...]:
    """A tuple of one number or several."""
    return tuple(int(v) for v in value) if isinstance(value, Iterable) else (int(value),)

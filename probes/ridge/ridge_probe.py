"""Ridge probe: a linear map from a layer's residual stream to a later one's, N tokens on."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import NotFoundError, UsageError
from ...cache.files.json_files import plain_value
from ...cache.number_ranges import as_tuple, as_whole_number, is_several
from ...cache.progress import Progress
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import crossing_shares
from ..base.arguments import as_array, is_dask, validated
from ..base.estimator import BaseEstimator, MultiOutputMixin, RegressorMixin, check_is_fitted
from ..base.readout import ReadoutBatch
from ..base.resources import available_cores, one_blas_thread
from ..moments.collect_moments import check_rows, collect_moments, moments_of_rows
from ..moments.moment_set import MomentSet
from ..moments.moments import PRODUCTS
from ..moments.obtain_moments import MomentSources, obtain_moments
from ..moments.pass_plan import MomentRequest
from ..moments.shifted_sums import LayerOffsetTarget
from ..saved.save import feature_names, set_feature_names
from .error_share import SHARES, error_shares, warn_of_domination
from .solver import AffineMap, RidgeFit, fit_targets, held_out_sse

if TYPE_CHECKING:
    import torch


MapKey = tuple[int, ...]
"""(layer, offset), and the target layer where several were asked for."""


class RidgeProbe(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Predicts residual_L[t+N] from residual_l[t] by ridge regression, for every layer and offset.

    `alpha` is scikit-learn's penalty (squared error + alpha |weight|^2, free intercept); without
    it, exact cross-validation over `folds` chooses one per (layer, offset) out of `alphas`
    (default: `GRID` times the mean eigenvalue of the second moments). `layers` defaults to all.
    `products="float32"` halves the time of the pass, at a relative error of about 1e-6 in the
    moments: on the sample model the penalties stay the same, R2 moves by 3e-7 and weights by 1e-4.
    Read through the head, it is a lens (offset 0) or a future lens.

    Pairs (t, t+N) stay inside one document unless `across_documents`. The `drop_first` first
    positions of each sequence are no sources: in many models they are attention sinks, whose
    massive residual streams dominate a squared error.

    `target` is the layer that is predicted, by default L. Several give a map to each of them from
    one pass; the keys of `maps_` and of the other fitted dictionaries are then (layer, offset,
    target) and not (layer, offset).
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
        target: int | Sequence[int] | None = None,
        across_documents: bool = False,
        drop_first: int = 0,
    ) -> None:
        self.offset = offset
        self.layers = layers
        self.alpha = alpha
        self.alphas = alphas
        self.folds = folds
        self.products = products
        self.target = target
        self.across_documents = across_documents
        self.drop_first = drop_first

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        client: Any = None,
        memory: int | None = None,
        keep: bool | None = None,
        progress: Progress | None = None,
    ) -> "RidgeProbe":
        """Fit a cache (its train split), saved moments, or rows `X` `(n, d_in)`, `y` `(n, d_out)`.

        Rows are numpy or dask arrays and give one map; their folds are contiguous. `memory` is
        the budget in bytes for a cache's moments, `client` one of `dask.distributed`. Moments
        that were kept with the cache, or with one that it extends, are used again; `keep` says
        whether new ones are kept (default: where they take at most a quarter of its bytes).
        `moments_` says what happened.
        """
        self._check()
        if isinstance(X, ActivationCache):
            layers = None if self.layers is None else as_tuple(self.layers, "layers")
            targets = None if self.target is None else as_tuple(self.target, "target")
            request = MomentRequest.of(
                X, layers, as_tuple(self.offset, "offset"), targets,
                folds=as_whole_number(self.folds, "folds"), products=self.products,
                across_documents=self.across_documents, drop_first=self.drop_first,
            )  # fmt: skip
            keep = None if keep is None else bool(keep)
            account = MomentSources()
            groups = obtain_moments(
                X, request, keep=keep, memory=memory, client=client, progress=progress,
                account=account,
            )  # fmt: skip
            self._fit_all(groups, np.float32)
            self.moments_ = vars(account).copy()
            self._describe(X, request)
            return self
        if isinstance(X, MomentSet):
            return self._fit_all([self._chosen(X)], np.float32)
        return self._fit_rows(X, y, client)

    def _describe(self, cache: ActivationCache, request: MomentRequest) -> None:
        """Note which pairs join two documents, and how few rows make most of the error."""
        sequences = cache.sequences(request.split)
        inside = None
        if not request.across_documents:
            inside = {key[1]: self.n_[key] for key in self.maps_}
        crossing = crossing_shares(cache, sequences, request.offsets, request.scope, inside)
        pair_of = {(key[0], key[1], self.target_[key]): key for key in self.maps_}
        maps = {pair: self.maps_[key] for pair, key in pair_of.items()}
        found = error_shares(cache, maps, sequences, request.scope)
        self.shares_ = {
            key: {"crossing": crossing[key[1]], **found[pair].columns()}
            for pair, key in pair_of.items()
        }
        warn_of_domination(found)

    def _fit_rows(self, X: Any, y: Any, client: Any) -> "RidgeProbe":
        X, y = self._rows(X, y)
        flat = y.ndim == 1
        pair = tuple(
            as_tuple(given)[0] if given is not None else 0
            for given in (self.layers, self.offset, self.target)
        )
        folds = moments_of_rows(X, y, as_whole_number(self.folds, "folds"), self.products, client)
        self._fit_all([MomentSet({pair: folds})], None)  # pyright: ignore[reportArgumentType]
        self._is_flat = flat
        self._set_coefficients()
        return self

    def _set_coefficients(self) -> None:
        """`coef_` `(d_out, d_in)` and `intercept_` as scikit-learn's linear models have them."""
        found = self.map()
        self.coef_ = found.weight[:, 0] if self._is_flat else found.weight.T
        self.intercept_ = found.bias[0] if self._is_flat else found.bias

    def _rows(self, X: Any, y: Any) -> tuple[Any, Any]:
        """`X` and `y` as arrays that fit together; dask's are left lazy."""
        X, y = as_array(X, "X"), as_array(y, "y")
        if not is_dask(X):
            try:
                X, y = validated(
                    self, X, y, multi_output=True, y_numeric=True, dtype=(np.float64, np.float32)
                )
            except UsageError as error:
                raise type(error)(
                    f"{error}\nfit takes a cache, or two arrays: rows X (n, d_in) and targets y"
                ) from None
        check_rows(X, y, self.folds)
        return X, y

    def _chosen(self, moments: MomentSet) -> MomentSet:
        """The moments of the targets asked for; raises `UsageError` if they are of other pairs."""
        for name in ("across_documents", "drop_first"):
            if getattr(moments, name) != getattr(self, name):
                raise UsageError(
                    f"these moments were collected with {name}={getattr(moments, name)}, the probe "
                    f"has {name}={getattr(self, name)}; give both the same"
                )
        there = {pair[2] for pair in moments.pairs}
        if self.target is None and len(there) > 1:
            raise UsageError(f"these moments have the targets {sorted(there)}: give target=")
        asked = there if self.target is None else set(as_tuple(self.target, "target"))
        if not asked <= there:
            raise NotFoundError(f"these moments have the targets {sorted(there)}, not {asked}")
        return moments.with_pairs({p: m for p, m in moments.pairs.items() if p[2] in asked})

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
        found: dict[MapKey, RidgeFit] = {}
        for moments in passes:
            self.cache_id_, self.geometry_ = moments.cache_id, moments.geometry
            self.split_, self.depth_ = moments.split, moments.depth
            for pair, fitted in self._solve(moments).items():
                rounded = fitted.map if dtype is None else fitted.map.astype(dtype)
                found[pair] = replace(fitted, map=rounded)
            # Else these matrices would stay while the next pass makes its own.
            del moments
        if not found:
            raise UsageError("there are no moments to fit")
        for pair in sorted(found):
            self._keep(pair, found[pair])
        self.n_features_in_ = len(self.maps_[next(iter(self.maps_))].weight)
        return self

    def _clear(self) -> None:
        self.maps_: dict[MapKey, AffineMap] = {}
        self.alpha_: dict[MapKey, float] = {}
        self.alphas_: dict[MapKey, np.ndarray] = {}
        self.cv_mse_path_: dict[MapKey, np.ndarray] = {}
        self.r2_: dict[MapKey, float] = {}
        self.mse_: dict[MapKey, float] = {}
        self.n_: dict[MapKey, int] = {}
        self.target_: dict[MapKey, int] = {}
        self.shares_: dict[MapKey, dict[str, float | None]] = {}
        self._is_flat = False
        self._tensors: dict[tuple[MapKey, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def _solve(self, moments: MomentSet) -> dict[LayerOffsetTarget, RidgeFit]:
        from dask.base import compute
        from dask.delayed import delayed

        sources: dict[tuple[int, int], list[LayerOffsetTarget]] = {}
        for pair in moments.pairs:
            sources.setdefault(pair[:2], []).append(pair)
        work: list[Any] = []
        for (layer, offset), pairs in sources.items():
            folds, what = [moments.pairs[p] for p in pairs], f"layer {layer}, offset {offset}"
            call = partial(fit_targets, folds, self.alpha, self.alphas, what)
            work.append(delayed(call, pure=False)())
        with one_blas_thread():
            found = compute(*work, scheduler="threads", num_workers=available_cores())
        fits = zip(sources.values(), found, strict=True)
        return {p: fit for pairs, some in fits for p, fit in zip(pairs, some, strict=True)}

    def _keep(self, pair: MapKey, found: RidgeFit) -> None:
        key = pair if is_several(self.target) else pair[:2]
        self.maps_[key], self.target_[key] = found.map, pair[2]
        self.alpha_[key] = found.alpha
        self.alphas_[key] = found.alphas
        self.cv_mse_path_[key] = found.path
        self.r2_[key], self.mse_[key], self.n_[key] = found.r2, found.mse, found.n

    def pairs(self) -> list[tuple[int | None, int]]:
        """The fitted (layer, offset) pairs."""
        check_is_fitted(self, "maps_")
        return list(dict.fromkeys((key[0], key[1]) for key in self.maps_))

    def map(
        self, layer: int | None = None, offset: int | None = None, target: int | None = None
    ) -> AffineMap:
        """The map of a (layer, offset, target); what only one was fitted of may be left out."""
        key = self._pair(layer, offset, target)
        return self.maps_[key]

    def _pair(self, layer: int | None, offset: int | None, target: int | None = None) -> MapKey:
        check_is_fitted(self, "maps_")
        found = [
            key
            for key, to in self.target_.items()
            if layer in (None, key[0]) and offset in (None, key[1]) and target in (None, to)
        ]
        if len(found) == 1:
            return found[0]
        several = is_several(self.target)
        names = "(layer, offset, target)" if several else "(layer, offset)"
        fitted = ", ".join(map(str, self.maps_))
        if not found:
            wanted = f"layer {layer}, offset {offset}"
            wanted += f", target {target}" if target is not None else ""
            raise NotFoundError(f"no map for {wanted}; fitted are {fitted}")
        raise UsageError(
            f"name a layer and an offset{', and a target' * several}; fitted {names} are {fitted}"
        )

    def predict(
        self, X: Any, layer: int | None = None, offset: int | None = None,
        target: int | None = None,
    ) -> Any:  # fmt: skip
        """The predicted residual_L[t+N] of rows `(n, d_in)`, `(n, d_out)`; dask stays lazy."""
        found = self.map(layer, offset, target)
        X = as_array(X, "X", known=False)
        if not is_dask(X):
            X = validated(self, X, reset=False, dtype=(np.float64, np.float32))
        elif X.ndim != 2 or X.shape[1] != len(found.weight):
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
        target: int | None = None,
        split: str = "validation",
        client: Any = None,
    ) -> float:
        """R2 of all outputs together (`r2_score(multioutput="variance_weighted")`).

        `X` is a cache, of which `split` is read (on the cluster of `client`, if given), or rows
        with their targets `y`.
        """
        key = self._pair(layer, offset, target)
        if isinstance(X, ActivationCache):
            asked = [[key[0]], [key[1]], [self.target_[key]]]
            moments = collect_moments(
                X, *asked, folds=1, split=split, client=client,
                across_documents=self.across_documents, drop_first=self.drop_first,
            ).total(*key[:2])  # fmt: skip
            if moments.n == 0:
                raise UsageError(f"split {split!r} has no pair at offset {key[1]}")
            sse, spread = held_out_sse(self.maps_[key], moments), moments.yy
        else:
            if y is None:
                raise UsageError("score of rows X needs their targets: score(X, y)")
            y = as_array(y, "y", known=False)
            # Squares of half precision would overflow.
            y = y.astype(np.float64) if is_dask(y) else np.asarray(y, np.float64)
            predicted = self.predict(X, key[0], key[1], self.target_[key])
            if y.shape[1:] != predicted.shape[1:] or not _same_length(y, predicted):
                raise UsageError(f"expected targets y {predicted.shape}, found {y.shape}")
            sse = float(((y - predicted) ** 2).sum())
            spread = float(((y - y.mean(axis=0)) ** 2).sum())
        if not (np.isfinite(sse) and np.isfinite(spread)):
            raise UsageError("the rows or targets hold values that are not finite")
        return 1 - sse / spread if spread else float(sse == 0)

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Logits `(n, vocab)` that the head gives for the predicted residual; float32."""
        import torch

        if batch.hidden is None:
            raise UsageError("the ridge probe reads a layer; this batch has none")
        several = is_several(self.target)
        pair = self._pair(layer, offset, self.depth_ if several else None)
        if self.depth_ not in (None, self.target_[pair]):
            raise UsageError(
                f"this map predicts layer {self.target_[pair]}; the head reads layer {self.depth_}"
            )
        device = str(batch.hidden.device)
        if (pair, device) not in self._tensors:
            found = self.maps_[pair].astype(np.float32)
            # Copies: torch aligns its own memory, on which the last bits of a product depend.
            weight, bias = (torch.tensor(a, device=device) for a in (found.weight, found.bias))
            self._tensors[pair, device] = weight, bias
        weight, bias = self._tensors[pair, device]
        return batch.head(torch.addmm(bias, batch.hidden.to(weight.dtype), weight))

    def residual_map(self, layer: int | None, offset: int) -> AffineMap | None:
        """The map to the last layer of a (layer, offset), None where it is to another one."""
        several = isinstance(self.target, Iterable)
        pair = self._pair(layer, offset, self.depth_ if several else None)
        return self.maps_[pair] if self.target_[pair] == self.depth_ else None

    def metrics(self) -> list[dict[str, Any]]:
        """One row per (layer, offset): penalty, cross-validated R2 and error, number of pairs.

        R2 and error are None where nothing was held out. Of a cache also `crossing`, the share of
        the pairs of its sequences that join two documents (left out unless `across_documents`),
        and the shares of `ErrorShare`.
        """
        check_is_fitted(self, "maps_")
        rows = [
            {
                "layer": key[0],
                "offset": key[1],
                **({} if self.target is None else {"target": self.target_[key]}),
                "alpha": self.alpha_[key],
                "r2": self.r2_[key],
                "mse": self.mse_[key],
                "n": self.n_[key],
                **self.shares_.get(key, {}),
            }
            for key in self.maps_
        ]
        return plain_value(rows)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())  # pyright: ignore
        if "_tensors" in state:
            state["_tensors"] = {}
        return state

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What `save_probe` writes: a JSON object and tensors."""
        rows = self.metrics()
        for row, target in zip(rows, self.target_.values(), strict=True):
            row["target"] = target
        about = {"cache": self.cache_id_, "geometry": self.geometry_, "split": self.split_}
        about |= {"d_model": self.n_features_in_, "flat": self._is_flat, "depth": self.depth_}
        about |= {"of_rows": hasattr(self, "coef_"), "moments": getattr(self, "moments_", None)}
        about["feature_names"] = feature_names(self)
        tensors = {}
        for key, found in self.maps_.items():
            name = ".".join(map(str, key))
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = found.weight, found.bias
            tensors[f"{name}.alphas"] = self.alphas_[key]
            tensors[f"{name}.path"] = self.cv_mse_path_[key]
        return {**about, "pairs": rows}, tensors

    @classmethod
    def restore(
        cls, params: dict[str, Any], config: dict[str, Any], tensors: dict[str, np.ndarray]
    ) -> "RidgeProbe":
        """The probe that `state` described."""
        probe = cls(**params)
        probe._clear()
        probe.cache_id_, probe.geometry_ = config["cache"], config["geometry"]
        probe.split_, probe._is_flat = config["split"], config["flat"]
        probe.n_features_in_, probe.depth_ = config["d_model"], config.get("depth")
        several = is_several(probe.target)
        for row in config["pairs"]:
            # Probes of the first version knew no target but layer L.
            pair = row["layer"], row["offset"], row.get("target", probe.depth_)
            name = ".".join(map(str, pair if several else pair[:2]))
            weight, bias, alphas, path = (
                tensors[f"{name}.{kind}"] for kind in ("weight", "bias", "alphas", "path")
            )
            r2 = np.nan if row["r2"] is None else row["r2"]
            found = AffineMap(weight, bias)
            probe._keep(pair, RidgeFit(found, row["alpha"], alphas, path, r2, row["n"]))
            if "crossing" in row:
                key = pair if several else pair[:2]
                probe.shares_[key] = {name: row[name] for name in ("crossing", *SHARES)}
        # What the first version did not write is left out.
        if config.get("moments") is not None:
            probe.moments_ = config["moments"]
        if config.get("of_rows"):
            probe._set_coefficients()
        set_feature_names(probe, config.get("feature_names"))
        return probe


def _same_length(y: Any, predicted: Any) -> bool:
    """Whether both have as many rows, as far as chunks of unknown size let it be known."""
    lengths = y.shape[0], predicted.shape[0]
    return bool(np.isnan(lengths).any()) or lengths[0] == lengths[1]

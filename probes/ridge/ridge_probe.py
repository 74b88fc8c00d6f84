"""Ridge regression from a layer's residual stream to a later layer's, N tokens on: `RidgeProbe`.

A fit goes through three files: `moments/obtain_moments.py` (second moments of the cache, kept or
collected in one pass), `solver.py` (penalty by cross-validation, then the map), `error_share.py`
(warns where few rows make most of the error).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import NotFoundError, UsageError
from ...cache.files.json_fields import integer_field, number_field
from ...cache.files.json_files import plain_value
from ...cache.number_ranges import as_tuple, as_whole_number, is_several
from ...cache.progress import Auto, Progress, show_stage
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import crossing_shares
from ..base.arguments import as_array, is_dask, validated
from ..base.estimator import BaseEstimator, MultiOutputMixin, RegressorMixin
from ..base.fitted_maps import FittedMaps, MapKey
from ..base.pair_offsets import check_pair_offsets
from ..base.readout import ReadoutBatch
from ..base.resources import available_cores, device_of_fit, one_blas_thread
from ..base.saved_tensors import SavedTensors
from ..moments.moment_collection import check_rows, collect_moments, moments_of_rows
from ..moments.moment_set import MomentSet
from ..moments.moment_sources import MomentSources, obtain_moments
from ..moments.moments import PRODUCTS
from ..moments.pass_plan import MomentRequest
from ..moments.shifted_sums import LayerOffsetTarget
from ..saved.probe_methods import ProbeFiles
from ..saved.save import feature_names, set_feature_names
from .error_share import SHARES, error_shares, warn_of_domination
from .solver import AffineMap, RidgeFit, fit_targets, held_out_sse

if TYPE_CHECKING:
    import torch


class RidgeProbe(  # pyright: ignore[reportIncompatibleVariableOverride] (HTML of its own)
    FittedMaps[MapKey], ProbeFiles, MultiOutputMixin, RegressorMixin, BaseEstimator
):
    """Predicts residual_L[t+N] from residual_l[t] by ridge regression, for every layer and offset.

    `offsets` are the N, one or several. `alpha` is scikit-learn's penalty (squared error + alpha
    |weight|^2, free intercept); without `alpha`, exact cross-validation over `folds` chooses one
    per (layer, offset) out of `alphas` (default: `GRID` times the mean eigenvalue of the second
    moments). `layers` defaults to all. `products="float32"` halves the time of the pass, at a
    relative error of about 1e-6 in the moments: on the sample model the penalties stay the same,
    R2 moves by 3e-7 and weights by 1e-4. Read through the head, the probe is a lens (offset 0) or
    a future lens.

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
        offsets: int | Sequence[int] = 0,
        layers: Sequence[int] | None = None,
        alpha: float | None = None,
        alphas: Sequence[float] | np.ndarray | None = None,
        folds: int = 5,
        products: str = "float64",
        target: int | Sequence[int] | None = None,
        across_documents: bool = False,
        drop_first: int = 0,
    ) -> None:
        self.offsets = offsets
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
        progress: Progress | Auto | None = "auto",
        device: "str | torch.device" = "auto",
    ) -> "RidgeProbe":
        """Fit a cache (its train split), saved moments, or rows `X` `(n, d_in)`, `y` `(n, d_out)`.

        Rows are numpy or dask arrays and give one map; their folds are contiguous. `memory` is
        the budget in bytes for a cache's moments, `client` one of `dask.distributed`. Moments
        that were kept with the cache, or with one that it extends, are used again; `keep` says
        whether new ones are kept (default: where they take at most a quarter of its bytes, or a
        gigabyte). `moments_` tells where the moments came from, see `MomentSources`. `progress` is
        "auto" (bars in a terminal or notebook, elsewhere lines of the logger `residua`), None
        (nothing), or a function that is called with (positions done, positions in all).

        Products and decompositions run on `device`: `auto` is the first GPU, or the CPU (with a
        `client`: the workers' CPUs). On a device with float64 (CUDA) they are float64 and equal the
        CPU's to about 1e-12; on one without (Apple's), products of blocks are float32, added up in
        float64 on the host (moments to about 1e-6, see `products`), and LAPACK solves.
        """
        self._check_params()
        fit_device = device_of_fit(device, client)
        if isinstance(X, MomentSet):
            return self._fit_moments([self._select_targets(X)], np.float32, fit_device)
        if not isinstance(X, ActivationCache):
            return self._fit_rows(X, y, client, fit_device)

        request = MomentRequest.of(
            X,
            None if self.layers is None else as_tuple(self.layers, "layers"),
            as_tuple(self.offsets, "offsets"),
            None if self.target is None else as_tuple(self.target, "target"),
            folds=as_whole_number(self.folds, "folds"),
            products=self.products,
            across_documents=self.across_documents,
            drop_first=self.drop_first,
        )
        check_pair_offsets(X, request.offsets, request.scope, request.split)
        sources = MomentSources()
        with show_stage(progress, "moments") as report:
            moments = obtain_moments(
                X,
                request,
                keep=None if keep is None else bool(keep),
                memory=memory,
                client=client,
                progress=report,
                sources=sources,
                device=fit_device,
            )
            # Workers of a cluster collect moments; their devices need not be here.
            self._fit_moments(moments, np.float32, fit_device if client is None else None)
        self.moments_: dict[str, Any] = vars(sources).copy()
        self._measure_shares(X, request)
        return self

    def _check_params(self) -> None:
        """Raise `UsageError` for penalties, folds or products that cannot be right."""
        if self.alpha is not None and self.alphas is not None:
            raise UsageError("give alpha (one penalty) or alphas (penalties to choose from)")
        penalties = [self.alpha] if self.alphas is None else list(self.alphas)
        if not penalties or any(
            a is not None and not (np.isfinite(a) and a >= 0) for a in penalties
        ):
            raise UsageError(f"penalties must be finite and 0 or more, not {penalties}")
        if self.folds < (2 if self.alpha is None else 1):
            raise UsageError(f"choosing a penalty needs at least 2 folds, not {self.folds}")
        if self.products not in PRODUCTS:
            raise UsageError(
                f"products must be one of {', '.join(PRODUCTS)}, not {self.products!r}"
            )

    def _select_targets(self, moments: MomentSet) -> MomentSet:
        """`moments` of the probe's targets alone; raises `UsageError` if they do not suit it."""
        for name in ("across_documents", "drop_first"):
            if getattr(moments, name) != getattr(self, name):
                raise UsageError(
                    f"these moments were collected with {name}={getattr(moments, name)}, the probe "
                    f"has {name}={getattr(self, name)}; give both the same"
                )
        available = {pair[2] for pair in moments.pairs}
        if self.target is None and len(available) > 1:
            raise UsageError(f"these moments have the targets {sorted(available)}: give target=")
        targets = available if self.target is None else set(as_tuple(self.target, "target"))
        if not targets <= available:
            raise NotFoundError(
                f"these moments have the targets {sorted(available)}, not {targets}"
            )
        pairs = {pair: folds for pair, folds in moments.pairs.items() if pair[2] in targets}
        return replace(moments, pairs=pairs)

    def _fit_moments(
        self, groups: Iterable[MomentSet], dtype: Any, device: "torch.device | None"
    ) -> "RidgeProbe":
        """Solve one group of moments after the other; maps are rounded to `dtype` if given."""
        self._clear()
        fits: dict[LayerOffsetTarget, RidgeFit] = {}
        for moments in groups:
            self.cache_id_: str | None = moments.cache_id
            self.geometry_: str | None = moments.geometry
            self.split_: str | None = moments.split
            self.depth_: int | None = moments.depth
            for pair, fit in self._solve(moments, device).items():
                rounded = fit.map if dtype is None else fit.map.astype(dtype)
                fits[pair] = replace(fit, map=rounded)
            # Free these matrices before the next pass allocates its own.
            del moments
        if not fits:
            raise UsageError("there are no moments to fit")
        for pair in sorted(fits):
            self._set_fit(pair, fits[pair])
        self.n_features_in_: int = len(self.maps_[next(iter(self.maps_))].weight)
        return self

    def _solve(
        self, moments: MomentSet, device: "torch.device | None"
    ) -> dict[LayerOffsetTarget, RidgeFit]:
        """The fits of all pairs; targets of one (layer, offset) share its spectra.

        On all cores at once, or one after the other on a device.
        """
        pairs_of_source: dict[tuple[int, int], list[LayerOffsetTarget]] = {}
        for pair in moments.pairs:
            pairs_of_source.setdefault(pair[:2], []).append(pair)
        calls: list[Any] = []
        for (layer, offset), pairs in pairs_of_source.items():
            folds, source = [moments.pairs[p] for p in pairs], f"layer {layer}, offset {offset}"
            calls.append(partial(fit_targets, folds, self.alpha, self.alphas, source))
        fits = _run_on_cores(calls) if device is None else _run_on_device(calls, device)
        return {
            pair: fit
            for pairs, fits_of_source in zip(pairs_of_source.values(), fits, strict=True)
            for pair, fit in zip(pairs, fits_of_source, strict=True)
        }

    def _clear(self) -> None:
        """Forget the fit before."""
        self._forget_folder()
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
        self._device_copies = {}

    def _set_fit(self, pair: LayerOffsetTarget, fit: RidgeFit) -> None:
        """Enter a fit into the fitted dictionaries."""
        key = self._key_of(pair)
        self.maps_[key], self.target_[key] = fit.map, pair[2]
        self.alpha_[key] = fit.alpha
        self.alphas_[key] = fit.alphas
        self.cv_mse_path_[key] = fit.path
        self.r2_[key], self.mse_[key], self.n_[key] = fit.r2, fit.mse, fit.n

    def _key_of(self, pair: LayerOffsetTarget) -> MapKey:
        """Key of a fit: with the target layer only if `target` is a list."""
        return pair if is_several(self.target) else pair[:2]

    def _measure_shares(self, cache: ActivationCache, request: MomentRequest) -> None:
        """Set `shares_`: pairs that join two documents, and how few rows make most of the error."""
        sequences = cache.sequences(request.split)
        pairs_inside_documents = None
        if not request.across_documents:
            pairs_inside_documents = {key[1]: self.n_[key] for key in self.maps_}
        crossing = crossing_shares(
            cache, sequences, request.offsets, request.scope, pairs_inside_documents
        )
        key_of_pair = {(key[0], key[1], self.target_[key]): key for key in self.maps_}
        maps = {pair: self.maps_[key] for pair, key in key_of_pair.items()}
        shares = error_shares(cache, maps, sequences, request.scope)
        self.shares_ = {
            key: {"crossing": crossing[key[1]], **shares[pair].columns()}
            for pair, key in key_of_pair.items()
        }
        warn_of_domination(shares)

    def _fit_rows(self, X: Any, y: Any, client: Any, device: "torch.device | None") -> "RidgeProbe":
        """Fit one map to rows; it has the first of `layers`, `offsets` and `target` as its key."""
        X, y = self._check_rows(X, y)
        is_flat = y.ndim == 1
        layer, offset, target = (
            as_tuple(numbers)[0] if numbers is not None else 0
            for numbers in (self.layers, self.offsets, self.target)
        )
        number = as_whole_number(self.folds, "folds")
        folds = moments_of_rows(X, y, number, self.products, client, device=device)
        self._fit_moments([MomentSet({(layer, offset, target): folds})], None, device)
        self._is_flat = is_flat
        self._set_coefficients()
        return self

    def _check_rows(self, X: Any, y: Any) -> tuple[Any, Any]:
        """`X` and `y` as arrays of equal length; dask arrays stay lazy. Raises `UsageError`."""
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

    def _set_coefficients(self) -> None:
        """Set `coef_` `(d_out, d_in)` and `intercept_` as scikit-learn's linear models do."""
        affine = self.map()
        self.coef_: np.ndarray = affine.weight[:, 0] if self._is_flat else affine.weight.T
        self.intercept_: np.ndarray | float = affine.bias[0] if self._is_flat else affine.bias

    def map(
        self, layer: int | None = None, offset: int | None = None, target: int | None = None
    ) -> AffineMap:
        """The map of a (layer, offset, target); a number may be left out if only one was fitted."""
        key = self._find_key(layer, offset, target)
        return self.maps_[key]

    def residual_map(self, layer: int | None, offset: int) -> AffineMap | None:
        """The map from (layer, offset) to the last layer; None if another layer is predicted."""
        key = self._key_to_last_layer(layer, offset)
        return self.maps_[key] if self.target_[key] == self.depth_ else None

    def _key_to_last_layer(self, layer: int | None, offset: int) -> MapKey:
        """Key of the map to layer L; with a single target, of the map to that target."""
        return self._find_key(layer, offset, self.depth_ if is_several(self.target) else None)

    def _target_of(self, key: MapKey) -> int:
        return self.target_[key]

    def predict(
        self,
        X: Any,
        layer: int | None = None,
        offset: int | None = None,
        target: int | None = None,
    ) -> Any:
        """The predicted residual_L[t+N] of rows `(n, d_in)`, `(n, d_out)`; dask stays lazy."""
        affine = self.map(layer, offset, target)
        X = as_array(X, "X", known_length=False)
        if not is_dask(X):
            X = validated(self, X, reset=False, dtype=(np.float64, np.float32))
        elif X.ndim != 2 or X.shape[1] != len(affine.weight):
            raise UsageError(f"expected rows (n, {len(affine.weight)}), found shape {X.shape}")
        predicted = affine(X)
        return predicted[:, 0] if self._is_flat else predicted

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
        key = self._find_key(layer, offset, target)
        if isinstance(X, ActivationCache):
            moments = collect_moments(
                X,
                [key[0]],
                [key[1]],
                [self.target_[key]],
                folds=1,
                split=split,
                client=client,
                across_documents=self.across_documents,
                drop_first=self.drop_first,
            ).total(*key[:2])
            if moments.n == 0:
                raise UsageError(f"split {split!r} has no pair at offset {key[1]}")
            sse, variance = held_out_sse(self.maps_[key], moments), moments.yy
        else:
            if y is None:
                raise UsageError("score of rows X needs their targets: score(X, y)")
            y = as_array(y, "y", known_length=False)
            # Squares of half precision would overflow.
            y = y.astype(np.float64) if is_dask(y) else np.asarray(y, np.float64)
            predicted = self.predict(X, key[0], key[1], self.target_[key])
            if y.shape[1:] != predicted.shape[1:] or not _same_length(y, predicted):
                raise UsageError(f"expected targets y {predicted.shape}, found {y.shape}")
            sse = float(((y - predicted) ** 2).sum())
            variance = float(((y - y.mean(axis=0)) ** 2).sum())
        if not (np.isfinite(sse) and np.isfinite(variance)):
            raise UsageError("the rows or targets hold values that are not finite")
        return 1 - sse / variance if variance else float(sse == 0)

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Logits `(n, vocab)` that the head gives for the predicted residual; float32."""
        import torch

        if batch.hidden is None:
            raise UsageError("the ridge probe reads a layer; this batch has none")
        key = self._key_to_last_layer(layer, offset)
        if self.depth_ not in (None, self.target_[key]):
            raise UsageError(
                f"this map predicts layer {self.target_[key]}; the head reads layer {self.depth_}"
            )
        weight, bias = self._on_device(key, str(batch.hidden.device))
        return batch.head(torch.addmm(bias, batch.hidden.to(weight.dtype), weight))

    def metrics(self) -> list[dict[str, Any]]:
        """One row per (layer, offset): penalty, cross-validated R2 and error, number of pairs.

        R2 and error are None where nothing was held out. Of a cache also `crossing`, the share of
        the pairs of its sequences that join two documents (left out unless `across_documents`),
        and the shares of `ErrorShare`.
        """
        self.check_fitted()
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

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A JSON object and tensors for `save_probe`; `restore` is the inverse."""
        rows = self.metrics()
        for row, target in zip(rows, self.target_.values(), strict=True):
            row["target"] = target
        config = {
            **self._origin(),
            "flat": self._is_flat,
            "depth": self.depth_,
            "of_rows": hasattr(self, "coef_"),
            "moments": getattr(self, "moments_", None),
            "feature_names": feature_names(self),
            "pairs": rows,
        }
        tensors = {}
        for key, affine in self.maps_.items():
            name = ".".join(map(str, key))
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = affine.weight, affine.bias
            tensors[f"{name}.alphas"] = self.alphas_[key]
            tensors[f"{name}.path"] = self.cv_mse_path_[key]
        return config, tensors

    @classmethod
    def restore(
        cls, params: dict[str, Any], config: dict[str, Any], tensors: Mapping[str, np.ndarray]
    ) -> "RidgeProbe":
        """The fitted probe that `state` described; old files lack some keys of `config`."""
        tensors = SavedTensors.of(tensors)
        probe = cls(**params)
        probe._clear()
        probe._restore_origin(config)
        probe._is_flat, probe.depth_ = config["flat"], config.get("depth")
        for row in config["pairs"]:
            # Probes of the first version had no target but layer L.
            pair = row["layer"], row["offset"], row.get("target", probe.depth_)
            key = probe._key_of(pair)
            name = ".".join(map(str, key))
            weight = tensors.array(f"{name}.weight", (config["d_model"], None))
            bias = tensors.array(f"{name}.bias", weight.shape[1:])
            alphas = tensors.array(f"{name}.alphas", (None,))
            path = tensors.array(f"{name}.path", alphas.shape)
            fit = RidgeFit(
                map=AffineMap(weight, bias),
                alpha=number_field(row, "alpha"),
                alphas=alphas,
                path=path,
                r2=np.nan if row["r2"] is None else number_field(row, "r2"),
                n=integer_field(row, "n"),
            )
            probe._set_fit(pair, fit)
            if "crossing" in row:
                probe.shares_[key] = {name: row[name] for name in ("crossing", *SHARES)}
        if config.get("moments") is not None:
            probe.moments_ = config["moments"]
        if config.get("of_rows"):
            probe._set_coefficients()
        set_feature_names(probe, config.get("feature_names"))
        return probe


def _run_on_cores(calls: Sequence[Callable[[], Any]]) -> Sequence[Any]:
    """Results of `calls`, a thread of one BLAS thread for each core."""
    from dask.base import compute
    from dask.delayed import delayed

    tasks: list[Any] = [delayed(call, pure=False)() for call in calls]
    with one_blas_thread():
        return compute(*tasks, scheduler="threads", num_workers=available_cores())


def _run_on_device(calls: "Sequence[partial[Any]]", device: "torch.device") -> Sequence[Any]:
    """Results of `calls` with the algebra of `device`, one after the other."""
    from .device_algebra import algebra_on

    algebra = algebra_on(device)
    return [call(algebra=algebra) for call in calls]


def _same_length(y: Any, predicted: Any) -> bool:
    """Whether both have as many rows; True where chunks of unknown size hide the number."""
    lengths = y.shape[0], predicted.shape[0]
    return bool(np.isnan(lengths).any()) or lengths[0] == lengths[1]

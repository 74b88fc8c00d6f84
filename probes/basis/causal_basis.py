"""`CausalBasis`: directions of each layer whose ablation changes a lens's predictions most.

`fit` takes a cache and a fitted lens, without the model: second moments (`moments/`) give the
coordinates and the mean, `layer_fit.py` fits each layer. Fitted bases are applied and saved here.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.devices import memory_budget
from ...cache.errors import NotFoundError, ResiduaWarning, UsageError
from ...cache.files.json_fields import integer_field
from ...cache.number_ranges import as_tuple, as_whole_number
from ...cache.progress import Auto, StageProgress, show_stages
from ...cache.store.activation_cache import ActivationCache
from ..base.fitted_probe import FittedProbe
from ..base.params import Params
from ..base.resources import default_memory, device_of_fit
from ..base.saved_tensors import SavedTensors
from ..lens.logit_lens import LogitLens
from ..moments.moment_sources import obtain_moments
from ..moments.moments import Moments, merge_all
from ..moments.pass_plan import MomentRequest
from ..ridge.solver import AffineMap
from ..saved.probe_methods import ProbeFiles
from ..saved.save import check_belongs
from ..training.checkpoint import lock_folder
from .fit_settings import BasisFitSettings
from .layer_basis import LayerBasis
from .metric_rows import with_number_keys

if TYPE_CHECKING:
    import torch

FOLDS = 5
"""Folds of the moments: the same as ridge and lens, so that kept moments serve all of them."""
KEPT_SHARE = 0.6
"""Share of the memory behind head and buffers that tensors of rows may take."""
BUFFERS = 64 << 20
"""Bytes of the buffers of each thread."""


class CausalBasis(FittedProbe, ProbeFiles, Params):
    """k directions of every layer whose ablation changes a lens's predictions most.

    Causal basis extraction (Belrose et al., 2303.08112, section 4) from a cache. The objective is
    the mean over positions of KL(lens(h) || lens(h ablated)) in nats, where ablating a span
    replaces the row's coordinates in the span by those of `reference`: the mean row, `zero`, or
    another row (`resample`, a fixed permutation).

    `metric` says which coordinates: `covariance` removes a direction together with what the other
    coordinates predict of it (LEACE's projection, 2306.03819), so that ablated rows stay among
    those that the model has; `euclidean` is the paper's orthogonal projection, which with a good
    lens finds directions that matter to the lens alone (docs/basis.md). `method` is `joint` (the
    span with the largest KL, ordered), `greedy` (the paper's sequence), `one-shot` or `fisher`
    (closed forms); see `basis_methods.py`.

    Fitted on `positions` random positions of the train split, measured on `test_positions` of the
    test split. The `drop_first` first positions of each sequence, attention sinks in many models,
    are left out. `layers` defaults to all that the lens has, at the lens's `offset`.
    """

    kind = "basis"
    fitted_attribute = "bases_"

    def __init__(
        self,
        k: int = 8,
        layers: int | Sequence[int] | None = None,
        method: str = "joint",
        metric: str = "covariance",
        reference: str = "mean",
        offset: int = 0,
        positions: int = 16384,
        test_positions: int = 8192,
        seed: int = 0,
        drop_first: int = 0,
    ) -> None:
        self.k = k
        self.layers = layers
        self.method = method
        self.metric = metric
        self.reference = reference
        self.offset = offset
        self.positions = positions
        self.test_positions = test_positions
        self.seed = seed
        self.drop_first = drop_first

    bases_: dict[int, LayerBasis]
    """The basis of each layer."""
    pca_: dict[int, LayerBasis]
    """The directions of largest variance of each layer, for comparison."""
    random_: dict[int, LayerBasis]
    """Random directions of each layer, orthonormal in the metric, for comparison."""

    def fit(
        self,
        X: ActivationCache,
        lens: Any,
        *,
        client: Any = None,
        memory: int | None = None,
        scratch: str | Path | None = None,
        checkpoint: str | Path | None = None,
        progress: StageProgress | Auto | None = "auto",
        device: "str | torch.device" = "auto",
    ) -> "CausalBasis":
        """Fit the cache `X` with a fitted `lens`: `TunedLens`, `RidgeProbe` or `LogitLens`.

        `memory` in bytes bounds this process, or each worker of `client` (of `dask.distributed`).
        Products `(positions, vocab)` that do not fit are kept in a file in the folder `scratch`
        (see `scratch_bytes`), or computed again in every evaluation. With `checkpoint`, a folder,
        a killed fit that is started again goes on to the same bases. `progress` is "auto"
        (bars in a terminal or notebook, elsewhere lines of the logger `residua`), None (nothing),
        or a function that is called with (stage, done, total), stages `moments` (positions) and
        `basis` (evaluations).

        Moments, products and the evaluations run on `device`: `auto` is the first GPU, or the CPU
        (with a `client`: the workers' CPUs). Its memory bounds what is kept there, too, and blocks
        of rows are halved where the memory runs out. The search itself, of `(d_model, k)` numbers,
        and the eigenvectors of the covariance are computed on the host in float64.
        """
        from .layer_fit import LayerFitTask, checkpoint_of, fit_layer, load_fitted, save_fitted

        # Check everything before the first pass.
        settings = self._settings()
        if not isinstance(X, ActivationCache):
            raise UsageError("a causal basis is fitted on a cache: it needs the head beside rows")
        maps = lens_maps(X, lens, self._layers_of(X, lens), as_whole_number(self.offset, "offset"))
        budget = memory or default_memory()
        fit_device = device_of_fit(device, client)
        if fit_device is not None and client is None:
            budget = memory_budget(fit_device, budget)
        folder = None if checkpoint is None else Path(checkpoint)
        digests = {layer: map_digest(affine) for layer, affine in maps.items()}
        checkpoints = {
            layer: None if folder is None else checkpoint_of(folder, X, layer, settings, digest)
            for layer, digest in digests.items()
        }
        with lock_folder(folder), show_stages(progress) as show:
            finished = {
                layer: fitted
                for layer, saved in checkpoints.items()
                if saved is not None and (fitted := load_fitted(saved)) is not None
            }

            # Fit the layers, group by group of moments that fit the memory.
            def report(stage: str, done: float, total: float) -> None:
                if show is not None:
                    show(stage, int(done), max(1, int(total)))

            lacking = [layer for layer in maps if layer not in finished]
            for moments_of_layer in self._moments(
                X, lacking, memory, report, client=client, device=fit_device
            ):
                for layer, moments in moments_of_layer.items():

                    def report_layer(done: float, expected: float) -> None:
                        before = len(finished) * expected
                        report("basis", before + min(done, expected), len(maps) * expected)

                    task = LayerFitTask(
                        X,
                        layer,
                        maps[layer],
                        settings,
                        memory=kept_bytes(X, budget),
                        scratch=None if scratch is None else Path(scratch),
                        client=client,
                        checkpoint=checkpoints[layer],
                        device=fit_device,
                    )
                    finished[layer] = fit_layer(task, moments, report_layer)
                    if (saved := checkpoints[layer]) is not None:
                        save_fitted(saved, finished[layer])
                    report("basis", len(finished), len(maps))

            for saved in checkpoints.values():
                if saved is not None:
                    saved.remove()
        self._forget_folder()
        fitted_layers = {layer: finished[layer] for layer in sorted(finished)}
        self.bases_ = {layer: fitted.basis for layer, fitted in fitted_layers.items()}
        self.pca_ = {layer: fitted.pca for layer, fitted in fitted_layers.items()}
        self.random_ = {layer: fitted.random for layer, fitted in fitted_layers.items()}
        self._rows = {layer: fitted.row for layer, fitted in fitted_layers.items()}
        self.lens_: dict[str, Any] = {
            "kind": lens.kind,
            "maps": {str(layer): digests[layer] for layer in fitted_layers},
        }
        self.cache_id_: str | None = X.id
        self.geometry_: str | None = X.head.digest
        self.split_: str | None = "train"
        self.n_features_in_: int = X.d_model
        self._warn_of_empty_test_split()
        return self

    def scratch_bytes(self, X: ActivationCache, memory: int | None = None) -> int:
        """Size in bytes of the scratch file of a fit of the cache `X`; 0 if memory is enough."""
        from .ablation_objective import bytes_beyond_memory

        settings = self._settings()
        positions = X.sequence_length[X.sequences("train")].sum()
        n = min(settings.positions, int(positions))
        return bytes_beyond_memory(X.head, n, kept_bytes(X, memory or default_memory()))

    def _settings(self) -> BasisFitSettings:
        """The parameters of the fit; raises `UsageError` for those that cannot be right."""
        names = ("k", "positions", "test_positions", "seed", "drop_first")
        numbers = {name: as_whole_number(getattr(self, name), name) for name in names}
        return BasisFitSettings(
            method=self.method, metric=self.metric, reference=self.reference, **numbers
        ).check()

    def _layers_of(self, cache: ActivationCache, lens: Any) -> tuple[int, ...]:
        """The layers to fit: `layers`, or all of the cache that the lens reads at the offset."""
        if self.layers is not None:
            return tuple(dict.fromkeys(as_tuple(self.layers, "layers")))
        pairs = lens.pairs() if hasattr(lens, "pairs") else []
        layers = [layer for layer, offset in pairs if offset == self.offset and layer is not None]
        return tuple(layer for layer in sorted(set(layers)) if layer in cache.layers)

    def _moments(
        self,
        cache: ActivationCache,
        layers: Sequence[int],
        memory: int | None,
        report: Any,
        **resources: Any,
    ) -> Any:
        """Second moments of the train rows of `layers`, as many layers at a time as fit memory.

        `resources` are client and device.
        """
        if not layers:
            return
        drop_first = as_whole_number(self.drop_first, "drop_first")
        request = MomentRequest.of(cache, layers, (0,), None, folds=FOLDS, drop_first=drop_first)

        def report_moments(done: int, total: int) -> None:
            report("moments", done, total)

        for moment_set in obtain_moments(
            cache, request, memory=memory, progress=report_moments, **resources
        ):
            totals: dict[int, Moments] = {
                pair[0]: merge_all(folds) for pair, folds in moment_set.pairs.items()
            }
            del moment_set
            yield totals

    def _warn_of_empty_test_split(self) -> None:
        """Warn where nothing was measured on held-out rows."""
        if any(not row["n_test"] for row in self._rows.values()):
            warnings.warn(
                "the test split has too few positions to measure the bases on: span, pca and "
                "random are None; use more sequences",
                ResiduaWarning,
                stacklevel=3,
            )

    def basis(self, layer: int | None = None) -> LayerBasis:
        """The basis of `layer`; the layer may be left out if only one was fitted."""
        self.check_fitted()
        if layer is None and len(self.bases_) == 1:
            return next(iter(self.bases_.values()))
        if layer is None:
            raise UsageError(f"name a layer; bases are fitted at layers {list(self.bases_)}")
        if layer not in self.bases_:
            raise NotFoundError(
                f"no basis of layer {layer}; bases are fitted at layers {list(self.bases_)}"
            )
        return self.bases_[layer]

    def ablate(
        self,
        rows: Any,
        k: int | None = None,
        layer: int | None = None,
        *,
        replacement: Any = None,
    ) -> Any:
        """Rows `(..., d_model)` of numpy, dask or torch without their first `k` coordinates.

        The coordinates become those of the reference row, or of the rows `replacement`. `k`
        defaults to all directions.
        """
        return self.basis(layer).ablate(rows, k, replacement)

    def project(self, rows: Any, k: int | None = None, layer: int | None = None) -> Any:
        """Rows `(..., d_model)` with their first `k` coordinates alone; the others are removed."""
        return self.basis(layer).project(rows, k)

    def coordinates(self, rows: Any, k: int | None = None, layer: int | None = None) -> Any:
        """Coordinates `(..., k)` of rows `(..., d_model)` on the first `k` directions."""
        return self.basis(layer).coordinates(rows, k)

    def metrics(self) -> list[dict[str, Any]]:
        """One row per layer: energies, and KL of spans on held-out rows, in nats.

        `energies` `(k,)` is the KL of ablating each direction alone on the rows of the fit,
        `influences` on held-out rows. `span`, `pca` and `random` map a number of directions (1, 2,
        4, ..., k) to the held-out KL of ablating the first ones together, with a 95 % interval
        over documents. `evaluations` counts losses with gradient over all rows; `cpu_seconds`
        those of the fit, without the measures.
        """
        self.check_fitted()
        return [{"offset": self.offset, **self._rows[layer]} for layer in self.bases_]

    def add_measures(self, measures: Mapping[int, Mapping[str, Any]]) -> None:
        """Add columns to the rows of `metrics`, such as the influence in the model, by layer."""
        for layer, columns in measures.items():
            self._rows[layer] = {**self._rows[layer], **columns}

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A JSON object and tensors for `save_probe`; `restore` is the inverse."""
        self.check_fitted()
        config = {**self._origin(), "lens": self.lens_, "pairs": self.metrics()}
        tensors = {}
        for layer in self.bases_:
            for name, basis in self._bases_of(layer).items():
                tensors[f"{layer}.{name}.encoder"] = basis.encoder
                tensors[f"{layer}.{name}.decoder"] = basis.decoder
            tensors[f"{layer}.reference"] = self.bases_[layer].reference
        return config, tensors

    def _bases_of(self, layer: int) -> dict[str, LayerBasis]:
        return {"basis": self.bases_[layer], "pca": self.pca_[layer], "random": self.random_[layer]}

    @classmethod
    def restore(
        cls, params: dict[str, Any], config: dict[str, Any], tensors: Mapping[str, np.ndarray]
    ) -> "CausalBasis":
        """The fitted bases that `state` described."""
        tensors = SavedTensors.of(tensors)
        probe, width = cls(**params), config["d_model"]
        probe._rows = {}
        probe.bases_, probe.pca_, probe.random_ = {}, {}, {}
        for row in config["pairs"]:
            layer = integer_field(row, "layer")
            columns = {name: value for name, value in row.items() if name != "offset"}
            probe._rows[layer] = with_number_keys(columns)
            for name, bases in (
                ("basis", probe.bases_),
                ("pca", probe.pca_),
                ("random", probe.random_),
            ):
                bases[layer] = LayerBasis(
                    tensors.array(f"{layer}.{name}.encoder", (None, width)),
                    tensors.array(f"{layer}.{name}.decoder", (None, width)),
                    tensors.array(f"{layer}.reference", (width,)),
                )
        probe.lens_ = config["lens"]
        probe._restore_origin(config)
        return probe


def lens_maps(
    cache: ActivationCache, lens: Any, layers: Sequence[int], offset: int
) -> dict[int, AffineMap]:
    """The map of each layer to the last one, of a lens that belongs to `cache`; float32.

    Raises `UsageError` for a probe that is no affine lens, `NotFoundError` for a layer that the
    lens or the cache lacks.
    """
    residual_map = getattr(lens, "residual_map", None)
    if residual_map is None and not isinstance(lens, LogitLens):
        raise UsageError(
            f"a causal basis needs a lens (tuned lens, ridge to the last layer, logit lens); "
            f"{getattr(lens, 'kind', type(lens).__name__)} does not map a layer to the last one"
        )
    check_belongs(lens, cache)
    if not layers:
        raise UsageError(f"the lens reads no layer of this cache at offset {offset}")
    maps = {}
    for layer in layers:
        cache.residual_array(layer)
        if residual_map is None:
            identity = np.eye(cache.d_model, dtype=np.float32)
            maps[layer] = AffineMap(identity, np.zeros(cache.d_model, np.float32))
            continue
        affine = residual_map(layer, offset)
        if affine is None:
            raise UsageError(
                f"the lens maps layer {layer} to another layer than the last one, which the head "
                "reads; fit ridge without target"
            )
        maps[layer] = affine.astype(np.float32)
    return maps


def map_digest(affine: AffineMap) -> str:
    """Hex sha256 of a map's weight and bias."""
    hasher = hashlib.sha256(np.ascontiguousarray(affine.weight).data)
    hasher.update(np.ascontiguousarray(affine.bias).data)
    return hasher.hexdigest()


def kept_bytes(cache: ActivationCache, memory: int) -> int:
    """Bytes of `memory` that tensors of rows may take: behind head, its copy, and buffers."""
    return int(KEPT_SHARE * max(0, memory - 2 * cache.head.nbytes - BUFFERS))

"""Tuned lens and future lens: affine translators of each layer, fitted by KL to the model.

`TunedLens.fit` hands a cache to `fit_groups.py`, which starts from ridge (`ridge/solver.py`) and
takes natural-gradient steps (`translator_fit.py`); this file keeps, applies and saves the maps.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...cache.devices import choose_device
from ...cache.errors import ResiduaWarning, UsageError
from ...cache.number_ranges import as_tuple, as_whole_number
from ...cache.progress import Auto, StageProgress, show_stages
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import PairScope, crossing_shares
from ..base.arguments import as_array, warn_unvalidated
from ..base.fitted_maps import FittedMaps
from ..base.pair_offsets import check_pair_offsets
from ..base.params import Params
from ..base.readout import LayerOffset, ReadoutBatch
from ..base.saved_tensors import SavedTensors
from ..ridge.solver import AffineMap
from ..saved.probe_methods import ProbeFiles
from ..saved.save import check_finite

if TYPE_CHECKING:
    import torch


class TunedLens(FittedMaps[LayerOffset], ProbeFiles, Params):
    """Translators h + A h + b for every layer, so that head(translated) is close to the model.

    Minimises KL(model || lens), in nats, to the model's distribution at t+N on the train split of
    a cache, for each N of `offsets` (Belrose et al., 2303.08112; several offsets make a future
    lens, Pal et al., 2311.04897). Each (layer, offset) is fitted on its own: from ridge or the
    logit lens, whichever is better on the validation split, by at most `steps` steps of `batch`
    positions along the natural gradient, damped by `damping` of its mean curvature; it stops when
    the KL on the validation split has stopped falling. `lr` is a share of the full step; None takes
    the best of a short sweep. `products` is the dtype of the products with the unembedding in
    steps: `float32`, `bfloat16`, or `auto`, bfloat16 where the processor or device multiplies it
    faster.

    The translator with the least KL on the validation split is returned, so that none is worse on
    that split than the logit lens. Where the split has no pair at an offset, translators are
    fitted unvalidated, with a `ResiduaWarning`. `layers` defaults to all. At offset 0 the last
    layer is the model itself: its translator is the identity.

    Pairs (t, t+N) stay inside one document unless `across_documents`; the `drop_first` first
    positions of each sequence, attention sinks in many models, are not fitted. Memory: the moments
    of as many layers and offsets as fit `memory` in `fit`.
    """

    kind = "lens"
    later_params: ClassVar[dict[str, Any]] = {"products": "auto"}
    map_name = "translator"

    def __init__(
        self,
        offsets: int | Sequence[int] = 0,
        layers: Sequence[int] | None = None,
        lr: float | None = None,
        steps: int = 400,
        batch: int = 1024,
        damping: float = 0.1,
        seed: int = 0,
        across_documents: bool = False,
        drop_first: int = 0,
        products: str = "auto",
    ) -> None:
        self.offsets = offsets
        self.layers = layers
        self.lr = lr
        self.steps = steps
        self.batch = batch
        self.damping = damping
        self.seed = seed
        self.across_documents = across_documents
        self.drop_first = drop_first
        self.products = products

    def fit(
        self,
        X: ActivationCache,
        y: None = None,
        *,
        client: Any = None,
        memory: int | None = None,
        checkpoint: str | Path | None = None,
        progress: StageProgress | Auto | None = "auto",
        device: str = "auto",
    ) -> "TunedLens":
        """Fit the cache `X`; the model is not needed.

        With `checkpoint`, a folder, a killed fit that is started again continues from its last
        measurement on the validation split, to the same translators. `client` (of
        `dask.distributed`) shares the layers among its workers, `memory` in bytes bounds each.
        `progress` is "auto" (bars in a terminal or notebook, elsewhere lines of the logger
        `residua`), None (nothing), or a function that is called with (stage, done, total), stages
        `moments` (positions) and `lens` (steps). Steps run on `device`, `auto` for the first GPU or
        else the CPU; the result is on the CPU.
        """
        from ..ridge.error_share import error_shares, warn_of_domination
        from .fit_groups import fit_translator_groups
        from .translator_fit import LensFitSettings

        # Check the parameters.
        chosen_device = choose_device(device)
        if not isinstance(X, ActivationCache):
            raise UsageError("a tuned lens is fitted on a cache: it needs the head beside the rows")
        scope = PairScope(self.across_documents, self.drop_first).check()
        lr = None if self.lr is None else float(self.lr)
        steps, batch, seed = (
            as_whole_number(getattr(self, name), name) for name in ("steps", "batch", "seed")
        )
        settings = LensFitSettings(
            lr=lr,
            steps=steps,
            batch=batch,
            damping=float(self.damping),
            seed=seed,
            across_documents=scope.across_documents,
            drop_first=scope.drop_first,
            products=self._products(chosen_device),
        )
        layers = X.layers if self.layers is None else as_tuple(self.layers, "layers")
        offsets = as_tuple(self.offsets, "offsets")
        check_pair_offsets(X, offsets, scope)
        folder = None if checkpoint is None else Path(checkpoint)

        # Fit the translators.
        with show_stages(progress) as report:
            fits = fit_translator_groups(
                X,
                layers,
                offsets,
                settings,
                client=client,
                memory=memory,
                folder=folder,
                report=report,
                device=str(chosen_device) if client is None else device,
            )
        self._set_maps({pair: fit.map for pair, fit in fits.items()}, X.d_model)

        # Measure how few rows make most of their squared error, and which pairs join documents.
        maps = {(la, n, X.n_blocks): fit.map for (la, n), fit in fits.items()}
        shares = error_shares(X, maps, X.sequences("train"), scope)
        crossing = crossing_shares(X, X.sequences("train"), offsets, scope)
        self._rows = {
            pair: {
                **fit.row,
                "crossing": crossing[pair[1]],
                **shares[*pair, X.n_blocks].columns(),
            }
            for pair, fit in fits.items()
        }
        warn_of_domination(shares)
        self.cache_id_, self.geometry_, self.split_ = X.id, X.head.digest, "train"
        self._warn_of_missing_kl()
        return self

    def _products(self, device: "torch.device") -> str:
        """dtype of the products with the unembedding; raises `UsageError` for an unknown one."""
        from ..training.softmax_loss import PRODUCTS, fast_products

        if self.products not in PRODUCTS:
            raise UsageError(
                f"products must be one of {', '.join(PRODUCTS)}, not {self.products!r}"
            )
        return fast_products(device) if self.products == "auto" else self.products

    def _warn_of_missing_kl(self) -> None:
        """Warn of translators that were chosen without a KL on the validation split."""
        without_kl = {pair: row for pair, row in self._rows.items() if row["kl"] is None}
        unvalidated = [pair for pair, row in without_kl.items() if not row["n_validation"]]
        if unvalidated:
            warn_unvalidated(unvalidated, "they start from ridge and end with their last step")
        if undefined := [pair for pair in without_kl if pair not in unvalidated]:
            warnings.warn(
                f"the KL on the validation split is not finite for (layer, offset) {undefined}: "
                "their translators are those of the logit lens",
                ResiduaWarning,
                stacklevel=3,
            )

    def _set_maps(self, maps: Mapping[LayerOffset, AffineMap], d_model: int) -> None:
        """Replace the fit before by `maps`, of no cache yet."""
        self._forget_folder()
        self.maps_: dict[LayerOffset, AffineMap] = {pair: maps[pair] for pair in sorted(maps)}
        self.n_features_in_ = d_model
        self._rows: dict[LayerOffset, dict[str, Any]] = {}
        self._device_copies = {}
        self.cache_id_ = self.geometry_ = self.split_ = None

    @classmethod
    def of(cls, maps: Mapping[LayerOffset, AffineMap], geometry: str | None = None) -> "TunedLens":
        """A lens of maps `x @ weight + bias` that were fitted elsewhere, by (layer, offset).

        `geometry` is the digest of their head. Raises `UsageError` for a map that holds NaN or an
        infinity.
        """
        for (layer, offset), affine in maps.items():
            check_finite({f"{layer}.{offset}.weight": affine.weight}, "the lens")
            check_finite({f"{layer}.{offset}.bias": affine.bias}, "the lens")
        offsets = sorted({offset for _, offset in maps})
        lens = cls(offsets=offsets[0] if len(offsets) == 1 else offsets)
        lens._set_maps(maps, len(next(iter(maps.values())).bias))
        lens.geometry_ = geometry
        return lens

    def map(self, layer: int, offset: int | None = None) -> AffineMap:
        """The map `x @ weight + bias` of a layer; `offset` is needed if several were fitted."""
        key = self._find_key(layer, offset)
        return self.maps_[key]

    def residual_map(self, layer: int | None, offset: int) -> AffineMap | None:
        """The map from (layer, offset) to the last layer."""
        key = self._find_key(layer, offset)
        return self.maps_[key]

    def transform_hidden(self, h: Any, layer: int, offset: int | None = None) -> Any:
        """The translated residual stream of rows `(..., d_model)` of numpy, dask or torch.

        Rows of any dtype are cast to the translator's.
        """
        pair = self._find_key(layer, offset)
        is_torch = hasattr(h, "requires_grad")
        rows = h if is_torch else as_array(h, "h", known_length=False)
        if np.shape(rows)[-1:] != (self.n_features_in_,):
            raise UsageError(
                f"expected rows (..., {self.n_features_in_}), found shape {np.shape(rows)}"
            )
        if not is_torch:
            return self.maps_[pair](rows)
        weight, bias = self._on_device(pair, str(h.device))
        return h.to(weight.dtype) @ weight + bias

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Logits `(n, vocab)` that the head gives for the translated rows; float32."""
        if batch.hidden is None or layer is None:
            raise UsageError("a lens reads a layer; this batch has none")
        return batch.head(self.transform_hidden(batch.hidden, layer, offset))

    def metrics(self) -> list[dict[str, Any]]:
        """One row per (layer, offset): KL on the validation split before and after, in nats.

        `kl_logit` is the KL of the logit lens, `kl_ridge` of ridge, `kl` of the translator;
        `start` says which of the two the fit began from, `lr` the step length, `steps` the steps
        up to the returned translator, `taken` those of the whole fit, `sweep` the KL that each rate
        reached in the sweep, `backs` how often the rate was halved, `crossing` the share of the
        pairs of its sequences that join two documents (left out unless `across_documents`); the
        rest are the shares of
        `ErrorShare`. A KL is None where it is not finite, or where the split has no pair
        (`n_validation` is 0).
        """
        self.check_fitted()
        return [
            {"layer": pair[0], "offset": pair[1], **self._rows.get(pair, {})} for pair in self.maps_
        ]

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A JSON object and tensors for `save_probe`; `restore` is the inverse."""
        config = {**self._origin(), "pairs": self.metrics()}
        tensors = {}
        for (layer, offset), affine in self.maps_.items():
            tensors[f"{layer}.{offset}.weight"] = affine.weight
            tensors[f"{layer}.{offset}.bias"] = affine.bias
        return config, tensors

    @classmethod
    def restore(
        cls, params: dict[str, Any], config: dict[str, Any], tensors: Mapping[str, np.ndarray]
    ) -> "TunedLens":
        """The fitted lens that `state` described."""
        tensors = SavedTensors.of(tensors)
        lens, width = cls(**params), config["d_model"]
        rows = {(row["layer"], row["offset"]): row for row in config["pairs"]}
        maps = {
            (la, n): AffineMap(
                tensors.array(f"{la}.{n}.weight", (width, None)),
                tensors.array(f"{la}.{n}.bias", (None,)),
            )
            for la, n in rows
        }
        lens._set_maps(maps, config["d_model"])
        lens._rows = {
            pair: {name: value for name, value in row.items() if name not in ("layer", "offset")}
            for pair, row in rows.items()
        }
        lens._restore_origin(config)
        return lens


class FutureLens(TunedLens):
    """A tuned lens for several offsets: predicts the model's distribution up to 8 tokens on."""

    kind = "future"

    def __init__(
        self,
        offsets: int | Sequence[int] = tuple(range(9)),
        layers: Sequence[int] | None = None,
        lr: float | None = None,
        steps: int = 400,
        batch: int = 1024,
        damping: float = 0.1,
        seed: int = 0,
        across_documents: bool = False,
        drop_first: int = 0,
        products: str = "auto",
    ) -> None:
        super().__init__(
            offsets=offsets,
            layers=layers,
            lr=lr,
            steps=steps,
            batch=batch,
            damping=damping,
            seed=seed,
            across_documents=across_documents,
            drop_first=drop_first,
            products=products,
        )

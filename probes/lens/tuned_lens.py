"""Tuned lens: translators of the residual stream, fitted by KL to the model; also N tokens on."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import NotFoundError, ResiduaWarning, UsageError
from ...cache.number_ranges import as_tuple, as_whole_number
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import PairScope, crossing_shares
from ..base.arguments import as_array, warn_unvalidated
from ..base.params import Params
from ..base.readout import LayerOffset, ReadoutBatch
from ..ridge.solver import AffineMap
from ..saved.save import check_finite

if TYPE_CHECKING:
    import torch


class TunedLens(Params):
    """Translators h + A h + b for every layer, so that head(translated) is close to the model.

    Minimises KL(model || lens), in nats, to the model's distribution at t + `offset` (Belrose et
    al., 2303.08112; several offsets make a future lens, Pal et al., 2311.04897), on the train
    split of a cache. Each layer and offset is fitted for itself: from ridge or the logit lens,
    whichever is better on the validation split, by `steps` steps of `batch` positions along the
    natural gradient, damped by `damping` of its mean curvature. `lr` is a share of the full step;
    None: the best of a short sweep. The best translator found on the validation split is kept, so
    that none is worse there than the logit lens; where that split has no pair at an offset,
    translators are fitted unvalidated, with a `ResiduaWarning`. `layers` defaults to all. At offset
    0 the last layer is the model itself: its translator is the identity. Pairs (t, t+N) stay inside
    one document unless `across_documents`; the `drop_first` first positions of each sequence,
    attention sinks in many models, are not fitted.
    Memory: that of the moments of as many layers and offsets as `memory` in `fit` has room for.
    """

    kind = "lens"

    def __init__(
        self,
        offset: int | Sequence[int] = 0,
        layers: Sequence[int] | None = None,
        lr: float | None = None,
        steps: int = 400,
        batch: int = 1024,
        damping: float = 0.1,
        seed: int = 0,
        across_documents: bool = False,
        drop_first: int = 0,
    ) -> None:
        self.offset = offset
        self.layers = layers
        self.lr = lr
        self.steps = steps
        self.batch = batch
        self.damping = damping
        self.seed = seed
        self.across_documents = across_documents
        self.drop_first = drop_first

    def fit(
        self,
        X: ActivationCache,
        y: None = None,
        *,
        client: Any = None,
        memory: int | None = None,
        checkpoint: str | Path | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> "TunedLens":
        """Fit the cache `X`; the model is not needed.

        With `checkpoint`, a folder, a fit that was killed goes on from its last look at the
        validation split, to the same translators. `client` (of `dask.distributed`) shares the
        layers among its workers, `memory` in bytes bounds each. `progress` is called with (stage,
        done, total), stages `moments` (positions) and `lens` (steps).
        """
        from ..ridge.error_share import error_shares, warn_of_domination
        from .fit_groups import fit_translator_groups
        from .translator_fit import LensFitSettings

        if not isinstance(X, ActivationCache):
            raise UsageError("a tuned lens is fitted on a cache: it needs the head beside the rows")
        scope = PairScope(self.across_documents, self.drop_first).check()
        lr = None if self.lr is None else float(self.lr)
        steps, batch, seed = (
            as_whole_number(getattr(self, name), name) for name in ("steps", "batch", "seed")
        )
        settings = LensFitSettings(
            lr, steps, batch, float(self.damping), seed, scope.across_documents, scope.drop_first
        )
        layers = X.layers if self.layers is None else as_tuple(self.layers, "layers")
        offsets = as_tuple(self.offset, "offset")
        folder = None if checkpoint is None else Path(checkpoint)
        found = fit_translator_groups(
            X,
            layers,
            offsets,
            settings,
            client=client,
            memory=memory,
            folder=folder,
            report=progress,
        )
        self._keep({pair: fitted.map for pair, fitted in found.items()}, X.d_model)
        shares = {(la, n, X.n_blocks): fitted.map for (la, n), fitted in found.items()}
        shares = error_shares(X, shares, X.sequences("train"), scope)
        crossing = crossing_shares(X, X.sequences("train"), offsets, scope)
        self._rows = {
            pair: {
                **fitted.row,
                "crossing": crossing[pair[1]],
                **(shares[*pair, X.n_blocks].columns()),
            }
            for pair, fitted in found.items()
        }
        warn_of_domination(shares)
        self.cache_id_, self.geometry_, self.split_ = X.id, X.head.digest, "train"
        self._warn_of_kl()
        return self

    def _warn_of_kl(self) -> None:
        """Warn of translators that were chosen without a KL on the validation split."""
        checked = {pair: row for pair, row in self._rows.items() if row["kl"] is None}
        unvalidated = [pair for pair, row in checked.items() if not row["n_validation"]]
        if unvalidated:
            warn_unvalidated(unvalidated, "they start from ridge and end with their last step")
        if undefined := [pair for pair in checked if pair not in unvalidated]:
            warnings.warn(
                f"the KL on the validation split is not finite for (layer, offset) {undefined}: "
                "their translators are those of the logit lens",
                ResiduaWarning,
                stacklevel=3,
            )

    def _keep(self, maps: Mapping[LayerOffset, AffineMap], d_model: int) -> None:
        self.maps_ = {pair: maps[pair] for pair in sorted(maps)}
        self.n_features_in_ = d_model
        self._rows: dict[LayerOffset, dict[str, Any]] = {}
        self._tensors: dict[tuple[LayerOffset, str], tuple[torch.Tensor, torch.Tensor]] = {}
        self.cache_id_: str | None = None
        self.geometry_: str | None = None
        self.split_: str | None = None

    @classmethod
    def of(cls, maps: Mapping[LayerOffset, AffineMap], geometry: str | None = None) -> "TunedLens":
        """A lens of maps `x @ weight + bias` that were fitted elsewhere, by (layer, offset).

        Raises `UsageError` for a map that holds NaN or an infinity.
        """
        for (layer, offset), found in maps.items():
            check_finite({f"{layer}.{offset}.weight": found.weight}, "the lens")
            check_finite({f"{layer}.{offset}.bias": found.bias}, "the lens")
        offsets = sorted({offset for _, offset in maps})
        lens = cls(offset=offsets[0] if len(offsets) == 1 else offsets)
        lens._keep(maps, len(next(iter(maps.values())).bias))
        lens.geometry_ = geometry
        return lens

    def pairs(self) -> list[tuple[int | None, int]]:
        """The fitted (layer, offset) pairs."""
        self.check_fitted()
        return list(self.maps_)

    def map(self, layer: int, offset: int | None = None) -> AffineMap:
        """The map `x @ weight + bias` of a layer; the offset may be left out where it is one."""
        return self.maps_[self._pair(layer, offset)]

    def _pair(self, layer: int | None, offset: int | None) -> LayerOffset:
        self.check_fitted()
        found = [p for p in self.maps_ if p[0] == layer and offset in (None, p[1])]
        if len(found) == 1:
            return found[0]
        fitted = ", ".join(f"({la}, {n})" for la, n in self.maps_)
        if not found:
            raise NotFoundError(
                f"no translator for layer {layer}, offset {offset}; fitted are {fitted}"
            )
        raise UsageError(f"name an offset; fitted (layer, offset) are {fitted}")

    def transform_hidden(self, h: Any, layer: int, offset: int | None = None) -> Any:
        """The translated residual stream of rows `(..., d_model)` of numpy, dask or torch.

        Rows of any dtype are cast to the translator's.
        """
        pair = self._pair(layer, offset)
        is_torch = type(h).__module__.partition(".")[0] == "torch"
        rows = h if is_torch else as_array(h, "h", known=False)
        if np.shape(rows)[-1:] != (self.n_features_in_,):
            raise UsageError(
                f"expected rows (..., {self.n_features_in_}), found shape {np.shape(rows)}"
            )
        if not is_torch:
            return self.maps_[pair](rows)
        weight, bias = self._torch(pair, str(h.device))
        return h.to(weight.dtype) @ weight + bias

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Logits `(n, vocab)` that the head gives for the translated rows; float32."""
        if batch.hidden is None or layer is None:
            raise UsageError("a lens reads a layer; this batch has none")
        return batch.head(self.transform_hidden(batch.hidden, layer, offset))

    def _torch(self, pair: LayerOffset, device: str) -> "tuple[torch.Tensor, torch.Tensor]":
        import torch

        if (pair, device) not in self._tensors:
            found = self.maps_[pair].astype(np.float32)
            # Copies: torch aligns its own memory, on which the last bits of a product depend.
            weight, bias = (torch.tensor(a, device=device) for a in (found.weight, found.bias))
            self._tensors[pair, device] = weight, bias
        return self._tensors[pair, device]

    def residual_map(self, layer: int | None, offset: int) -> AffineMap | None:
        """The map to the last layer of a (layer, offset)."""
        return self.maps_[self._pair(layer, offset)]

    def metrics(self) -> list[dict[str, Any]]:
        """One row per (layer, offset): KL on the validation split before and after, in nats.

        `kl_logit` is the logit lens's, `kl_ridge` ridge's, `kl` the lens's own; `start` says which
        it began from, `lr` the step length, `steps` those that the kept translator had taken,
        `sweep` the KL that each rate reached in the sweep, `backs` how often the rate was halved,
        `crossing` the share of the pairs of its sequences that join two documents (left out unless
        `across_documents`), the others the shares of `ErrorShare`. A KL is None where it is not
        finite, or where the split has no pair (`n_validation` is 0).
        """
        self.check_fitted()
        return [
            {"layer": pair[0], "offset": pair[1], **self._rows.get(pair, {})} for pair in self.maps_
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), **({"_tensors": {}} if hasattr(self, "_tensors") else {})}

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What `save_probe` writes: a JSON object and tensors."""
        rows = self.metrics()
        about = {"cache": self.cache_id_, "geometry": self.geometry_, "split": self.split_}
        tensors = {}
        for (layer, offset), found in self.maps_.items():
            tensors[f"{layer}.{offset}.weight"] = found.weight
            tensors[f"{layer}.{offset}.bias"] = found.bias
        return {**about, "d_model": self.n_features_in_, "pairs": rows}, tensors

    @classmethod
    def restore(
        cls, params: dict[str, Any], config: dict[str, Any], tensors: dict[str, np.ndarray]
    ) -> "TunedLens":
        """The lens that `state` described."""
        lens = cls(**params)
        rows = {(row["layer"], row["offset"]): row for row in config["pairs"]}
        maps = {
            (la, n): AffineMap(tensors[f"{la}.{n}.weight"], tensors[f"{la}.{n}.bias"])
            for la, n in rows
        }
        lens._keep(maps, config["d_model"])
        lens._rows = {
            pair: {k: v for k, v in row.items() if k not in ("layer", "offset")}
            for pair, row in rows.items()
        }
        lens.cache_id_, lens.geometry_ = config["cache"], config["geometry"]
        lens.split_ = config["split"]
        return lens


class FutureLens(TunedLens):
    """A tuned lens for several offsets: what the model will say up to 8 tokens further on."""

    kind = "future"

    def __init__(
        self,
        offset: int | Sequence[int] = tuple(range(9)),
        layers: Sequence[int] | None = None,
        lr: float | None = None,
        steps: int = 400,
        batch: int = 1024,
        damping: float = 0.1,
        seed: int = 0,
        across_documents: bool = False,
        drop_first: int = 0,
    ) -> None:
        super().__init__(
            offset, layers, lr, steps, batch, damping, seed, across_documents, drop_first
        )

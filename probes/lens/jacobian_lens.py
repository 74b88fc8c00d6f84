"""Jacobian lens: the mean Jacobian of a layer to the last one as the translator of a lens.

J_l = E[sum over t' >= t of d h_L[t'] / d h_l[t]], a mean over prompts and source positions t of
the effect on all positions of the last layer (Gurnee et al., 2026, "Verbalizable Representations
Form a Global Workspace in Language Models"; the logit lens is J = identity). `JacobianLens` reads
h through J; `jacobian_lens_files.py` reads and writes files of such lenses.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import MismatchError, NotFoundError, UsageError
from ...cache.files.json_fields import integer_field, optional_field
from ...cache.number_ranges import as_tuple, format_ranges
from ..base.fitted_maps import FittedMaps
from ..base.params import Params
from ..base.readout import LayerOffset, ReadoutBatch
from ..base.saved_tensors import SavedTensors
from ..ridge.solver import AffineMap
from ..saved.probe_methods import ProbeFiles
from ..saved.save import check_finite

if TYPE_CHECKING:
    import torch

    from ...cache.store.activation_cache import ActivationCache


class JacobianLens(FittedMaps[LayerOffset], ProbeFiles, Params):
    """Logits head(J_l h) of a layer l, or head(J_l (h - mean_l) + mean_L) if `centered`.

    J_l `(d_model, d_model)` has d h_L[i] / d h_l[j] in row i and column j. The lens says the same
    at every offset of `offsets`, since J sums effects on the position itself and on later ones;
    evaluation scores it against each. Lenses are made by `JacobianLens.of`, or read from files by
    `read_jacobian_lens`; `with_means` takes the means from a cache.
    """

    kind = "jacobian"
    map_name = "Jacobian"

    jacobians_: dict[int, np.ndarray]
    """Layer -> J_l, `(d_model, d_model)` floats."""
    means_: dict[int, np.ndarray]
    """Layer -> mean residual stream `(d_model,)`; empty, or with all layers of the lens and L."""
    depth_: int | None
    """L, the layer that J leads to; None if the file does not say."""
    n_prompts_: int | None
    """Prompts behind the mean Jacobian."""
    n_positions_: int | None
    """Source positions behind the mean Jacobian."""

    def __init__(self, offsets: int | Sequence[int] = 0, centered: bool = False) -> None:
        self.offsets = offsets
        self.centered = centered

    @classmethod
    def of(
        cls,
        jacobians: Mapping[int, np.ndarray],
        means: Mapping[int, np.ndarray] | None = None,
        *,
        depth: int | None = None,
        offsets: int | Sequence[int] = 0,
        centered: bool = False,
        n_prompts: int | None = None,
        n_positions: int | None = None,
        geometry: str | None = None,
        cache_id: str | None = None,
        split: str | None = None,
    ) -> "JacobianLens":
        """A lens of `jacobians` by layer; `means` has the layers and `depth`.

        `geometry` is the digest of the model's head, `cache_id` and `split` what gave the means or
        the prompts. Raises `UsageError` for matrices of other shapes, for values that are not
        finite, and for a centered lens without means.
        """
        lens = cls(offsets=offsets, centered=centered)
        lens._set_jacobians(dict(jacobians), dict(means or {}), depth)
        lens.n_prompts_, lens.n_positions_ = n_prompts, n_positions
        lens.geometry_, lens.cache_id_, lens.split_ = geometry, cache_id, split
        return lens

    def _set_jacobians(
        self, jacobians: dict[int, np.ndarray], means: dict[int, np.ndarray], depth: int | None
    ) -> None:
        """Check the matrices and make the maps."""
        if not jacobians:
            raise UsageError("a Jacobian lens needs a Jacobian of one layer at least")
        shapes = {layer: np.shape(matrix) for layer, matrix in jacobians.items()}
        width = next(iter(shapes.values()))[:1]
        if any(len(shape) != 2 or shape != (*width, *width) for shape in shapes.values()):
            raise UsageError(f"expected square Jacobians of one width, found {shapes}")
        if depth is not None and not max(jacobians) < depth:
            raise UsageError(
                f"a Jacobian of layer {max(jacobians)} cannot lead to layer {depth}, which is "
                "not above it"
            )
        if means and (depth is None or not {*jacobians, depth} <= set(means)):
            raise UsageError(
                f"means are needed for layers {format_ranges(sorted(jacobians))} and the last "
                f"layer; found {format_ranges(sorted(means))}, last layer {depth}"
            )
        means = {layer: mean for layer, mean in means.items() if layer in {*jacobians, depth}}
        if any(np.shape(mean) != width for mean in means.values()):
            raise UsageError(f"expected means of width {width[0]}")
        check_finite({f"J.{la}": matrix for la, matrix in jacobians.items()}, "the Jacobian lens")
        check_finite({f"mean.{la}": mean for la, mean in means.items()}, "the Jacobian lens")
        if self.centered and not means:
            raise UsageError(
                "a centered Jacobian lens needs the means of its layers: read it with a cache, or "
                "call with_means(cache)"
            )
        self._forget_folder()
        self.jacobians_ = {}
        self.means_ = {layer: means[layer] for layer in sorted(means)}
        self.depth_ = depth
        self.n_features_in_: int = int(width[0])
        self.n_prompts_ = self.n_positions_ = None
        self.cache_id_: str | None = None
        self.geometry_: str | None = None
        self.split_: str | None = None
        self._device_copies = {}
        self.maps_: dict[LayerOffset, AffineMap] = {}
        for layer in sorted(jacobians):
            matrix = np.asarray(jacobians[layer])
            matrix = matrix if matrix.dtype == np.float64 else matrix.astype(np.float32, copy=False)
            bias = np.zeros(self.n_features_in_)
            if self.centered:
                assert depth is not None
                bias = means[depth].astype(np.float64) - matrix @ means[layer].astype(np.float64)
            # `AffineMap` is h @ weight, and one map serves all offsets.
            affine = AffineMap(matrix.T, bias.astype(matrix.dtype))
            self.jacobians_[layer] = affine.weight.T
            self.maps_ |= {(layer, n): affine for n in as_tuple(self.offsets, "offsets")}

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have a Jacobian, ascending."""
        self.check_fitted()
        return tuple(self.jacobians_)

    def map(self, layer: int, offset: int | None = None) -> AffineMap:
        """The map `x @ weight + bias` of a layer, the same at every offset."""
        return self.maps_[self._first_key(layer)]

    def residual_map(self, layer: int | None, offset: int) -> AffineMap | None:
        """The map from (layer, offset) to the last layer."""
        return self.maps_[self._find_key(layer, offset)]

    def _first_key(self, layer: int) -> LayerOffset:
        """Key of the layer at the first of the offsets, which share one map."""
        return self._find_key(layer, as_tuple(self.offsets, "offsets")[0])

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Logits `(n, vocab)` that the head gives for the transported rows; float32."""
        import torch

        if batch.hidden is None or layer is None:
            raise UsageError("a Jacobian lens reads a layer; this batch has none")
        self._find_key(layer, offset)
        weight, bias = self._on_device(self._first_key(layer), str(batch.hidden.device))
        return batch.head(torch.addmm(bias, batch.hidden.to(weight.dtype), weight))

    def with_options(
        self, *, offsets: int | Sequence[int] | None = None, centered: bool | None = None
    ) -> "JacobianLens":
        """The same Jacobians read at other offsets, or with or without the correction of means."""
        self.check_fitted()
        return JacobianLens.of(
            self.jacobians_,
            self.means_,
            offsets=self.offsets if offsets is None else offsets,
            centered=self.centered if centered is None else centered,
            **self._provenance(),
        )

    def with_means(self, cache: "ActivationCache", split: str = "train") -> "JacobianLens":
        """A centered lens with the mean residual streams of a split of `cache`, one pass a layer.

        Raises `NotFoundError` for a layer that the cache lacks, `UsageError` for a split without
        positions, and `MismatchError` for a cache of another shape.
        """
        check_shape(self, cache)
        missing = sorted({*self.layers, cache.n_blocks} - set(cache.layers))
        if missing:
            raise NotFoundError(
                f"the means need layers {format_ranges(missing)}, which this cache lacks; it holds "
                f"{format_ranges(cache.layers)}"
            )
        means = mean_states(cache, (*self.layers, cache.n_blocks), split)
        origin = {"depth": cache.n_blocks, "geometry": cache.head.digest}
        return JacobianLens.of(
            self.jacobians_,
            means,
            offsets=self.offsets,
            centered=True,
            **{**self._provenance(), **origin, "cache_id": cache.id, "split": split},
        )

    def _provenance(self) -> dict[str, Any]:
        """Depth, counts and origin as keywords of `of`."""
        return {
            "depth": self.depth_,
            "n_prompts": self.n_prompts_,
            "n_positions": self.n_positions_,
            "geometry": self.geometry_,
            "cache_id": self.cache_id_,
            "split": self.split_,
        }

    def metrics(self) -> list[dict[str, Any]]:
        """One row per (layer, offset); nothing was measured when the Jacobians were averaged."""
        self.check_fitted()
        return [{"layer": layer, "offset": offset} for layer, offset in self.maps_]

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A JSON object and tensors for `save_probe`; `restore` is the inverse."""
        config = {
            **self._origin(),
            "depth": self.depth_,
            "n_prompts": self.n_prompts_,
            "n_positions": self.n_positions_,
            "pairs": self.metrics(),
        }
        tensors = {f"J.{layer}": matrix for layer, matrix in self.jacobians_.items()}
        return config, tensors | {f"mean.{layer}": mean for layer, mean in self.means_.items()}

    @classmethod
    def restore(
        cls, params: dict[str, Any], config: dict[str, Any], tensors: Mapping[str, np.ndarray]
    ) -> "JacobianLens":
        """The lens that `state` described."""
        tensors, width = SavedTensors.of(tensors), config["d_model"]
        depth = optional_field(integer_field, config, "depth")
        layers = {row["layer"] for row in config["pairs"]}
        with_means = {*layers, depth} if f"mean.{depth}" in tensors else set()
        lens = cls.of(
            {layer: tensors.array(f"J.{layer}", (width, width)) for layer in layers},
            {layer: tensors.array(f"mean.{layer}", (width,)) for layer in with_means},
            depth=depth,
            n_prompts=optional_field(integer_field, config, "n_prompts"),
            n_positions=optional_field(integer_field, config, "n_positions"),
            **params,
        )
        lens._restore_origin(config)
        return lens


def check_shape(lens: JacobianLens, cache: "ActivationCache") -> None:
    """Raise `MismatchError` unless width and depth of `lens` are those of the model of `cache`."""
    lens.check_fitted()
    depth, top = lens.depth_, max(lens.layers)
    fits = depth == cache.n_blocks if depth is not None else top < cache.n_blocks
    if lens.n_features_in_ != cache.d_model or not fits:
        blocks = f"{depth} blocks" if depth is not None else f"more than {top} blocks"
        raise MismatchError(
            f"the Jacobian lens is for width {lens.n_features_in_} and {blocks}, this cache has "
            f"width {cache.d_model} and {cache.n_blocks} blocks; take a cache of the lens's model"
        )


def mean_states(
    cache: "ActivationCache", layers: Sequence[int], split: str = "train"
) -> dict[int, np.ndarray]:
    """Mean residual stream of each of `layers` over a split, `(d_model,)` float32."""
    sequences = cache.sequences(split)
    if not cache.sequence_length[sequences].sum():
        raise UsageError(f"the split {split!r} of this cache has no positions to average")
    means = {}
    for layer in dict.fromkeys(layers):
        array, total, count = cache.residual_array(layer), np.zeros(cache.d_model), 0
        for block in cache.blocks(sequences):
            rows = array.take(cache.positions_of(block))
            total += rows.sum(0, dtype=np.float64)
            count += len(rows)
        means[layer] = (total / count).astype(np.float32)
    return means

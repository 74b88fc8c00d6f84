"""Control probes: any probe of the residual stream, fitted on a cache with one thing changed.

`ControlProbe` fits a copy of the probe on a `CacheView` (`cache_views.py`), in which inputs or
targets are replaced; positions meet by the permutation of `position_shuffle.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.number_ranges import as_tuple, as_whole_number
from ...cache.store.activation_cache import ActivationCache
from ..base.display_methods import HeatmapMethods
from ..base.fitted_probe import FittedProbe
from ..base.params import Params
from ..base.readout import ReadoutBatch, check_readout
from ..saved.probe_methods import ProbeFiles
from .cache_views import (
    CONTROLS,
    CacheView,
    NextToken,
    PermutedLabels,
    TorchHeadOfFirstHalf,
    view_of,
)

if TYPE_CHECKING:
    import torch


class ControlProbe(FittedProbe, HeatmapMethods, ProbeFiles, Params):
    """`probe` fitted, by its own code, on a cache in which one thing is changed by `control`.

    - `shuffled`: the probe reads the state of a position of another sequence, in the fit and in
      evaluation. Measures a probe without knowledge of its input: only the marginal of states is
      left.
    - `permuted`: the probe is fitted to the targets of positions of other sequences, and evaluated
      on the right states and targets. Measures what a fit finds in labels without a signal (a
      control task in the sense of Hewitt and Liang, 2019).
    - `next-token`: the probe reads [residual_l[t]; residual_0[t+1]], the state beside the embedding
      output of the next token; for offsets N >= 1. Where a state adds little to that embedding, a
      probe of the state is about the next token.

    Nothing is written: the cache is read through a thin view, out of core; `seed` decides which
    positions meet (see `PositionShuffle`). In tables the name is, for example, `ridge/shuffled`.
    """

    fitted_attribute = "probe_"

    def __init__(self, probe: Any, control: str = "shuffled", seed: int = 0) -> None:
        self.probe = probe
        self.control = control
        self.seed = seed

    @property
    def kind(self) -> str:
        """`<kind of the probe>/<control>`."""
        return f"{self.probe.kind}/{self.control}"

    def fit(self, X: ActivationCache, y: None = None, **options: Any) -> "ControlProbe":
        """Fit a copy of the probe on the changed cache `X`; `options` are those of its `fit`."""
        if not isinstance(X, ActivationCache):
            raise UsageError("a control is fitted on a cache: it needs the sequences of the rows")
        if options.get("keep"):
            raise UsageError("moments of a control are not kept with the cache; leave keep out")
        self._check_params()
        view = view_of(X, self.control, as_whole_number(self.seed, "seed"))
        probe = type(self.probe)(**self.probe.get_params(deep=False))
        if "keep" in signature(probe.fit).parameters:
            # Moments of a control are no use to another fit.
            options["keep"] = False
        self._forget_folder()
        self.probe_: Any = probe.fit(view, **options)
        self.cache_id_: str | None = X.id
        self.geometry_: str | None = X.head.digest
        self.split_: str | None = "train"
        self.n_features_in_: int = X.d_model
        return self

    def _check_params(self) -> None:
        """Raise `UsageError` for a control that the probe cannot have."""
        if self.control not in CONTROLS:
            raise UsageError(f"control must be one of {', '.join(CONTROLS)}, not {self.control!r}")
        check_readout(self.probe)
        params = self.probe.get_params()
        if params.get("target") is not None:
            raise UsageError("a control predicts the last layer; leave target out")
        offsets = as_tuple(params["offsets"], "offsets")
        if self.control == NextToken.name and min(offsets, default=0) < 1:
            raise UsageError(
                "the next token is what is to be predicted at offset 0: the control next-token is "
                f"for offsets of 1 or more, not {list(offsets)}"
            )

    def view(self, cache: ActivationCache) -> CacheView:
        """`cache` as this probe reads it in evaluation: with the right targets."""
        view_class = CacheView if self.control == PermutedLabels.name else CONTROLS[self.control]
        return view_class(cache, self.seed)

    def pairs(self) -> list[tuple[int | None, int]]:
        """The fitted (layer, offset) pairs."""
        self.check_fitted()
        return self.probe_.pairs()

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> "torch.Tensor":
        """Logits `(n, vocab)` for rows of the view of a cache; float32."""
        self.check_fitted()
        if self.control == NextToken.name:
            head: Any = TorchHeadOfFirstHalf(batch.head, self.n_features_in_)
            batch = replace(batch, head=head)
        return self.probe_.logits(batch, layer, offset)

    def score(self, X: ActivationCache, y: None = None, **options: Any) -> float:
        """The probe's `score` on the view of a cache."""
        self.check_fitted()
        if not isinstance(X, ActivationCache):
            raise UsageError("a control is scored on a cache: it needs the sequences of the rows")
        return self.probe_.score(self.view(X), y, **options)

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of the probe that was fitted."""
        self.check_fitted()
        return self.probe_.metrics()

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A JSON object and tensors for `save_probe`; `restore` is the inverse."""
        self.check_fitted()
        config, tensors = self.probe_.state()
        return {**self._origin(), "pairs": config["pairs"], "fitted": config}, tensors

    @classmethod
    def restore(
        cls, params: dict[str, Any], config: dict[str, Any], tensors: Mapping[str, np.ndarray]
    ) -> "ControlProbe":
        """The fitted control that `state` described; `params["probe"]` is a kind and its params."""
        from ..saved.kinds import probe_class

        base_class = probe_class(params["probe"]["kind"])
        base_params = params["probe"]["params"]
        control = cls(base_class(**base_params), params["control"], params["seed"])
        control.probe_ = base_class.restore(base_params, config["fitted"], tensors)
        control._restore_origin(config)
        return control


def as_control(probe: Any, control: str | None) -> Any:
    """`probe` itself, or its `ControlProbe` if a control is named."""
    return probe if control is None else ControlProbe(probe, control)

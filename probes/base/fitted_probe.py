"""Base of all probes and baselines: whether a probe is fitted, and on which cache.

`FittedMaps` (ridge, lenses, vocabulary probe), `CountBaseline` and `ControlProbe` inherit from
`FittedProbe`; `saved/save.py` writes the four facts into `config.json`.
"""

from typing import Any, ClassVar

from .display_methods import DisplayMethods


class NotFittedError(ValueError, AttributeError):
    """A probe was used before `fit`; the stand-in where scikit-learn is not installed."""


def not_fitted_error() -> type[Exception]:
    """scikit-learn's `NotFittedError`, or the stand-in above."""
    try:
        from sklearn import exceptions
    except ImportError:
        return NotFittedError
    return exceptions.NotFittedError


class FittedProbe(DisplayMethods):
    """The cache, head and split that a probe was fitted on; attributes that `fit` sets."""

    fitted_attribute: ClassVar[str] = "maps_"
    """Attribute that exists only after `fit`."""
    names_on_disk: ClassVar[dict[str, str]] = {}
    """Parameter -> its key in a saved `config.json`, for parameters that were renamed."""
    later_params: ClassVar[dict[str, Any]] = {}
    """Parameter -> its default, for parameters that earlier versions of this kind lacked."""

    cache_id_: str | None
    """Id of the cache; None for arrays."""
    geometry_: str | None
    """sha256 of the cache's head, `Head.digest`; None for arrays."""
    split_: str | None
    """Split of the cache that was fitted, None for arrays."""
    n_features_in_: int
    """Width of the rows that the probe reads; scikit-learn's name."""

    folder_: str
    """Folder, or repository of the hub, that the probe was loaded from; absent after a fit."""

    def _forget_folder(self) -> None:
        """The probe is fitted anew: no longer the one that was loaded."""
        self.__dict__.pop("folder_", None)

    def check_fitted(self) -> None:
        """Raise scikit-learn's `NotFittedError` before `fit`."""
        if not hasattr(self, self.fitted_attribute):
            raise not_fitted_error()(f"this {type(self).__name__} is not fitted; call fit first")

    def _origin(self) -> dict[str, Any]:
        """Cache, head, split and width under their keys in `config.json`."""
        return {
            "cache": self.cache_id_,
            "geometry": self.geometry_,
            "split": self.split_,
            "d_model": self.n_features_in_,
        }

    def _restore_origin(self, config: dict[str, Any]) -> None:
        """Set what `_origin` gave, from a loaded `config.json`."""
        self.cache_id_, self.geometry_ = config["cache"], config["geometry"]
        self.split_, self.n_features_in_ = config["split"], config["d_model"]

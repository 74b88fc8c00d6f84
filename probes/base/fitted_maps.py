"""Base of probes that fit one map per (layer, offset): ridge, tuned lenses, vocabulary probe.

Here are the look-up of a map with its error texts, float32 copies of maps on a device, and what
a pickle leaves out. The subclasses fit the maps and say how a map is applied.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np

from ...cache.errors import NotFoundError, UsageError
from .display_methods import HeatmapMethods
from .fitted_probe import FittedProbe

if TYPE_CHECKING:
    import torch


MapKey = tuple[int, ...]
"""(layer, offset), or (layer, offset, target layer) of a probe with several targets."""
Key = TypeVar("Key", bound=MapKey)


class WeightAndBias(Protocol):
    """An affine map x @ weight + bias, such as `AffineMap` of `ridge/solver.py`."""

    @property
    def weight(self) -> np.ndarray: ...

    @property
    def bias(self) -> np.ndarray: ...

    def astype(self, dtype: Any) -> Self: ...


class FittedMaps(FittedProbe, HeatmapMethods, Generic[Key]):
    """Fitted maps of a probe by (layer, offset[, target layer])."""

    names_on_disk: ClassVar[dict[str, str]] = {"offsets": "offset"}
    not_pickled: ClassVar[tuple[str, ...]] = ("_device_copies",)
    """Dictionaries that a pickle empties: copies on a device, state of a running fit."""
    map_name: ClassVar[str] = "map"
    """Word for a map in error texts."""

    _device_copies: "dict[tuple[Key, str], tuple[torch.Tensor, torch.Tensor]]"
    """Weight and bias by (key, device)."""

    def pairs(self) -> list[tuple[int | None, int]]:
        """The fitted (layer, offset) pairs."""
        self.check_fitted()
        return list(dict.fromkeys((key[0], key[1]) for key in self._fitted_maps()))

    def _fitted_maps(self) -> Mapping[Key, Any]:
        """The fitted maps by key."""
        return getattr(self, self.fitted_attribute)

    def _target_of(self, key: Key) -> int | None:
        """Target layer of a map; None for probes that predict no layer."""
        return None

    def _find_key(
        self, layer: int | None = None, offset: int | None = None, target: int | None = None
    ) -> Key:
        """Key of the only fitted map that agrees with the given numbers; None agrees with all.

        Raises `NotFoundError` where no map agrees, `UsageError` where several do.
        """
        self.check_fitted()
        maps = self._fitted_maps()
        matches = [
            key
            for key in maps
            if layer in (None, key[0])
            and offset in (None, key[1])
            and target in (None, self._target_of(key))
        ]
        if len(matches) == 1:
            return matches[0]
        has_targets = any(len(key) == 3 for key in maps)
        keys = ", ".join(map(str, maps))
        if not matches:
            request = f"layer {layer}, offset {offset}"
            request += "" if target is None else f", target {target}"
            raise NotFoundError(f"no {self.map_name} for {request}; fitted are {keys}")
        names = "(layer, offset, target)" if has_targets else "(layer, offset)"
        raise UsageError(
            f"name a layer and an offset{', and a target' * has_targets}; fitted {names} are {keys}"
        )

    def _on_device(self, key: Key, device: str) -> "tuple[torch.Tensor, torch.Tensor]":
        """Weight and bias of an affine map as float32 tensors on `device`, copied there once."""
        import torch

        if (key, device) not in self._device_copies:
            rounded: WeightAndBias = self._fitted_maps()[key].astype(np.float32)
            # Copies: torch aligns its own memory, on which the last bits of a product depend.
            self._device_copies[key, device] = (
                torch.tensor(rounded.weight, device=device),
                torch.tensor(rounded.bias, device=device),
            )
        return self._device_copies[key, device]

    def __getstate__(self) -> dict[str, Any]:
        """Attributes to pickle; those of `not_pickled` come back as empty dictionaries."""
        state: dict[str, Any] = dict(super().__getstate__() or {})  # pyright: ignore
        return state | {name: {} for name in self.not_pickled if name in state}

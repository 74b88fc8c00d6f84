"""What a change of a layer does to the model's predictions: `Effects`, by position.

`kl` is KL(unchanged || changed) in nats, `loss_change` the cross-entropy of the text's next token
in nats after the change less that before, `flip` 1 where the top token is another one. Values are
NaN where a prediction is no distribution, and `loss_change` where the text ends.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ...probes.base.resampling import Interval
from ..studies.trajectories.position_sample import PositionSample

if TYPE_CHECKING:
    import torch

MEASURES = ("kl", "loss_change", "flip")


class Effects:
    """Effects of several changes (keys) on one sample; arrays `(n,)` over its positions."""

    def __init__(self, sample: PositionSample) -> None:
        self.sample = sample
        self._values: dict[tuple[Any, ...], dict[str, np.ndarray]] = {}

    def add(
        self,
        key: tuple[Any, ...],
        numbers: np.ndarray,
        clean: "torch.Tensor",
        changed: "torch.Tensor",
        read_at: np.ndarray | None = None,
    ) -> None:
        """Measure a change `key` at the positions `numbers` of the sample.

        `clean` and `changed` are the logits `(k, vocab)` of those positions; `read_at` their
        numbers in the sample where the values are kept under other positions (`numbers`).
        """
        texts = self.sample.text_tokens[numbers if read_at is None else read_at]
        measured = measure_effects(clean, changed, texts)
        kept = self._values.setdefault(
            key, {name: np.full(self.sample.count, np.nan, np.float32) for name in MEASURES}
        )
        for name, values in measured.items():
            kept[name][numbers] = values

    @property
    def changes(self) -> list[tuple[Any, ...]]:
        """The changes, in the order in which they were measured."""
        return list(self._values)

    def values(self, key: tuple[Any, ...], measure: str) -> np.ndarray:
        """One measure of one change by position, NaN where it was not measured."""
        return self._values[key][measure]

    def mean(self, key: tuple[Any, ...], measure: str) -> tuple[float | None, Interval]:
        """Mean and 95 % interval over documents."""
        return self.sample.mean(self.values(key, measure))

    def mean_difference(
        self, key: tuple[Any, ...], other: tuple[Any, ...], measure: str
    ) -> tuple[float | None, Interval]:
        """Mean of the difference of two changes at the same positions, `key` less `other`."""
        return self.sample.mean(self.values(key, measure) - self.values(other, measure))

    def count(self, key: tuple[Any, ...]) -> int:
        """Number of positions at which the distributions are defined."""
        return int(np.isfinite(self.values(key, "kl")).sum())

    def undefined(self, keys: Iterable[tuple[Any, ...]], measured: np.ndarray) -> int:
        """Number of values of `keys` at the positions `measured` that are not defined."""
        return sum(int(np.isnan(self.values(key, "kl")[measured]).sum()) for key in keys)


def measure_effects(
    clean: "torch.Tensor", changed: "torch.Tensor", text_tokens: np.ndarray
) -> dict[str, np.ndarray]:
    """The measures of `MEASURES`, each `(k,)` float64.

    `clean` and `changed` are logits `(k, vocab)`; `text_tokens` `(k,)` the next tokens of the text,
    -1 where there is none.
    """
    import torch

    kl, loss, flip = [], [], []
    tile = max(1, (1 << 22) // (8 * clean.shape[1]))
    tokens = torch.from_numpy(np.maximum(text_tokens, 0)).to(clean.device)
    for start in range(0, len(clean), tile):
        part = slice(start, start + tile)
        p, q = (logits[part].double().log_softmax(-1) for logits in (clean, changed))
        mass = p.exp()
        kl.append(torch.where(mass > 0, mass * (p - q), 0 * mass).sum(-1))
        index = tokens[part, None]
        loss.append((p.gather(1, index) - q.gather(1, index))[:, 0])
        flip.append((p.argmax(-1) != q.argmax(-1)).double())
    values = {
        name: torch.cat(parts).cpu().numpy() if parts else np.zeros(0)
        for name, parts in zip(MEASURES, (kl, loss, flip), strict=True)
    }
    undefined = ~np.isfinite(values["kl"])
    for name in MEASURES:
        values[name][undefined | ~np.isfinite(values[name])] = np.nan
    values["loss_change"][text_tokens < 0] = np.nan
    return values

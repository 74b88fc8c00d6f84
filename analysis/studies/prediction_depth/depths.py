"""Prediction depth: the layer from which a lens says what the model says, to the end.

The tuned-lens paper (2303.08112, section 4.4) takes it from Baldock et al. (2106.09647). With t_l
the top token of the lens at layer l, and t_L that of the model, the depth of a position is the
smallest l with t_k = t_L for all k >= l. Layers run from 0, the embedding, to L, where every
position agrees with itself: depths lie in 0..L.
"""

from collections.abc import Sequence

import numpy as np


def prediction_depths(top: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """Depth of each position, `(n,)` float64; NaN where the model's logits are no distribution.

    `top` `(n, layers)` int64 holds the top tokens at `layers`, ascending, the last of which is the
    model itself; -1, undefined, agrees with nothing. With layers left out, a depth is that among
    the layers that were read.
    """
    model = top[:, -1]
    agrees = (top == model[:, None]) & (top >= 0)
    # Length of the run of agreeing layers that ends at the last one.
    run = np.cumprod(agrees[:, ::-1], axis=1).sum(1)
    numbers = np.array(layers, np.float64)
    return np.where(model >= 0, numbers[len(layers) - np.maximum(run, 1)], np.nan)


def agreement(top: np.ndarray) -> np.ndarray:
    """Where the top token at each layer is the model's, `(n, layers)` float64.

    NaN where the model's logits are no distribution; an undefined reading of a lens disagrees.
    """
    model = top[:, -1]
    agrees = ((top == model[:, None]) & (top >= 0)).astype(np.float64)
    agrees[model < 0] = np.nan
    return agrees

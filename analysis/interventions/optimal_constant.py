"""Optimal ablation (Li and Janson, NeurIPS 2024): the constant row whose effect is smallest.

Mean ablation puts a row in place that the model may never see; the constant that minimises the mean
KL(unchanged || ablated) is the fairest constant. `fit_constant` finds it by Adam, with gradients
through the blocks above the layer, on sequences of the train split.
"""

from typing import TYPE_CHECKING

import numpy as np

from ...cache.errors import UsageError
from .layer_runs import LayerRuns, spaced_positions

if TYPE_CHECKING:
    pass

STEPS = 40
"""Steps of Adam."""
LEARNING_RATE = 0.05
"""Learning rate at the first step, in units of the root mean square of the mean row; falls to 0."""


def fit_constant(
    runs: LayerRuns, layer: int, start: np.ndarray, *, spacing: int, reach: int, steps: int = STEPS
) -> np.ndarray:
    """The constant `(d_model,)` for positions spaced as in the study, fitted on `runs`.

    Starts at `start` (the mean row). Of the constants on the way the one with the lowest KL on
    its batch is not chosen, as batches differ: the mean of the last quarter of the steps is.
    """
    import torch

    edited = spaced_positions(runs.sample, spacing, reach)
    batches = [batch for batch in runs.batches() if edited[batch.numbers].any()]
    if not batches:
        raise UsageError("the train split holds no sequence long enough to fit a constant")
    with torch.inference_mode(False), torch.enable_grad():
        origin = torch.tensor(start, dtype=torch.float32, device=runs.model.device)
        constant = origin.clone().requires_grad_()
        scale = float(origin.square().mean().sqrt()) or 1.0
        optimizer = torch.optim.Adam([constant], lr=LEARNING_RATE * scale)
        last: list[torch.Tensor] = []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * scale * (1 - step / steps)
            batch = batches[step % len(batches)]
            chosen = torch.from_numpy(np.flatnonzero(edited[batch.numbers])).to(origin.device)
            rows = batch.rows(layer)
            with torch.no_grad():
                clean = batch.logits(layer, rows)[chosen].log_softmax(-1)
            changed = rows.index_put((chosen,), constant.expand(len(chosen), -1))
            log_q = batch.logits(layer, changed)[chosen].log_softmax(-1)
            kl = (clean.exp() * (clean - log_q)).sum(-1)
            loss = kl[torch.isfinite(kl)].mean()
            optimizer.zero_grad()
            loss.backward()
            gradient = constant.grad
            if gradient is None or not bool(torch.isfinite(gradient).all()):
                continue  # a sequence with rows that are not finite
            optimizer.step()
            if step >= 3 * steps // 4:
                last.append(constant.detach().clone())
        best = torch.stack(last).mean(0) if last else origin
    return best.cpu().numpy().astype(np.float64)

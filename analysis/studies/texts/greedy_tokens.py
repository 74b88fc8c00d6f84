"""Greedy continuations of token ids by a causal model: `continue_greedily`.

The model runs with its key-value cache on prompts padded at the left. That other tokens of a batch,
padding and cached keys change nothing is proven on the spot, by a plain loop on the shortest and
the longest prompt of the first batch; a model that fails runs without a cache, on prompts padded at
the right, which a causal model does not see.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ....cache.errors import UsageError
from ....cache.model.blocks import logits_of, run_model
from ....cache.model.model_devices import input_device

PLAIN, CACHED = "plain", "cached"
"""How a model runs: without, or with its key-value cache."""


class GreedyModel:
    """A causal model of transformers in eval mode that continues prompts by its top tokens."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.device: torch.device = input_device(model)
        self.way: str | None = None
        """`cached` or `plain`; None before the first batch."""
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters

    def continue_greedily(self, prompts: Sequence[np.ndarray], tokens: int) -> np.ndarray:
        """The next `tokens` top tokens of each of `prompts`, `(prompts, tokens)` int64.

        The lowest id on ties; no token ends a continuation. Raises `UsageError` for an empty
        prompt.
        """
        if any(not len(prompt) for prompt in prompts) or tokens < 1:
            raise UsageError("a prompt has one token at least, and so has a continuation")
        if not prompts:
            return np.zeros((0, tokens), np.int64)
        with torch.inference_mode():
            if self.way is None:
                return self._continue_checked(prompts, tokens)
            if self.way == PLAIN:
                return self._continue_plainly(prompts, tokens)
            return self._continue_cached(prompts, tokens)

    def _continue_checked(self, prompts: Sequence[np.ndarray], tokens: int) -> np.ndarray:
        """The first batch: with the cache if that gives what a plain loop gives."""
        try:
            found = self._continue_cached(prompts, tokens)
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
            # A model without such a cache, or with a cache of another kind.
            if isinstance(error, torch.OutOfMemoryError):
                raise
            found = None
        self.way = PLAIN
        if found is not None:
            lengths = [len(prompt) for prompt in prompts]
            checked = {int(np.argmin(lengths)), int(np.argmax(lengths))}
            alone = {i: self._continue_plainly([prompts[i]], tokens)[0] for i in checked}
            if all(np.array_equal(found[i], expected) for i, expected in alone.items()):
                self.way = CACHED
                return found
        return self._continue_plainly(prompts, tokens)

    def _continue_plainly(self, prompts: Sequence[np.ndarray], tokens: int) -> np.ndarray:
        """A whole forward pass for each token, on rows padded at the right."""
        lengths = np.array([len(prompt) for prompt in prompts])
        rows = np.zeros((len(prompts), int(lengths.max()) + tokens), np.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            row[: len(prompt)] = prompt
        ids = torch.from_numpy(rows).to(self.device)
        ends = torch.from_numpy(lengths).to(self.device)
        number = torch.arange(len(prompts), device=self.device)
        for step in range(tokens):
            read = ids[:, : int(lengths.max()) + step]
            logits = logits_of(run_model(self.model, read))
            ids[number, ends + step] = _top(logits[number, ends + step - 1])
        columns = lengths[:, None] + np.arange(tokens)
        return np.take_along_axis(ids.cpu().numpy(), columns, 1)

    def _continue_cached(self, prompts: Sequence[np.ndarray], tokens: int) -> np.ndarray:
        """One pass over the prompts, padded at the left, and one token in each further pass."""
        lengths = [len(prompt) for prompt in prompts]
        rows = np.zeros((len(prompts), max(lengths)), np.int64)
        mask = np.zeros_like(rows)
        for row, read, prompt in zip(rows, mask, prompts, strict=True):
            row[-len(prompt) :] = prompt
            read[-len(prompt) :] = 1
        ids, seen = (torch.from_numpy(array).to(self.device) for array in (rows, mask))
        kept: Any = None
        found = []
        for _ in range(tokens):
            options: dict[str, Any] = {}
            if self._takes_positions:
                positions = seen.cumsum(1).sub(1).clamp_min(0)
                options["position_ids"] = positions[:, -ids.shape[1] :]
            output = self.model(
                input_ids=ids,
                attention_mask=seen,
                past_key_values=kept,
                use_cache=True,
                **options,
            )
            kept = output.past_key_values
            if kept is None:
                raise ValueError("the model gives no key-value cache")
            ids = _top(logits_of(output)[:, -1])[:, None]
            seen = torch.cat([seen, torch.ones_like(ids)], 1)
            found.append(ids)
        return torch.cat(found, 1).cpu().numpy()


def _top(logits: torch.Tensor) -> torch.Tensor:
    """The lowest id among the largest logits of each row, `(n,)` int64."""
    logits = logits.float()
    largest = logits.amax(-1, keepdim=True)
    # argmax of other devices may give any of several equal ones.
    return (logits == largest).int().argmax(-1)

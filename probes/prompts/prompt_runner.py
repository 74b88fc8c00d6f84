"""Runs patched prompts through a model, batch by batch: `PromptRunner`.

Blocks up to the patched layer do not see the state, so they run once for each distinct text
`prompt, x[t+1..t+N]` of a batch; the blocks above run for each sample. A model that cannot be
resumed from a layer runs all its blocks for each sample.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...cache.errors import MismatchError, UsageError
from .patched_prompt import PatchedPrompt

if TYPE_CHECKING:
    import torch

    from ...cache.resuming.resumable_model import ResumableModel
    from ...cache.store.activation_cache import ActivationCache

LOGIT_BYTES = 64 << 20
"""Bytes of the logits of a batch."""
MOST_ROWS = 256
"""Most samples of a batch."""


@dataclass(eq=False)
class PromptRunner:
    """One prompt in one model; positions count from the prompt's last token, M - 1."""

    model: "ResumableModel"
    prompt: PatchedPrompt
    embeddings: "torch.Tensor | None" = None
    """Layer 0 of the prompt's tokens, `(M, d_model)`, with gradients; default the prompt's own."""

    def __post_init__(self) -> None:
        import torch

        if self.embeddings is None and self.prompt.embeddings is not None:
            own = torch.from_numpy(np.ascontiguousarray(self.prompt.embeddings))
            self.embeddings = own.to(self.model.device)
        width = None if self.embeddings is None else self.embeddings.shape[-1]
        if width not in (None, self.model.d_model):
            raise MismatchError(
                f"the prompt {self.prompt.name!r} has embeddings of width {width}, the model has "
                f"width {self.model.d_model}; use a prompt that was fitted on this model"
            )

    def clean_streams(self, tokens: np.ndarray, layers: Iterable[int]) -> "dict[int, torch.Tensor]":
        """The streams of `layers` without a state, each `(n, M + N, d_model)`, in one pass.

        `tokens` `(n, M + N)` are those of `PatchedPrompt.tokens`. No gradients.
        """
        import torch

        layers = sorted(set(layers))
        distinct, inverse = np.unique(tokens, axis=0, return_inverse=True)
        kept: dict[int, torch.Tensor] = {}

        def keeping(layer: int) -> "Callable[[torch.Tensor], torch.Tensor]":
            def keep(stream: "torch.Tensor") -> "torch.Tensor":
                kept[layer] = self._with_embeddings(stream) if layer == 0 else stream
                return kept[layer]

            return keep

        changes = {layer: keeping(layer) for layer in layers}
        if self.embeddings is not None and 0 not in changes:
            changes[0] = self._with_embeddings
        with torch.no_grad():
            self.model.run_residual(layers[-1], distinct, changes=changes)
        rows = torch.from_numpy(inverse.ravel()).to(self.model.device)
        return {layer: kept[layer].index_select(0, rows) for layer in layers}

    def read_states(
        self, layer: int, states: "torch.Tensor", tokens: np.ndarray, stream: "torch.Tensor"
    ) -> "torch.Tensor":
        """Layer L at the prompt's last token and behind it, `(n, N + 1, d_model)`.

        `states` `(n, d_model)` are put in at layer `layer`, whose `stream` `clean_streams` gave.
        """
        start = self.prompt.length - 1
        patched = self._with_states(stream, states)
        if layer == self.model.depth:
            return patched[:, start:]
        if self.model.can_resume(layer):
            return self.model.resume_residual(layer, patched, tokens)[:, start:]

        def put_in(full: "torch.Tensor") -> "torch.Tensor":
            return self._with_states(self._with_embeddings(full) if layer == 0 else full, states)

        changes = {0: self._with_embeddings, layer: put_in}
        return self.model.run_residual(self.model.depth, tokens, changes=changes)[:, start:]

    def read_with_gradient(
        self, layer: int, states: "torch.Tensor", tokens: np.ndarray
    ) -> "torch.Tensor":
        """As `read_states`, with gradients in `embeddings`."""
        import torch

        distinct, inverse = np.unique(tokens, axis=0, return_inverse=True)
        changes = {0: self._with_embeddings}
        stream = self.model.run_residual(layer, distinct, changes=changes)
        rows = torch.from_numpy(inverse.ravel()).to(self.model.device)
        return self.read_states(layer, states, tokens, stream.index_select(0, rows))

    def _with_embeddings(self, stream: "torch.Tensor") -> "torch.Tensor":
        """Layer 0 with the prompt's embeddings at its first positions."""
        import torch

        if self.embeddings is None:
            return stream
        own = self.embeddings.to(stream).expand(stream.shape[0], -1, -1)
        return torch.cat([own, stream[:, own.shape[1] :]], 1)

    def _with_states(self, stream: "torch.Tensor", states: "torch.Tensor") -> "torch.Tensor":
        """A stream with `states` at the prompt's last position."""
        import torch

        at = self.prompt.length - 1
        return torch.cat([stream[:, :at], states.to(stream)[:, None], stream[:, at + 1 :]], 1)


def batch_rows(cache: "ActivationCache", read: int, length: int) -> int:
    """Samples of a batch of which `read` of `length` positions go through the head."""
    by_logits = LOGIT_BYTES // (4 * cache.vocab * max(1, read))
    by_streams = LOGIT_BYTES // (4 * cache.d_model * max(1, length))
    return max(1, min(MOST_ROWS, by_logits, by_streams))


def check_model_of(cache: "ActivationCache", model: "ResumableModel") -> None:
    """Raise `MismatchError` unless depth and width of `model` are those of the cache."""
    expected, found = (cache.n_blocks, cache.d_model), (model.depth, model.d_model)
    if expected != found:
        raise MismatchError(
            f"the cache is of a model with {expected[0]} blocks of width {expected[1]}, this model "
            f"has {found[0]} of width {found[1]}; give the model that the cache was extracted from"
        )


def check_context(model: "ResumableModel", length: int) -> None:
    """Raise `UsageError` if `length` tokens are more than the positions of the model."""
    config = getattr(model.blocks.model, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        raise UsageError(
            f"prompt and continuation have {length} tokens, the model reads at most {most}; use a "
            "shorter prompt"
        )

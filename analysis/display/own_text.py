"""The residual streams of one passage, and those of a text that the user gives with the model.

lens_maps.py reads lenses on a `PassageStreams`; `read_own_text` makes one by a forward pass.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from ...cache.head.head import Head
from ...cache.store.activation_cache import ActivationCache
from ...probes.base.readout import Readout
from ..token_texts.token_names import TokenNames

if TYPE_CHECKING:
    import torch

    from ...cache.model.blocks import DecoderBlocks


@dataclass(frozen=True, eq=False)
class PassageStreams:
    """Tokens of a passage and the text after it, their residual streams, head and tokenizer."""

    tokens: np.ndarray
    """Token ids, `(tokens,)` int64: the passage, and what follows in its sequence."""
    tokens_after: np.ndarray
    """Tokens that follow each one in its document, `(tokens,)`."""
    width: int
    """Most tokens of the passage."""
    head: Head
    names: TokenNames
    """Labels of tokens."""
    tokenizer: Callable[[], Any]
    """Gives the tokenizer (`tokenizers.Tokenizer`)."""
    title: str
    """What the passage is."""
    n_blocks: int
    hidden: "Callable[[Readout, int], torch.Tensor]"
    """Residual stream `(tokens, d_model)` float32 of a layer, as a lens reads it."""
    device: "torch.device"

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.head.d_model

    @property
    def vocab(self) -> int:
        """Number of logits."""
        return self.head.vocab

    @cached_property
    def torch_head(self) -> Any:
        """The head on the device."""
        return self.head.torch(self.device)

    @cached_property
    def model_logits(self) -> "torch.Tensor":
        """The model's own logits at every token, `(tokens, vocab)` float64: head on layer L."""
        import torch

        from ...probes.lens.logit_lens import LogitLens

        last = LogitLens([self.n_blocks], [0])
        with torch.no_grad():
            return self.torch_head(self.hidden(last, self.n_blocks)).double()

    def count(self, offset: int) -> int:
        """Tokens of the passage that have a token `offset` further in their document."""
        lacking = np.flatnonzero(self.tokens_after[: self.width] < offset)
        count = int(lacking[0]) if len(lacking) else min(self.width, len(self.tokens_after))
        if count < 1 or offset < 0:
            raise UsageError(
                f"the passage ({self.title}) has no token with one {offset} further in its "
                "document; take another passage, a longer text or a smaller offset"
            )
        return count


class NamesOfTokenizer(TokenNames):
    """Labels of the tokens of a tokenizer that no cache keeps."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


def read_own_text(
    text: str, model: Any, cache: ActivationCache | None, device: "torch.device"
) -> PassageStreams:
    """The streams of `text` by a forward pass of the model.

    With a `cache`, the model is checked to be the cache's, whose head and tokenizer are used;
    without, blocks and head are found in the model, as before an extraction.
    """
    import torch

    if not text.strip():
        raise UsageError("the text is empty; give some words for the model to read")
    with ExitStack() as stack:
        if cache is not None:
            blocks = _blocks_of_cache(cache, model, device)
            head, tokenizer, names = cache.head, cache.tokenizer(), TokenNames(cache)
            ids = _token_ids(text, tokenizer, _mark_of(cache))
            _check_length(ids, cache.manifest.tokens.context)
        else:
            source, module = _source_and_module(model, device, stack)
            tokenizer = source.tokenizer
            names = NamesOfTokenizer(tokenizer)
            ids = _token_ids(text, tokenizer, source.separator)
            _check_length(ids, source.context)
            blocks, head = _blocks_and_head(module, source.compute_dtype, ids)
        row = torch.tensor([ids], device=_device_of(blocks))
        with torch.inference_mode():
            layers = [layer[0].float().to(device) for layer in blocks.residuals(row)]
    layers = [layer.clone() for layer in layers]

    def hidden(lens: Readout, layer: int) -> "torch.Tensor":
        if hasattr(lens, "view"):
            raise UsageError(
                f"{lens.kind} is a control, which reads other sequences of a cache; give a "
                "passage of a cache"
            )
        return layers[layer]

    count = len(ids)
    return PassageStreams(
        tokens=np.array(ids, np.int64),
        tokens_after=np.arange(count - 1, -1, -1),
        width=count,
        head=head,
        names=names,
        tokenizer=lambda: tokenizer,
        title="own text",
        n_blocks=blocks.depth,
        hidden=hidden,
        device=device,
    )


def _blocks_of_cache(cache: ActivationCache, model: Any, device: "torch.device") -> "DecoderBlocks":
    """The blocks of the cache's model: those that were given, or loaded and checked."""
    from ...cache.extraction.model_reload import load_model_of

    if hasattr(model, "residuals_and_logits"):
        return model
    return load_model_of(cache, model, str(device))


def _source_and_module(
    model: Any, device: "torch.device", stack: ExitStack
) -> tuple[Any, "torch.nn.Module"]:
    """The source and the loaded model of a folder, a hub id or a model in memory."""
    from ...cache.model.loaded_model import hold_loaded_model, is_loaded_model
    from ...cache.model.model_loading import load_model
    from ...cache.model.source import ModelSource

    if is_loaded_model(model):
        loaded = stack.enter_context(hold_loaded_model(model))
        return loaded, loaded.module
    if not isinstance(model, str | Path):
        raise UsageError(
            "a text of your own is read by the model: give model= (folder, hub id or loaded model),"
            " or cache= (a cache of the model)"
        )
    source = ModelSource.locate(str(model))
    return source, load_model(source, device)


def _blocks_and_head(
    module: "torch.nn.Module", compute_dtype: str, ids: list[int]
) -> "tuple[DecoderBlocks, Head]":
    """Blocks and head of a model, proven on the tokens `ids`."""
    from ...cache.checks.model_checks import check_model
    from ...cache.tokens.token_stream import TokenStream

    stream = TokenStream(np.array(ids, np.int32), np.array([len(ids)]), np.zeros(1, np.int64))
    report = check_model(module, stream, compute_dtype, "auto")
    return report.stack, report.head


def _device_of(blocks: "DecoderBlocks") -> "torch.device":
    from ...cache.model.model_devices import input_device

    return input_device(blocks.model)


def _token_ids(text: str, tokenizer: Any, mark: int | None) -> list[int]:
    """The tokens of a text as extraction makes them: its own first mark, or else `mark`."""
    ids = tokenizer.encode(text).ids
    plain = tokenizer.encode(text, add_special_tokens=False).ids
    adds_mark = ids[:1] != plain[:1]
    return ids if adds_mark or mark is None else [mark, *ids]


def _mark_of(cache: ActivationCache) -> int | None:
    """The token without text at the beginning of the cache's first sequence; None without one."""
    if not cache.manifest.tokens.packed or not cache.has("tokens/char_start"):
        return None
    first = np.array([cache.sequence_start[0]])
    _, start, stop = cache.spans(first)[0].tolist()
    return int(cache.tokens[first][0]) if start == stop else None


def _check_length(ids: list[int], context: int | None) -> None:
    if context is not None and len(ids) > context:
        raise UsageError(
            f"the text has {len(ids)} tokens, the model reads {context} at once; give a shorter one"
        )

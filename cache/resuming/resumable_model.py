"""`ResumableModel`: the logits of a model from a layer of the residual stream on.

The model runs with its own token ids, so that masks, rotary embeddings, position ids and per-layer
inputs are made by its own code, while the blocks up to the layer give the stream without computing
(`skip_blocks` in `model/resume.py`). What else a block gives is a template, recorded once on other
tokens. Whether that suffices is proved for each layer before its first use: a changed stream must
give the logits of a run of all blocks whose layer is overwritten. A model that carries more from
block to block than the stream is refused there.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..checks.independence import lowest_dtype, row_change
from ..checks.model_checks import vocabulary_size
from ..checks.resume_check import check_resume_error, run_changed
from ..devices import memory_errors
from ..errors import ModelError, UsageError
from ..model.blocks import DecoderBlocks, StopForward, logits_of, run_model
from ..model.model_devices import input_device
from ..model.residual_axes import replace_tensors
from ..model.resume import LayerChange, change_layers, copy_output, skip_blocks
from .stream_batch import StreamBatch, is_ragged

TEMPLATE_SHAPE = (3, 21)
"""Shape of the token ids whose blocks' outputs are the templates."""
PROOF_SHAPE = (2, 16)
"""Shape of the token ids on which a layer is proved; the last quarter of one row is padding."""
NOISE = 1.5
"""Spread of the stream of a proof around its mean, in units of the layer's own."""

Changes = Mapping[int, LayerChange]
"""Layer -> function of its stream `(batch, length, d_model)` that gives the stream to put there."""


class ResumableModel:
    """A model that runs on from any layer of its residual stream, for any token ids.

    Gradients flow from the result to the given stream; call within `torch.inference_mode()` where
    none are needed. The parameters of the model are frozen.
    """

    def __init__(self, blocks: DecoderBlocks) -> None:
        self.blocks = blocks
        self.first_layer: int = 0
        """The lowest layer that can be resumed from; the blocks below are not in memory."""
        self.vocab_read: int = vocabulary_size(blocks.model)
        """Number of tokens that the model reads."""
        self._outputs: list[Any] = []
        """The template: output of each call of a block for token ids of `TEMPLATE_SHAPE`."""
        self._means: list[torch.Tensor] = []
        self._spreads: list[torch.Tensor] = []
        """Mean and standard deviation of layers 0..L of the template, each `(d_model,)`."""
        self._refusals: dict[int, ModelError | None] = {}
        """Layer -> reason why it cannot be resumed; None for a proved layer."""
        self._record_templates()

    @property
    def depth(self) -> int:
        """Number L of calls of blocks: layers are 0..L."""
        return self.blocks.depth

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.blocks.d_model

    @property
    def device(self) -> torch.device:
        """The device that token ids go to."""
        return input_device(self.blocks.model)

    def __repr__(self) -> str:
        name = type(self.blocks.model).__name__
        return f"<{name}: resumes from layers {self.first_layer} to {self.depth}>"

    def resume(
        self,
        layer: int,
        residual: Any,
        tokens: Any,
        mask: Any = None,
        *,
        changes: Changes | None = None,
    ) -> Any:
        """Logits of the model for `tokens` when its layer `layer` is `residual`.

        `layer` is 0 (input of the first block) to L (output of the last). `tokens` `(length,)` or
        `(batch, length)` are the ids of the text, which the model reads besides the stream;
        `residual` has one more axis of d_model, is an array or tensor of any float dtype and is
        cast to that of the layer; `mask` like `tokens` is 1 in the text and 0 in padding on its
        right. The logits are `(length, vocab)` or `(batch, length, vocab)`; those of padding mean
        nothing. Lists of sequences of different lengths give a list. `changes` of layers above
        `layer` are applied on the way. A value that is not finite spoils its whole sequence.

        Raises `ModelError` if the blocks above `layer` need more than the stream, `UsageError` for
        shapes, tokens or layers that do not fit.
        """
        if is_ragged(tokens):
            return self._resume_ragged(layer, residual, tokens, mask, changes)
        batch = self._read(tokens, mask, residual)
        self.check(layer)
        return batch.output(self._logits_from(layer, batch, self._checked_changes(layer, changes)))

    def resume_residual(
        self,
        layer: int,
        residual: Any,
        tokens: Any,
        mask: Any = None,
        *,
        to_layer: int | None = None,
        changes: Changes | None = None,
    ) -> torch.Tensor:
        """Layer `to_layer` (default L) of the model when its layer `layer` is `residual`.

        The blocks above `to_layer` and the head do not run. Arguments as in `resume`; the result
        is `(length, d_model)` or `(batch, length, d_model)` in the dtype of the model.
        """
        to_layer = self.depth if to_layer is None else to_layer
        self._check_layer(to_layer)
        if to_layer < layer:
            raise UsageError(
                f"layer {to_layer} is below layer {layer}: give a to_layer from {layer} to "
                f"{self.depth}"
            )
        batch = self._read(tokens, mask, residual)
        self.check(layer)
        assert batch.hidden is not None
        if to_layer == layer:
            return batch.output(self._cast(layer, batch.hidden))
        checked = self._checked_changes(layer, changes)
        with self._skipped(layer, batch.hidden):
            return batch.output(self._run_to_layer(to_layer, batch, checked))

    def run(self, tokens: Any, mask: Any = None, *, changes: Changes | None = None) -> torch.Tensor:
        """Logits of the whole model for `tokens`, with `changes` of its layers 0..L.

        Arguments as in `resume`. Raises `UsageError` if the lower blocks are not in memory.
        """
        self._check_whole()
        batch = self._read(tokens, mask)
        with change_layers(self.blocks, self._checked_changes(-1, changes), batch.ids):
            return batch.output(logits_of(run_model(self.blocks.model, batch.ids, batch.mask)))

    def run_residual(
        self, layer: int, tokens: Any, mask: Any = None, *, changes: Changes | None = None
    ) -> torch.Tensor:
        """Layer `layer` of the model for `tokens`; the blocks above it do not run.

        `changes` of layers up to `layer` are applied. Arguments and result as in
        `resume_residual`.
        """
        self._check_whole()
        self._check_layer(layer)
        batch = self._read(tokens, mask)
        return batch.output(self._run_to_layer(layer, batch, self._checked_changes(-1, changes)))

    def overwrite(
        self,
        layer: int,
        residual: Any,
        tokens: Any,
        mask: Any = None,
        *,
        changes: Changes | None = None,
    ) -> torch.Tensor:
        """The logits of `resume` by a run of all blocks, for models that cannot be resumed."""
        self._check_whole()
        self._check_layer(layer)
        batch = self._read(tokens, mask, residual)
        assert batch.hidden is not None
        hidden = batch.hidden
        checked = {layer: lambda _: hidden, **self._checked_changes(layer, changes)}
        with change_layers(self.blocks, checked, batch.ids):
            return batch.output(logits_of(run_model(self.blocks.model, batch.ids, batch.mask)))

    def check(self, layer: int) -> None:
        """Prove that the model resumes from `layer`; the result is remembered.

        Raises `ModelError` with the figures if a changed stream gives other logits than a run of
        all blocks whose layer is overwritten; `UsageError` for a layer below `first_layer`.
        """
        self._check_layer(layer)
        if layer < self.first_layer:
            raise UsageError(
                f"this model was loaded from layer {self.first_layer} on, it cannot be resumed "
                f"from layer {layer}; load it with layer={layer}"
            )
        if layer not in self._refusals:
            try:
                self._prove(layer)
                self._refusals[layer] = None
            except ModelError as error:
                self._refusals[layer] = error
        refusal = self._refusals[layer]
        if refusal is not None:
            raise refusal

    def can_resume(self, layer: int) -> bool:
        """Whether the model resumes from `layer`, by the proof of `check`."""
        try:
            self.check(layer)
        except ModelError:
            return False
        return True

    def drop_lower_blocks(self, layer: int) -> None:
        """Prove `layer`, then release the parameters of the blocks that only run below it.

        Raises `ModelError` if the model cannot be resumed from `layer`; nothing is released then.
        """
        self.check(layer)
        needed = set(self.blocks.blocks[layer:])
        for block in self.blocks.distinct_blocks():
            if block not in needed:
                block.to("meta")
        self.first_layer = max(layer, self.first_layer)

    # Runs

    def _logits_from(self, layer: int, batch: StreamBatch, changes: Changes) -> torch.Tensor:
        """Logits `(batch, length, vocab)`, the blocks up to `layer` skipped."""
        assert batch.hidden is not None
        with (
            self._skipped(layer, batch.hidden),
            change_layers(self.blocks, changes, batch.ids),
        ):
            return logits_of(run_model(self.blocks.model, batch.ids, batch.mask))

    def _skipped(self, layer: int, hidden: torch.Tensor) -> Any:
        """Context in which one pass has `hidden` as layer `layer`, computed by no block."""
        shape = (hidden.shape[0], hidden.shape[1])
        hidden = self._cast(layer, hidden)
        return skip_blocks(self.blocks, layer, hidden, lambda call: self._output_for(call, shape))

    def _run_to_layer(self, layer: int, batch: StreamBatch, changes: Changes) -> torch.Tensor:
        """Layer `layer` `(batch, length, d_model)` of a pass that stops there."""
        found: list[torch.Tensor] = []

        def keep(stream: torch.Tensor) -> torch.Tensor:
            found.append(changes[layer](stream).to(stream) if layer in changes else stream)
            raise StopForward

        try:
            with change_layers(self.blocks, {**changes, layer: keep}, batch.ids):
                run_model(self.blocks.model, batch.ids, batch.mask)
        except StopForward:
            pass
        return found[0]

    def _resume_ragged(
        self, layer: int, residual: Any, tokens: Any, mask: Any, changes: Changes | None
    ) -> list[torch.Tensor]:
        """Logits of each sequence; those of equal length run together, without padding."""
        if mask is not None:
            raise UsageError("sequences of different lengths have no padding: leave mask out")
        if len(residual) != len(tokens):
            raise UsageError(f"found {len(tokens)} sequences of tokens, {len(residual)} of streams")
        numbers: dict[int, list[int]] = {}
        for number, row in enumerate(tokens):
            numbers.setdefault(len(row), []).append(number)
        results: dict[int, torch.Tensor] = {}
        for group in numbers.values():
            rows = [residual[number] for number in group]
            logits = self.resume(layer, rows, [tokens[n] for n in group], changes=changes)
            results |= dict(zip(group, logits, strict=True))
        return [results[number] for number in range(len(tokens))]

    # Arguments

    def _read(self, tokens: Any, mask: Any, residual: Any = None) -> StreamBatch:
        return StreamBatch.of(
            tokens,
            mask,
            residual,
            d_model=self.d_model,
            vocab=self.vocab_read,
            device=self.device,
        )

    def _cast(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """A copy of `hidden` in the dtype of the layer: blocks may change their input."""
        return hidden.to(self._means[layer].dtype, copy=True)

    def _check_layer(self, layer: int) -> None:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= self.depth:
            raise UsageError(f"the model has layers 0 to {self.depth}, there is no layer {layer}")

    def _checked_changes(self, layer: int, changes: Changes | None) -> Changes:
        """`changes`, all of layers above `layer`."""
        for number in changes or {}:
            self._check_layer(number)
            if number <= layer:
                raise UsageError(
                    f"a change of layer {number} has no effect: the model runs from layer {layer} "
                    f"on; change the residual itself, or layers {layer + 1} to {self.depth}"
                )
        return changes or {}

    def _check_whole(self) -> None:
        if self.first_layer:
            raise UsageError(
                f"this model was loaded from layer {self.first_layer} on, its lower blocks cannot "
                "run; load it with layer=0"
            )

    # Templates and proofs

    def _record_templates(self) -> None:
        """Run the model once and keep what its blocks give, apart from the numbers of the stream.

        Other tokens than those of any later run: what the blocks carry beside the stream would be
        taken for a constant otherwise.
        """
        blocks = self.blocks
        ids = random_ids(blocks.model, TEMPLATE_SHAPE, seed=0)
        streams: list[torch.Tensor] = []

        def record_output(_: Any, __: Any, output: Any) -> None:
            self._outputs.append(copy_output(output))

        # Templates take part in later runs with gradients, which refuse tensors of inference mode.
        with torch.inference_mode(False), torch.no_grad(), _memory_of(blocks.model):
            handles = [
                block.register_forward_hook(record_output) for block in blocks.distinct_blocks()
            ]
            try:
                streams, _ = blocks.residuals_and_logits(ids)
            finally:
                for handle in handles:
                    handle.remove()
            for stream in streams:
                rows = stream.float().flatten(0, 1)
                self._means.append(rows.mean(0).to(stream.dtype))
                self._spreads.append(rows.std(0).to(stream.dtype))
            if len(self._outputs) != blocks.depth:
                raise ModelError(
                    f"{blocks.name}: the blocks ran {len(self._outputs)} times, not {blocks.depth}"
                )
            self._outputs = [self._without_numbers(output) for output in self._outputs]

    def _without_numbers(self, output: Any) -> Any:
        """`output` of a block, of its stream-shaped tensors only the first sequence."""
        shape = self.blocks.axes.shape(*TEMPLATE_SHAPE)
        axis = self.blocks.axes.batch

        def first_sequence(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.narrow(axis, 0, 1) if tuple(tensor.shape) == shape else tensor

        return replace_tensors(output, first_sequence)

    def _output_for(self, call: int, ids_shape: tuple[int, int]) -> Any:
        """What the block gives at `call` (1..L), its streams zero, for token ids of `ids_shape`."""
        axes = self.blocks.axes
        recorded_shape = axes.shape(1, TEMPLATE_SHAPE[1])
        width = axes.width

        def zero_stream(tensor: torch.Tensor) -> torch.Tensor:
            if tuple(tensor.shape) != recorded_shape:
                return tensor
            rows = tensor.new_zeros(*ids_shape, width)
            prompt = tensor.repeat_interleave(ids_shape[0], axes.batch) if axes.offset else tensor
            return axes.pack(rows, prompt)

        return replace_tensors(copy_output(self._outputs[call - 1]), zero_stream)

    def _prove(self, layer: int) -> None:
        """Compare a resumed run with a full one whose layer is overwritten, on a changed stream."""
        model = self.blocks.model
        ids = random_ids(model, PROOF_SHAPE, seed=1)
        mask = torch.ones_like(ids)
        mask[1, -PROOF_SHAPE[1] // 4 :] = 0
        with torch.inference_mode(), _memory_of(model):
            batch = StreamBatch(ids, mask, self._changed_stream(layer, seed=2), False)
            hidden = batch.hidden
            assert hidden is not None
            full = run_changed(model, layer, lambda: self._overwritten(layer, hidden, batch))
            resumed = run_changed(model, layer, lambda: self._logits_from(layer, batch, {}))
            in_text = batch.in_text
            error = row_change(full[in_text], resumed[in_text], lowest_dtype(model))
        check_resume_error(model, layer, error)

    def _overwritten(self, layer: int, hidden: torch.Tensor, batch: StreamBatch) -> torch.Tensor:
        """Logits of a run of all blocks in memory whose layer is overwritten."""
        changes = {layer: lambda _: hidden}
        if self.first_layer:
            lowest = self._changed_stream(self.first_layer, seed=3)
            below = StreamBatch(batch.ids, batch.mask, lowest, False)
            return self._logits_from(self.first_layer, below, changes)
        with change_layers(self.blocks, changes, batch.ids):
            return logits_of(run_model(self.blocks.model, batch.ids, batch.mask))

    def _changed_stream(self, layer: int, seed: int) -> torch.Tensor:
        """A random stream `(2, length, d_model)` with about the spread of the layer's rows."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((*PROOF_SHAPE, self.d_model), generator=generator)
        mean, spread = self._means[layer], self._spreads[layer]
        return mean + NOISE * spread * noise.to(spread.device, spread.dtype)


def random_ids(model: torch.nn.Module, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Random token ids on the model's device, `shape` int64, without its padding token."""
    generator = torch.Generator().manual_seed(seed)
    vocab = vocabulary_size(model)
    ids = torch.randint(0, vocab, shape, generator=generator)
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    if isinstance(pad, int) and vocab > 1:
        ids[ids == pad] = (pad + 1) % vocab
    return ids.to(input_device(model))


def _memory_of(model: torch.nn.Module) -> Any:
    """Turn an out-of-memory error into a `ModelError` that says what to do."""
    return memory_errors(
        f"{type(model).__name__} cannot run on {TEMPLATE_SHAPE[0]} sequences of "
        f"{TEMPLATE_SHAPE[1]} tokens: they do not fit into memory beside the model; other programs "
        "may also hold memory"
    )

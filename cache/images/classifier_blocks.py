"""Loading of an image classifier, and the search for its blocks: `find_image_blocks`.

`ImageClassifier` wraps a classifier of transformers so that it reads ids like a language model, the
first of an image being the key by which its pixels are found. Its `DecoderBlocks` are the
`ModuleList` whose children all give a tensor (images, positions, d_model), and they are accepted
only if position 0 of layer L alone, the class token, decides the logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..devices import is_out_of_memory
from ..errors import ModelError
from ..model.blocks import DecoderBlocks, logits_of, run_model
from ..model.checkpoint_comparison import compare_with_checkpoint
from ..model.config_check import describe_error
from ..model.model_loading import LOADING_ERRORS
from ..model.residual_axes import ResidualAxes
from ..model.resume import ResumableRun
from ..model.safetensors_header import read_header
from ..model.transformers_guard import guard_transformers
from .block_candidates import block_candidates
from .classifier_source import ClassifierSource

PixelSource = Callable[[Sequence[int]], np.ndarray]
"""Pixels `(images, channels, height, width)` float32 of the images of some keys."""


@dataclass
class ClassLogits:
    """Output of an `ImageClassifier`: `logits` `(images, 1, classes)`, of the class token."""

    logits: torch.Tensor


class ImageClassifier(nn.Module):
    """An image classifier that reads ids `(images, positions)`; the first of an image is its key.

    `pixels` is set by who runs it.
    """

    def __init__(self, classifier: nn.Module, name: str) -> None:
        super().__init__()
        self.classifier = classifier
        self.name = name
        """Name of the model's class."""
        self.config: Any = getattr(classifier, "config", None)
        self.pixels: PixelSource | None = None
        self.checkpoint_notes: Any = getattr(classifier, "checkpoint_notes", None)
        self._unembedding: tuple[nn.Linear, ...] = ()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> ClassLogits:
        """The logits of the images whose keys are `input_ids[:, 0]`."""
        assert self.pixels is not None
        first = next(self.classifier.parameters())
        pixels = torch.from_numpy(self.pixels(input_ids[:, 0].tolist()))
        output = self.classifier(pixel_values=pixels.to(first.device, first.dtype))
        return ClassLogits(logits_of(output)[:, None])

    def get_input_embeddings(self) -> None:
        """None: patches are no rows of a table."""
        return

    def get_output_embeddings(self) -> nn.Module | None:
        """The linear map that gives the logits, found by `find_image_blocks`."""
        return self._unembedding[0] if self._unembedding else None

    def set_output_embeddings(self, unembedding: nn.Linear) -> None:
        """Name the linear map that gives the logits."""
        self._unembedding = (unembedding,)  # in a tuple: the module stays where it is


def load_classifier(
    source: ClassifierSource, device: "str | torch.device" = "cpu", attention: str = "default"
) -> ImageClassifier:
    """The image classifier of `source` on `device`: eval mode, no gradients, its own dtype.

    Raises `ModelError` if a file cannot be read or the checkpoint does not fill the model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageClassification

    for path in source.weight_files:
        read_header(path)
    kwargs: dict[str, Any] = {} if attention == "default" else {"attn_implementation": attention}
    auto: Any = AutoModelForImageClassification
    try:
        with guard_transformers():
            module, info = auto.from_pretrained(
                source.folder,
                dtype="auto",
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **kwargs,
            )
    except (*LOADING_ERRORS, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{source.name} cannot be loaded as an image classifier: {describe_error(error)}"
        ) from None
    module.checkpoint_notes = compare_with_checkpoint(module, info, source.name)
    classifier = ImageClassifier(module.to(device), type(module).__name__)
    return classifier.eval().requires_grad_(False)


class ClassTokenTail(DecoderBlocks):
    """The class token alone as a residual stream of length 1, in runs on the images of `run`.

    `residuals` reads position 0; `run_tail` replaces position 0 of layer L, beside the patches of
    the images of `run`.
    """

    def __init__(self, blocks: DecoderBlocks, run: ResumableRun) -> None:
        super().__init__(
            blocks.model, blocks.name, blocks.blocks, blocks.axes, blocks.stream_indices
        )
        self._blocks = blocks
        self._run = run

    def residuals(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Layers 0..L of the class token, each `(images, 1, d_model)`."""
        return [layer[:, :1] for layer in self._blocks.residuals(ids, mask)]

    def run_tail(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits `(images, 1, classes)` where the class token of layer L is `hidden`."""
        stream = with_class_token(self._run.residual(self.depth), hidden)
        return self._run.resume(self.depth, stream)


def with_class_token(stream: torch.Tensor, class_token: torch.Tensor) -> torch.Tensor:
    """`stream` `(images, positions, d_model)`, position 0 replaced by `(images, 1, d_model)`."""
    return torch.cat([class_token.to(stream), stream[:, 1:]], 1)


def find_image_blocks(
    model: ImageClassifier, ids: torch.Tensor, other_ids: torch.Tensor
) -> DecoderBlocks:
    """The verified blocks of `model`; also names its unembedding.

    `ids` and `other_ids` are keys and positions of two batches of images, of one shape. Raises
    `ModelError` if no list of blocks carries a class token to the logits.
    """
    logits = logits_of(run_model(model, ids))
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"{model.name} gives logits that are not finite")
    if not (change := _change(logits, logits_of(run_model(model, ids)))) <= _limit(logits):
        raise ModelError(
            f"{model.name} is not deterministic: run twice on the same images, its logits differ "
            f"by {change:.1e}"
        )
    reasons: list[str] = []
    for name, calls, shape in block_candidates(
        model, lambda n: run_model(model, ids[:n]), len(ids)
    ):
        if shape[1] != ids.shape[1]:
            reasons.append(f"{name}: {shape[1]} positions, not {ids.shape[1]}")
            continue
        blocks = DecoderBlocks(model, name, calls, ResidualAxes(0, 1, shape[2:]), (0,))
        reason = _rejection_reason(blocks, ids, other_ids, logits)
        if reason is None:
            model.set_output_embeddings(_find_unembedding(model, ids[:2]))
            return blocks
        reasons.append(f"{name}: {reason}")
    detail = "; ".join(dict.fromkeys(reasons[:4])) or "no list of blocks gives patches of one shape"
    raise ModelError(f"{model.name} has no blocks whose class token gives the logits ({detail})")


def _rejection_reason(
    blocks: DecoderBlocks, ids: torch.Tensor, other_ids: torch.Tensor, logits: torch.Tensor
) -> str | None:
    """Reason to reject `blocks`; None if the class token of layer L alone gives the `logits`."""

    limit = _limit(logits)
    try:
        last = blocks.residuals(ids)[-1]
        if not (change := _change(logits, blocks.run_tail(last, other_ids))) <= limit:
            return (
                f"the logits are no function of the last block's output alone (another image below "
                f"it changes them by {change:.1e})"
            )
        mixed = with_class_token(blocks.residuals(other_ids)[-1], last[:, :1])
        if not (change := _change(logits, blocks.run_tail(mixed, other_ids))) <= limit:
            return (
                "the logits read more than the class token, such as a mean of the patches: other "
                f"patches in the last layer change them by {change:.1e}; no head on one position "
                "gives them"
            )
    except (ModelError, RuntimeError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        return str(error).splitlines()[0]
    return None


def _change(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Largest |difference| of two tensors of logits over the largest |logit| of the first."""
    return float((others - logits).abs().max()) / max(float(logits.abs().max()), 1e-30)


def _limit(logits: torch.Tensor) -> float:
    """Change of logits that is still rounding."""
    return 1e-3 if logits.dtype == torch.float32 else 5e-2


def _find_unembedding(model: ImageClassifier, ids: torch.Tensor) -> nn.Linear:
    """The linear map that ran once and whose output has a number for each class.

    Raises `ModelError` if there is none, or several.
    """
    outputs: dict[nn.Linear, list[torch.Tensor]] = {}

    def record(module: nn.Module, _: object, output: Any) -> None:
        assert isinstance(module, nn.Linear)
        outputs.setdefault(module, []).append(output)

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(record) for module in linear]
    try:
        logits = logits_of(run_model(model, ids))[:, 0]
    finally:
        for handle in handles:
            handle.remove()
    found = [
        module
        for module, calls in outputs.items()
        if len(calls) == 1 and calls[0].shape == logits.shape
    ]
    if len(found) != 1:
        raise ModelError(
            f"{model.name} has {len(found) or 'no'} linear maps from one position to the "
            f"{logits.shape[-1]} classes; expected one classifier"
        )
    return found[0]

"""Checks of an image classifier before a row is stored: `check_classifier`, `recheck_classifier`.

They are those of `checks/model_checks.py` for the class token: its blocks are found, a head on
layer L of position 0 must give the model's logits, on images and on noise, and a row must not
depend on the other images of its batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ..checks.independence import (
    SHARING_TOLERANCE,
    ImageIndependence,
    lowest_dtype,
    refuse_difference,
    row_change,
)
from ..checks.logits_error import LogitsErrors, measure_logits_errors
from ..checks.model_checks import ModelReport, value_range
from ..checks.reference_rows import FILE, LIMIT
from ..devices import memory_errors
from ..errors import HeadMismatchError, MismatchError, ModelError
from ..files.confined_files import is_regular, read_confined
from ..format.dtypes import ValueRange, choose_dtype
from ..format.logits_arrays import RECOMPUTE, check_kept_tokens
from ..format.manifest import SHORT_ID
from ..head.head import Head
from ..head.head_identification import SMALL_STD, identify_head, scale_to_std, verify_head
from ..model.blocks import DecoderBlocks
from ..model.model_devices import input_device
from ..model.resume import ResumableRun
from ..store.activation_cache import ActivationCache
from .classifier_blocks import ClassTokenTail, ImageClassifier, find_image_blocks
from .image_stream import ImagePixels, ImageStream

IMAGES = 6
"""Images of the data that are run for the checks."""
NOISE_IMAGES = 18
"""Images of random pixels beside them, whose class tokens vary more."""
MOST_REFERENCE_ROWS = 16
"""Most rows of the reference image in a cache."""


@contextmanager
def _memory_errors(model: ImageClassifier) -> Iterator[None]:
    with memory_errors(
        f"{model.name} cannot be checked: {IMAGES + NOISE_IMAGES} images do not fit into memory "
        "beside the model; extract on another --device"
    ):
        yield


class _CheckImages:
    """Two batches of images: of the data and random pixels, and others of the same number."""

    def __init__(self, model: ImageClassifier, stream: ImageStream, pixels: ImagePixels) -> None:
        model.pixels = pixels.pixels
        device, length = input_device(model), int(stream.lengths[0])
        real = stream.beginning(min(IMAGES, len(stream.lengths)))
        n_noise = IMAGES + NOISE_IMAGES - len(real)
        self.n_real = len(real)
        self.ids = self._batch(real, pixels.add_noise(n_noise, 0), length).to(device)
        """Images of the data first, `(images, positions)`."""
        others = pixels.add_noise(len(self.ids), 1)
        self.other_ids = self._batch(real[:0], others, length).to(device)
        """Random pixels alone, `(images, positions)`."""

    @staticmethod
    def _batch(real: np.ndarray, noise: np.ndarray, length: int) -> torch.Tensor:
        rows = np.tile(np.arange(length, dtype=np.int64), (len(noise), 1))
        rows[:, 0] = noise
        return torch.from_numpy(np.concatenate([real, rows]))


def check_classifier(
    model: ImageClassifier,
    stream: ImageStream,
    pixels: ImagePixels,
    compute_dtype: str,
    policy: str,
    *,
    logits: str = RECOMPUTE,
    batch_tokens: int | None = None,
) -> ModelReport:
    """Find blocks and head of `model` and measure both on a few images of `stream`.

    `compute_dtype`, `policy`, `logits` and `batch_tokens` as in `checks/model_checks.check_model`.
    Raises `ModelError` or `HeadMismatchError` with the reason if the class token does not give the
    model's logits.
    """
    with torch.inference_mode(), _memory_errors(model):
        images = _CheckImages(model, stream, pixels)
        stack = find_image_blocks(model, images.ids, images.other_ids)
        head, tensors = _identify_head(stack, images)
        head_error = _head_error(head, stack, images)
        check_kept_tokens(logits, head.vocab)
        independence = _measure_independence(stack, images)
        layers, model_logits = stack.residuals_and_logits(images.ids[: images.n_real])
        dtypes = {
            layer: choose_dtype(_range(hidden), compute_dtype, policy)
            for layer, hidden in enumerate(layers)
        }
        return ModelReport(
            stack=stack,
            head=head,
            tensors=tensors,
            head_error=head_error,
            logits=_logits_errors(
                head, layers[-1], model_logits, dtypes[stack.depth], policy, logits
            ),
            independence=independence,
            dtypes=dtypes,
        )


def recheck_classifier(
    model: ImageClassifier, stream: ImageStream, pixels: ImagePixels, cache: ActivationCache
) -> DecoderBlocks:
    """The blocks of `model`, checked to continue `cache`: head, independence, reference rows.

    Raises `HeadMismatchError` or `MismatchError` where the cache's are others.
    """
    with torch.inference_mode(), _memory_errors(model):
        images = _CheckImages(model, stream, pixels)
        stack = find_image_blocks(model, images.ids, images.other_ids)
        _head_error(cache.head, stack, images)
        independence = _measure_independence(stack, images)
    if independence.alone and not cache.manifest.alone:
        raise MismatchError(
            f"rows of cache {cache.id[:SHORT_ID]} ran in batches, and other images of a batch "
            f"change a row by {independence.batch_error:.1e}; extract the images anew into another "
            "root"
        )
    _check_reference_image(stack, pixels, cache)
    return stack


def save_reference_image(stack: DecoderBlocks, stream: ImageStream, folder: Path) -> None:
    """Save the pixels of the first image and the first rows of all its layers, float32."""
    from safetensors.numpy import save_file

    model = stack.model
    assert isinstance(model, ImageClassifier)
    assert model.pixels is not None
    ids = stream.beginning(1)
    tensors = {"pixels": np.ascontiguousarray(model.pixels(ids[:, 0].tolist()))}
    for layer, rows in enumerate(_reference_rows(stack, ids)):
        tensors[f"residual/{layer}"] = np.ascontiguousarray(rows)
    save_file(tensors, folder / FILE)


def _check_reference_image(
    stack: DecoderBlocks, pixels: ImagePixels, cache: ActivationCache
) -> None:
    """Raise `MismatchError` if this machine gives other rows for the cache's reference image."""
    from safetensors.numpy import load

    if not is_regular(cache.path / "head", FILE):
        return
    tensors = load(read_confined(cache.path / "head", FILE))
    key = int(pixels.add_noise(1, 2)[0])
    pixels.noise[key] = tensors["pixels"][0]
    grid = cache.manifest.image_grid
    assert grid is not None
    ids = np.arange(grid.tokens, dtype=np.int64)[None]
    ids[0, 0] = key
    limit = LIMIT.get(cache.manifest.capture.compute_dtype, 1e-3)
    for layer, rows in enumerate(_reference_rows(stack, ids)):
        stored = np.nan_to_num(tensors[f"residual/{layer}"])
        scale = max(float(np.abs(stored).max()), 1e-30)
        change = float(np.abs(np.nan_to_num(rows) - stored).max()) / scale
        if not change <= limit:
            raise MismatchError(
                f"this machine computes other numbers than the one that made the cache: layer "
                f"{layer} of the reference image differs by {change:.1e} of its largest value, "
                f"allowed {limit:.0e}; finish it there, or extract into another root"
            )


def _reference_rows(stack: DecoderBlocks, ids: np.ndarray) -> list[np.ndarray]:
    """Layers 0 to L at the first positions of one image, each `(rows, d_model)` float32."""
    tokens = torch.from_numpy(ids).to(input_device(stack.model))
    with torch.inference_mode():
        layers = stack.residuals(tokens)
    return [hidden[0, :MOST_REFERENCE_ROWS].float().cpu().numpy() for hidden in layers]


def _identify_head(
    stack: DecoderBlocks, images: _CheckImages
) -> tuple[Head, dict[str, torch.Tensor]]:
    """The head on the class token, read off the model's modules; its tensors."""
    tail = ClassTokenTail(stack, ResumableRun(stack, images.other_ids))
    try:
        return identify_head(tail, images.ids)
    except (ModelError, HeadMismatchError) as error:
        raise ModelError(
            f"no head on the class token can be read from {stack.model.name}: {error}"
        ) from None


def _head_error(head: Head, stack: DecoderBlocks, images: _CheckImages) -> float:
    """Largest relative error of the head on the class tokens; raises `HeadMismatchError`.

    Measured on the model's own runs, and on class tokens so small that the norm's eps matters.
    """
    dtype = lowest_dtype(stack.model)
    layers, logits = stack.residuals_and_logits(images.ids)
    hidden = layers[-1][:, :1]
    error = verify_head(head, hidden, logits, dtype)
    tail = ClassTokenTail(stack, ResumableRun(stack, images.other_ids))
    small = scale_to_std(hidden, SMALL_STD)
    return max(error, verify_head(head, small, tail.run_tail(small, images.other_ids), dtype))


def _measure_independence(stack: DecoderBlocks, images: _CheckImages) -> ImageIndependence:
    """Run images alone and together; refuses a model that gives other rows when it runs again."""
    dtype = lowest_dtype(stack.model)
    together = stack.residuals(images.ids)
    again = stack.residuals(images.ids)
    change = max(row_change(a, b, dtype) for a, b in zip(together, again, strict=True))
    refuse_difference(stack.model, images.ids, change)
    error = 0.0
    for number in {0, images.n_real - 1, len(images.ids) - 1}:
        alone = stack.residuals(images.ids[number : number + 1])
        pairs = zip(alone, together, strict=True)
        changes = [row_change(a, b[number : number + 1], dtype) for a, b in pairs]
        error = max(error, *changes)
    limit = SHARING_TOLERANCE.get(dtype, 1e-4)
    return ImageIndependence(error, longest=images.ids.shape[1], limit=limit)


def _range(hidden: torch.Tensor) -> ValueRange:
    """Range of the values of a layer, `(images, positions, d_model)`."""
    return value_range(hidden.flatten(0, 1))


def _logits_errors(
    head: Head, last: torch.Tensor, logits: torch.Tensor, dtype: str, policy: str, mode: str
) -> LogitsErrors:
    """Error of every logits mode against the model, on the class tokens of layer L."""
    hidden = last[:, 0].float().cpu().numpy()
    model_logits = logits.float().flatten(0, 1).cpu().numpy()

    def choose_logits_dtype(values: np.ndarray) -> str:
        return choose_dtype(value_range(torch.from_numpy(values)), "float32", policy)

    return measure_logits_errors(head, hidden, model_logits, dtype, choose_logits_dtype, mode)

"""A request whose model is an image classifier: its options, its images, the checks of its model.

`answer.py` and `prepare.py` come here where `locate_source` gives a `ClassifierSource`; everything
after it is what texts go through.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..documents.documents import Documents
from ..errors import DataError, UsageError
from ..files.disk_columns import scratch_folder
from ..images.classifier_source import ClassifierSource, names_classifier
from ..images.image_rows import ImageRows, open_images
from ..images.image_stream import ImagePixels, ImageStream, make_image_stream
from ..model.source import ModelSource
from ..progress import StageProgress
from ..store.activation_cache import ActivationCache
from ..store.catalog import cache_root
from ..tokens.positions import CLASS_TOKEN, keep_positions, sample_size
from ..tokens.token_stream import TokenStream
from .request import ExtractionRequest

if TYPE_CHECKING:
    import torch

    from ..checks.model_checks import ModelReport
    from ..model.blocks import DecoderBlocks

TEXT_OPTIONS = {
    "context": None,
    "separator": None,
    "data_format": None,
    "bos": "auto",
    "generation_prompt": False,
    "device_map": None,
}
"""Options of texts, or of language models, with the value that they have when nobody gives one."""


def locate_source(request: ExtractionRequest) -> ModelSource:
    """The model of `request`: a `ClassifierSource` where config.json names an image classifier."""
    if request.given.model is not None:
        return request.given.model
    source = ModelSource.locate(request.model, request.revision, request.trust_remote_code)
    return ClassifierSource.of(source) if names_classifier(source) else source


def request_for(request: ExtractionRequest, source: ModelSource) -> ExtractionRequest:
    """`request` as the model reads it: images are never packed.

    Raises `UsageError` for options that images, or texts, do not have.
    """
    if not isinstance(source, ClassifierSource):
        if request.positions == CLASS_TOKEN:
            raise UsageError(
                f"positions {CLASS_TOKEN} keeps the class token of images, and {request.model} "
                "reads texts; choose all, last, sample:K, answer or explicit"
            )
        return request
    for name, default in TEXT_OPTIONS.items():
        if getattr(request, name) != default:
            raise UsageError(
                f"{name} is for texts, and {request.model} is an image classifier; leave it out"
            )
    if request.format == 1:
        raise UsageError("images need a cache of format 2; leave --format out")
    kept = request.positions
    if kept not in ("all", CLASS_TOKEN) and not sample_size(kept):
        raise UsageError(
            f"positions {kept} is for texts; of images choose all (class token and patches), "
            f"{CLASS_TOKEN} (the class token) or sample:K"
        )
    return replace(request, pack=False)


def read_image_stream(
    request: ExtractionRequest, source: ClassifierSource, progress: StageProgress | None
) -> TokenStream:
    """Read every image of `request` once; raises `DataError` for one that is damaged."""
    stream = make_image_stream(
        _open_images(request),
        source.grid,
        seed=request.seed,
        max_tokens=request.max_tokens,
        scratch=scratch_folder(cache_root(request.root)),
        progress=progress and (lambda done, total: progress("tokenize", done, total)),
    )
    return keep_positions(request.positions, stream, Documents([]), request.seed)


def check_requested_classifier(
    request: ExtractionRequest, source: ClassifierSource, model: Any, stream: TokenStream
) -> "ModelReport":
    """The checks of an image classifier, which reads the images of `request` from here on."""
    from ..images.classifier_checks import check_classifier

    assert isinstance(stream, ImageStream)
    return check_classifier(
        model,
        stream,
        ImagePixels.of(_open_images(request), source, stream),
        source.compute_dtype,
        request.dtype,
        logits=request.logits,
    )


def recheck_requested_classifier(
    request: ExtractionRequest,
    source: ClassifierSource,
    model: Any,
    stream: TokenStream,
    cache: ActivationCache,
) -> "DecoderBlocks":
    """The checks of an image classifier that goes on with `cache`, on the images of `request`."""
    from ..images.classifier_checks import recheck_classifier

    assert isinstance(stream, ImageStream)
    pixels = ImagePixels.of(_open_images(request), source, stream)
    return recheck_classifier(model, stream, pixels, cache)


def load_requested_classifier(
    request: ExtractionRequest, source: ClassifierSource, device: "torch.device"
) -> "torch.nn.Module":
    """The image classifier of the request on `device`."""
    from ..images.classifier_blocks import load_classifier

    return load_classifier(source, device, request.attention)


def _open_images(request: ExtractionRequest) -> ImageRows:
    """The images of `request`: a data set that was given, or those of its folder."""
    texts = request.given.texts
    if texts is not None and texts.dataset is None:
        raise DataError(
            f"{request.model} is an image classifier, and {texts.name} are rows of texts; give a "
            "folder of images, or a datasets.Dataset with a column of images"
        )
    given = None if texts is None else texts.dataset
    return open_images(request.data, request.split, request.text_column, given)

"""Images as data: files, image processor, token stream, and the classifiers that read them."""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .block_candidates import block_shapes as block_shapes
    from .classifier_blocks import find_image_blocks as find_image_blocks
    from .classifier_checks import check_classifier as check_classifier
    from .classifier_source import ClassifierSource as ClassifierSource
    from .image_rows import ImageRows as ImageRows
    from .image_rows import open_images as open_images
    from .image_stream import ImageStream as ImageStream
    from .image_stream import make_image_stream as make_image_stream
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

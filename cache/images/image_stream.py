"""`ImageStream`: the images of an extraction as sequences of patches, in the order of the cache.

One image is one sequence. Its token ids are the numbers of its positions, 0 for the class token, so
that they are the same in every image; what tells images apart is the hash of their bytes
(`sequences/document`). Models are given both: ids whose first number is this hash, the image's
*key* (`sequence`, and `forward/part_runner.py`), by which `ImagePixels` finds the pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..documents.documents import Reading
from ..documents.labels import LABEL_PREFIX
from ..errors import DataError
from ..files.disk_columns import ComputedColumn
from ..format.manifest import IMAGE, ImageGrid
from ..progress import Progress
from ..tokens.token_stream import TokenStream
from .classifier_source import ClassifierSource
from .image_rows import ImageRows, decode_image, image_hash

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class ImageStream(TokenStream):
    """Images as sequences of their positions; `documents` are the hashes of the images."""

    def sequence(self, number: int) -> np.ndarray:
        """Ids of one image for the model, `(positions,)` int64: its key, then positions."""
        ids = super().sequence(number).astype(np.int64)
        ids[0] = image_keys(self.sequence_documents[number : number + 1])[0]
        return ids

    def beginning(self, count: int) -> np.ndarray:
        """Ids for the model of the first `count` images, again from the first where they end."""
        numbers = np.arange(count) % len(self.lengths)
        return np.stack([self.sequence(int(number)) for number in numbers])


def image_keys(hashes: np.ndarray) -> np.ndarray:
    """The hashes of images, uint64, as the numbers that models are given, int64."""
    return np.ascontiguousarray(hashes).view(np.int64)


def make_image_stream(
    rows: ImageRows,
    grid: ImageGrid,
    *,
    seed: int,
    max_tokens: int | None = None,
    scratch: "Path | None" = None,
    progress: Progress | None = None,
) -> ImageStream:
    """Read and decode every image once, and make the stream of all, permuted by `seed`.

    Equal files are one image, the first. Missing images are left out and reported. Raises
    `DataError` for a damaged image, which it names.
    """
    reading = Reading(rows.column, None, list(rows.notes))
    hashes: list[int] = []
    numbers: list[int] = []
    seen: set[int] = set()
    for number in range(len(rows)):
        encoded = rows.read(number)
        if encoded is None:
            reading.drop("missing", number)
        else:
            decode_image(encoded, rows.name(number))
            key = image_hash(encoded)
            if key in seen:
                reading.drop("the same file as an earlier image", number)
            else:
                seen.add(key)
                hashes.append(key)
                numbers.append(number)
        if progress is not None:
            progress(number + 1, len(rows))
    if not numbers:
        raise DataError(f"{rows.data} holds no image")

    order = np.random.default_rng(seed).permutation(len(numbers))
    if max_tokens is not None:
        order = order[: max_tokens // grid.tokens]
        if not len(order):
            raise DataError(
                f"max_tokens {max_tokens} is less than the {grid.tokens} positions of one image; "
                "allow more"
            )
    kept = np.array(numbers, np.int64)[order]
    labels = rows.labels()
    reading.notes += labels.notes
    return ImageStream(
        ids=position_numbers(len(order), grid.tokens),
        lengths=np.full(len(order), grid.tokens, np.int64),
        row_ids=kept,
        sequence_arrays={LABEL_PREFIX + name: array[kept] for name, array in labels.values.items()},
        categories={LABEL_PREFIX + name: words for name, words in labels.categories.items()},
        cut_tokens=np.zeros(len(order), np.int64),
        scratch=scratch,
        documents=np.array(hashes, np.uint64)[order],
        split_by=IMAGE,
        reading=reading,
    )


def position_numbers(images: int, tokens: int) -> ComputedColumn:
    """0 .. `tokens` - 1 for each of `images`, one after the other, int32."""
    return ComputedColumn(
        images * tokens,
        np.dtype(np.int32),
        lambda start, stop: (np.arange(start, stop) % tokens).astype(np.int32),
    )


@dataclass
class ImagePixels:
    """Finds the pixels of images by their keys, and makes random ones for checks."""

    rows: ImageRows
    source: ClassifierSource
    numbers: dict[int, int]
    """Key -> number of the image in `rows`."""
    noise: dict[int, np.ndarray] = field(default_factory=dict)
    """Key -> pixels `(channels, height, width)` of images that no data hold."""

    @classmethod
    def of(cls, rows: ImageRows, source: ClassifierSource, stream: TokenStream) -> "ImagePixels":
        """The pixels of the images of `stream`, made of `rows`."""
        keys = image_keys(stream.sequence_documents).tolist()
        return cls(rows, source, dict(zip(keys, stream.row_ids.tolist(), strict=True)))

    def pixels(self, keys: Sequence[int]) -> np.ndarray:
        """Pixels of the images of `keys`, `(images, channels, height, width)` float32.

        Raises `DataError` for an image that is not among the data, or whose file changed since.
        """
        return np.stack([self._pixels_of(key) for key in keys])

    def _pixels_of(self, key: int) -> np.ndarray:
        if key in self.noise:
            return self.noise[key]
        number = self.numbers.get(key)
        if number is None:
            raise DataError(
                f"an image of the cache is not in {self.rows.data}; give the images that the cache "
                "was extracted from"
            )
        name = self.rows.name(number)
        encoded = self.rows.read(number)
        if encoded is None or image_keys(np.array([image_hash(encoded)], np.uint64))[0] != key:
            raise DataError(f"{name} changed while the images were read; run the command again")
        return self.source.pixels([decode_image(encoded, name)], [name])[0]

    def add_noise(self, images: int, seed: int) -> np.ndarray:
        """Keys of new images of standard normal pixels, `(images,)` int64."""
        first = next(iter(self.numbers))
        shape = self._pixels_of(first).shape
        rng = np.random.default_rng(seed)
        keys = rng.integers(-(1 << 62), 1 << 62, images)
        for key in keys.tolist():
            self.noise[key] = rng.standard_normal(shape).astype(np.float32)
        return keys

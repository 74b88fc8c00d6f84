"""`ImageRows`: encoded images and their labels, from a folder of files or a data set of `datasets`.

`open_images` reads names and labels, no image. `decode_image` decodes one, within bounds that are
checked before any pixel is decoded. An image is identified by the bytes of its file (`image_hash`),
not by its pixels: decoders round differently, and a split must not depend on the decoder.
"""

import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..documents.data_files import STANDARD_INPUT, is_pattern
from ..documents.labels import Labels, kind_of_value, label_arrays
from ..errors import DataError
from ..optional_libraries import require_extra

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Endings of image files, in any case."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Formats that Pillow may decode; the ending of a file does not matter."""
READ_ROWS = 1000
"""Rows of a data set whose labels are read at once."""
MAX_FILE_BYTES = 1 << 28
"""Largest file of one image."""
LABEL, FILE = "label", "file"
"""Labels of images in a folder: name of the subfolder, path of the file in the folder."""


@dataclass(frozen=True)
class ImageRows:
    """Encoded images, read by number from 0, with labels beside them."""

    data: str
    """Name of the data, for messages."""
    names: tuple[str, ...]
    """Name of each image, for messages: the path of its file, or `row 3`."""
    read: Callable[[int], bytes | None]
    """Gives the encoded image of a number; None for a missing one."""
    records: Callable[[], Iterator[dict[str, Any]]]
    """Gives the labels of every image, by column."""
    column: str | None = None
    """Column of the images in a data set."""
    notes: tuple[str, ...] = field(default=())
    """Decisions in words, for people."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, number: int) -> str:
        """Name of an image with that of the data, for messages."""
        return f"{self.data}, {self.names[number]}"

    def labels(self) -> Labels:
        """The labels of all images, in their order."""
        kinds: dict[str, Counter[str]] = {}
        for record in self.records():
            for column, value in record.items():
                kinds.setdefault(column, Counter())[kind_of_value(value)] += 1
        return label_arrays(self.records, kinds)


def open_images(
    data: str, split: str | None = None, column: str | None = None, given: Any = None
) -> ImageRows:
    """The images of `data`: a folder of image files, or a folder saved by `datasets`.

    In a folder, files in a subfolder have the subfolder's name as their label `label`; files are
    sorted by path. Of a data set, `column` is the column of images (default: the only one), `split`
    one of several splits. `given` is a `datasets.Dataset` in memory instead. Raises `DataError`.
    """
    require_extra("vision", "reading images")
    if given is not None:
        return _rows_of_dataset(_chosen_split(given, split, data), data, column)
    folder = Path(data).expanduser()
    if data == STANDARD_INPUT or is_pattern(data) or folder.is_file():
        raise DataError(
            f"images are read from a folder of image files, with a subfolder per class, or from a "
            f"folder saved by datasets; found {data}"
        )
    if not folder.is_dir():
        raise DataError(
            f"{data} does not exist; give a folder of image files, or a folder saved by datasets"
        )
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        from datasets import load_from_disk

        try:
            saved = load_from_disk(str(folder))
        except Exception as error:  # datasets raises many kinds; all mean an unusable folder
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"{data} is not a folder saved by datasets: {reason}") from None
        return _rows_of_dataset(_chosen_split(saved, split, data), data, column)
    if split is not None or column is not None:
        option = "--split" if split is not None else "--text-column"
        raise DataError(f"{option} is for data sets of `datasets`; {data} is a folder of images")
    return _rows_of_folder(folder, data)


def image_hash(encoded: bytes) -> int:
    """First 64 bits of the sha256 of a file's bytes: the image's identity, and its split."""
    return int.from_bytes(hashlib.sha256(encoded).digest()[:8], "little")


def decode_image(encoded: bytes, name: str) -> "Image":
    """The image as RGB, turned upright as its EXIF data say; of an animation the first frame.

    Raises `DataError`, which names the image, for damaged files, formats other than `FORMATS`, and
    images of more pixels than Pillow's `MAX_IMAGE_PIXELS`, before they are decoded.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    most = Image.MAX_IMAGE_PIXELS or 1 << 62
    if len(encoded) > MAX_FILE_BYTES:
        raise DataError(f"{name}: the file has {len(encoded):,} bytes, at most {MAX_FILE_BYTES:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large images are refused below, not warned of
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
            width, height = image.size
            if width * height > most:
                raise Image.DecompressionBombError
            image.load()
            return (ImageOps.exif_transpose(image) or image).convert("RGB")
    except Image.DecompressionBombError:
        raise DataError(
            f"{name}: the image has more than {most:,} pixels (PIL.Image.MAX_IMAGE_PIXELS); make "
            "it smaller"
        ) from None
    except UnidentifiedImageError:
        raise DataError(
            f"{name} is no image that can be read; expected one of {', '.join(FORMATS)}"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name} is damaged: {reason}; replace the file or take it out of the data"
        ) from None


def _rows_of_folder(folder: Path, data: str) -> ImageRows:
    """The image files below `folder`, hidden ones left out."""
    files: list[Path] = []
    others = 0
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        if path.suffix.lower() in ENDINGS:
            files.append(relative)
        else:
            others += 1
    if not files:
        raise DataError(
            f"{data} holds no image; expected files that end in {', '.join(ENDINGS)}, or a folder "
            "saved by datasets"
        )
    notes = [f"{others} files are left out: their endings are none of an image"] if others else []
    classes = {file.parts[0] for file in files if len(file.parts) > 1}
    if classes:
        notes.append(f"the label {LABEL!r} is the name of the subfolder ({len(classes)} classes)")
    names = tuple(file.as_posix() for file in files)

    def read(number: int) -> bytes:
        path = folder / files[number]
        try:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise DataError(f"{path}: the file has {size:,} bytes, at most {MAX_FILE_BYTES:,}")
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None

    def records() -> Iterator[dict[str, Any]]:
        for file in files:
            record: dict[str, Any] = {FILE: file.as_posix()}
            if classes:
                record[LABEL] = file.parts[0] if len(file.parts) > 1 else None
            yield record

    return ImageRows(data, names, read, records, notes=tuple(notes))


def _chosen_split(rows: Any, split: str | None, data: str) -> Any:
    """A data set, or one split of several: `split`, else `train`, else the first."""
    if not isinstance(rows, dict):
        if split is not None and split != str(getattr(rows, "split", None)):
            raise DataError(f"{data} has no split {split!r}; it is one data set without splits")
        return rows
    name = split or ("train" if "train" in rows else next(iter(rows), "train"))
    if name not in rows:
        raise DataError(f"{data} has no split {name!r}; it has {', '.join(map(str, rows))}")
    return rows[name]


def _rows_of_dataset(rows: Any, data: str, column: str | None) -> ImageRows:
    """The images of a data set of `datasets`, undecoded, and its plain columns as labels."""
    from datasets import ClassLabel, Image

    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    if column is None and len(images) != 1:
        found = ", ".join(images) or "none"
        raise DataError(
            f"{data} must have one column of images (datasets.Image), found {found}; choose one "
            "with --text-column"
            if images
            else f"{data} has no column of images (datasets.Image); its columns are "
            f"{', '.join(rows.features)}"
        )
    name = column or images[0]
    if name not in images:
        raise DataError(
            f"{data} has no column of images {name!r}; such columns are {', '.join(images)}"
        )
    encoded = rows.with_format(None).cast_column(name, Image(decode=False))
    others = [
        column
        for column, feature in rows.features.items()
        if column != name and getattr(feature, "dtype", None) in _LABEL_DTYPES
    ]
    words = {
        column: rows.features[column].names
        for column in others
        if isinstance(rows.features[column], ClassLabel)
    }

    def read(number: int) -> bytes | None:
        value = encoded[number][name]
        if value is None:
            return None
        if value.get("bytes") is not None:
            return value["bytes"]
        try:
            return Path(value["path"]).read_bytes()
        except (OSError, TypeError) as error:
            raise DataError(f"{data}, row {number}: the image cannot be read: {error}") from None

    def records() -> Iterator[dict[str, Any]]:
        table = rows.with_format(None).select_columns(others) if others else None
        for start in range(0, len(rows), READ_ROWS):
            stop = min(start + READ_ROWS, len(rows))
            values = {} if table is None else table[start:stop]
            for number in range(stop - start):
                record = {column: values[column][number] for column in others}
                for column, names in words.items():
                    code = record[column]
                    record[column] = None if code is None or code < 0 else names[code]
                yield record

    notes = [f"the images are the column {name!r}"] if column is None else []
    names = tuple(f"row {number}" for number in range(len(rows)))
    return ImageRows(data, names, read, records, column=name, notes=tuple(notes))


_LABEL_DTYPES = ("bool", "string", "large_string", "float32", "float64")
_LABEL_DTYPES += tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
"""dtypes of columns that are labels."""

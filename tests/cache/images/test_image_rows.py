"""Images from folders and data sets: names, labels, bounds, and one message for a damaged file."""

import io
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from residua.cache.errors import DataError
from residua.cache.images import image_rows
from residua.cache.images.image_rows import decode_image, image_hash, open_images

from ...support.images import CLASSES, make_picture, save_pictures


def encoded(mode: str = "RGB", kind: str = "PNG", **options: object) -> bytes:
    pixels = make_picture(np.random.default_rng(0), "dog", 12)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG file that claims a size, with a right checksum and no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    return header + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT" + struct.pack(">I", 0)


def test_a_folder_gives_its_images_by_path_with_the_subfolder_as_label(tmp_path: Path) -> None:
    folder = save_pictures(tmp_path / "pictures", 2)
    (folder / "alone.JPG").write_bytes(encoded(kind="JPEG"))
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(encoded())
    (folder / ".thumbs").mkdir()
    (folder / ".thumbs" / "x.png").write_bytes(encoded())
    rows = open_images(str(folder))
    assert rows.names == (
        "alone.JPG",
        *(f"{name}/00{number}.png" for name in sorted(CLASSES) for number in (0, 1)),
    )
    labels = rows.labels()
    words = labels.categories["label"]
    codes = labels.values["label"].tolist()
    assert [None if code < 0 else words[code] for code in codes] == [
        None, "bird", "bird", "cat", "cat", "dog", "dog",
    ]  # fmt: skip
    assert any("1 files are left out" in note for note in rows.notes)
    assert image_hash(rows.read(1) or b"") == image_hash((folder / "bird/000.png").read_bytes())


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("RGBA", "PNG"), ("P", "GIF"), ("RGB", "JPEG"), ("RGB", "WEBP"), ("1", "BMP")],
)
def test_every_kind_of_image_is_read_as_rgb(mode: str, kind: str) -> None:
    image = decode_image(encoded(mode, kind), "it")
    assert (image.mode, image.size) == ("RGB", (12, 12))


def test_images_are_turned_upright_as_their_exif_data_say() -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    upright = np.asarray(decode_image(buffer.getvalue(), "it"))
    assert upright.shape == (8, 4, 3)
    np.testing.assert_array_equal(upright, np.rot90(pixels, -1))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded()[:-30], "is damaged"),
        (encoded(kind="JPEG")[:200], "is damaged"),
        (b"GIF89a", "no image that can be read|is damaged"),
        (b"", "no image that can be read"),
        (b"<svg></svg>", "no image that can be read"),
        (png_header(60000, 60000), "more than 89,478,485 pixels"),
    ],
)
def test_a_damaged_image_is_named_in_one_message(content: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as raised:
        decode_image(content, "folder, cat/007.png")
    assert "cat/007.png" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_large_file_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_pictures(tmp_path / "pictures", 1)
    monkeypatch.setattr(image_rows, "MAX_FILE_BYTES", 100)
    with pytest.raises(DataError, match=r"bird/000\.png: the file has .* bytes, at most 100"):
        open_images(str(folder)).read(0)


def test_a_data_set_gives_its_column_of_images_and_names_of_classes(tmp_path: Path) -> None:
    values = {
        "image": [{"bytes": encoded(), "path": None}, None, {"bytes": b"zz", "path": None}],
        "label": [2, 0, -1],
        "size": [1.5, 2.0, None],
    }
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=list(CLASSES)),
        size=datasets.Value("float64"),
    )
    saved = datasets.Dataset.from_dict(values, features=features)
    saved.save_to_disk(tmp_path / "set")
    for rows in (open_images(str(tmp_path / "set")), open_images("given", given=saved)):
        assert [rows.read(n) for n in range(3)] == [encoded(), None, b"zz"]
        assert rows.column == "image"
        labels = rows.labels()
        codes, words = labels.values["label"], labels.categories["label"]
        assert [None if code < 0 else words[code] for code in codes] == ["bird", "cat", None]
        np.testing.assert_array_equal(labels.values["size"], [1.5, 2.0, np.nan])


def test_data_without_images_are_refused_by_what_they_lack(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    two = datasets.Dataset.from_dict(
        {"a": [None], "b": [None]},
        features=datasets.Features(a=datasets.Image(), b=datasets.Image()),
    )
    words = datasets.Dataset.from_dict({"text": ["x"]})
    for call, reason in (
        (lambda: open_images(str(tmp_path / "texts")), "holds no image"),
        (lambda: open_images(str(tmp_path / "texts" / "a.txt")), "a folder of image files"),
        (lambda: open_images(str(tmp_path / "absent")), "does not exist"),
        (lambda: open_images("-"), "a folder of image files"),
        (lambda: open_images("given", given=two), "one column of images .* found a, b"),
        (lambda: open_images("given", given=words), "no column of images"),
        (lambda: open_images("given", column="c", given=two), "no column of images 'c'"),
        (lambda: open_images("given", split="test", given=words), "no split 'test'"),
        (lambda: open_images(str(save_pictures(tmp_path / "p", 1)), split="test"), "--split is"),
    ):
        with pytest.raises(DataError, match=reason):
            call()

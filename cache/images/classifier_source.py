"""`ClassifierSource`: an image classifier's folder, its identity and its image processor.

`extraction/answer.py` makes it of a `ModelSource` whose configuration names a class that ends in
`ForImageClassification`. The digest of the image processor takes the place of the tokenizer's in
the identity of a cache: resizing and normalization decide every row.
"""

import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..devices import is_out_of_memory
from ..errors import ModelError, UsageError
from ..files.json_files import json_digest
from ..format.manifest import ImageGrid
from ..model.config_check import check_config_readable, check_config_size, describe_error
from ..model.source import ModelSource
from ..model.transformers_guard import guard_transformers
from ..optional_libraries import require_extra

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

CLASSIFIER = "ForImageClassification"
"""Part of the names of classes of transformers that classify images."""
PROCESSOR_FILE = "image_processor.json"
"""File of the image processor in the folder `head/` of a cache."""
NO_SETTINGS = ("image_processor_type", "processor_class", "_name_or_path", "auto_map")
"""Keys of an image processor that change no pixel."""
CONFIG_FILE = "preprocessor_config.json"
"""File of the image processor in a model's folder."""


def names_classifier(source: ModelSource) -> bool:
    """Whether config.json names an image classifier; reads no weights."""
    names = source.config.get("architectures")
    return isinstance(names, list) and any(CLASSIFIER in str(name) for name in names)


@dataclass(frozen=True)
class ClassifierSource(ModelSource):
    """A folder with `config.json`, safetensors weights and `preprocessor_config.json`."""

    @classmethod
    def of(cls, source: ModelSource) -> "ClassifierSource":
        """The same folder, as that of an image classifier.

        Raises `UsageError` where code of the model would have to run.
        """
        require_extra("vision", "running an image classifier")
        if source.trust_remote_code:
            raise UsageError(
                "image classifiers run with the classes of transformers alone; leave "
                "--trust-remote-code out"
            )
        return cls(**{field.name: getattr(source, field.name) for field in fields(ModelSource)})

    @cached_property
    def processor(self) -> Any:
        """The image processor of the folder, run by Pillow and numpy; raises `ModelError`."""
        from transformers import AutoImageProcessor, __version__

        if not (self.folder / CONFIG_FILE).is_file():
            raise ModelError(
                f"{self.folder} holds no {CONFIG_FILE}, which says how images are resized and "
                "normalized; save the model's image processor there with save_pretrained"
            )
        # Without torchvision, whose resizing rounds otherwise: one identity, one kind of pixels.
        backend: dict[str, Any] = {"backend": "pil"}
        if int(__version__.partition(".")[0]) < 5:
            backend = {"use_fast": False}
        auto: Any = AutoImageProcessor
        try:
            with guard_transformers():
                return auto.from_pretrained(self.folder, local_files_only=True, **backend)
        except Exception as error:  # any error of a configuration
            raise ModelError(
                f"{self.folder}/{CONFIG_FILE} is no image processor that can be used: "
                f"{describe_error(error)}"
            ) from None

    @cached_property
    def processor_settings(self) -> dict[str, Any]:
        """Name and settings of the image processor, as `head/image_processor.json` keeps them."""
        settings = json.loads(self.processor.to_json_string())
        kept = {key: value for key, value in settings.items() if key not in NO_SETTINGS}
        return {"class": type(self.processor).__name__.removesuffix("Pil"), "settings": kept}

    @cached_property
    def tokenizer_files_digest(self) -> str:
        """Digest of all that decides the positions of an image and its pixels."""
        return json_digest({"processor": self.processor_settings, "config": self._config_digest})

    def pixels(self, images: "list[Image]", names: list[str]) -> "np.ndarray":
        """Pixels of RGB images as the model reads them, `(images, channels, height, width)`.

        `names` are for the message of the `ModelError` about an image that cannot be processed.
        """
        import numpy as np

        try:
            with guard_transformers():
                arrays = [
                    np.asarray(self.processor(images=[image], return_tensors="np")["pixel_values"])
                    for image in images
                ]
        except Exception as error:
            raise ModelError(
                f"the image processor cannot read {names[0]}: {describe_error(error)}"
            ) from None
        shapes = {array.shape for array in arrays}
        if len(shapes) != 1 or len(next(iter(shapes))) != 4:
            found = ", ".join(str(shape[1:]) for shape in sorted(shapes))
            raise ModelError(
                f"the image processor gives pixels of several shapes ({found}); expected one shape "
                "(channels, height, width) for every image, such as a fixed size gives"
            )
        return np.concatenate(arrays).astype(np.float32, copy=False)

    @cached_property
    def grid(self) -> ImageGrid:
        """Positions of an image, found by a run of the model's class without numbers.

        Raises `ModelError` where no list of blocks has the same positions in every layer.
        """
        import torch
        from PIL import Image
        from transformers import AutoConfig, AutoModelForImageClassification

        from .block_candidates import block_shapes

        check_config_readable(self.folder)
        check_config_size(
            self.folder,
            self.config,
            self.weight_files,
            model_class="AutoModelForImageClassification",
        )
        shape = self.pixels([Image.new("RGB", (97, 61))], ["a blank image"]).shape
        name = self._architecture
        auto: Any = AutoModelForImageClassification
        try:
            with guard_transformers(), torch.device("meta"), torch.no_grad():
                config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
                model = auto.from_config(config).eval()
                shapes = block_shapes(model, torch.empty(2, *shape[1:]))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"{name} cannot run on images {shape[1:]}, as its image processor makes them: "
                f"{describe_error(error)}"
            ) from None
        if not shapes:
            raise ModelError(
                f"{name} has no list of blocks that gives one residual stream of the same "
                "positions in every layer, as a vision transformer does; a convolutional or "
                "windowed model cannot be kept"
            )
        tokens = shapes[0][1]
        rows, columns = self._patch_grid(*shape[2:])
        if not rows * columns < tokens:
            raise ModelError(
                f"{name} has {tokens} positions for {rows} x {columns} patches, none of them a "
                "class token: its logits come from the patches, which no head on one position gives"
            )
        return ImageGrid(tokens, rows, columns)

    def _patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        size = self.config_value("patch_size")
        sizes = size if isinstance(size, list) else [size, size]
        if len(sizes) != 2 or not all(type(side) is int and side > 0 for side in sizes):
            raise ModelError(
                f"{self.folder}/config.json has patch_size {size!r}; expected the side of a patch "
                "in pixels, as vision transformers have it"
            )
        return height // sizes[0], width // sizes[1]

    @property
    def context(self) -> int | None:
        """Positions of an image."""
        return self.grid.tokens

    @cached_property
    def has_chat_template(self) -> bool:
        return False

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by id; ids as text where config.json names none."""
        return class_names_of(self.config)

    def save_processor(self, folder: Path) -> None:
        """Write `image_processor.json` to the folder `head/` of a cache."""
        text = json.dumps(self.processor_settings, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / PROCESSOR_FILE).write_text(text + "\n", encoding="utf-8")

    def to_extra(self) -> dict[str, Any]:
        """What the manifest keeps of the positions of an image."""
        return asdict(self.grid)


def class_names_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of classes by id, from `id2label` of a configuration; empty without it."""
    names = config.get("id2label")
    if not isinstance(names, dict):
        return ()
    by_id = {int(key): str(name) for key, name in names.items() if str(key).isdecimal()}
    return tuple(by_id.get(number, f"#{number}") for number in range(max(by_id, default=-1) + 1))

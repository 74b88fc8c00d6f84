"""Tiny image classifiers and pictures for tests; no download, parameters off their defaults."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

SIZE, PATCH = 16, 4
"""Pixels of a side of an image, and of a patch: 4 x 4 patches."""
CLASSES = ("cat", "dog", "bird")
CONFIG = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIZE,
    "patch_size": PATCH,
    "id2label": dict(enumerate(CLASSES)),
    "label2id": {name: number for number, name in enumerate(CLASSES)},
}
COLORS = {"cat": (220, 40, 40), "dog": (40, 220, 40), "bird": (40, 40, 220)}
"""Mean colour of the pictures of each class."""


def move_parameters(model: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Add noise to every parameter, so that norms have gains, biases and maps are no zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def save_classifier(folder: Path, kind: str = "ViT", seed: int = 0, **changes: Any) -> Path:
    """A tiny classifier of transformers with its image processor."""
    import transformers

    config_class = getattr(transformers, f"{kind}Config")
    model_class = getattr(transformers, f"{kind}ForImageClassification")
    torch.manual_seed(seed)
    model = model_class(config_class(**{**CONFIG, **changes}))
    move_parameters(model, seed)
    model.save_pretrained(folder)
    save_processor(folder)
    return folder


def save_processor(folder: Path) -> None:
    """The image processor of ViT for images of `SIZE` pixels."""
    import transformers

    name = "ViTImageProcessorPil" if transformers.__version__ >= "5" else "ViTImageProcessor"
    processor = getattr(transformers, name)(size={"height": SIZE, "width": SIZE})
    processor.save_pretrained(folder)


def make_picture(rng: np.random.Generator, name: str, side: int = SIZE) -> np.ndarray:
    """Pixels `(side, side, 3)` uint8 around the colour of a class."""
    noise = rng.normal(0, 40, (side, side, 3))
    return np.clip(np.array(COLORS[name]) + noise, 0, 255).astype(np.uint8)


def save_pictures(folder: Path, count: int, seed: int = 0, side: int = SIZE + 5) -> Path:
    """`count` pictures of each class in subfolders."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture = Image.fromarray(make_picture(rng, name, side))
            picture.save(folder / name / f"{number:03}.png")
    return folder

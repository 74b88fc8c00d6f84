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


def save_planted_classifier(folder: Path, block: int, layers: int = 4) -> Path:
    """A ViT whose class token learns the colour of an image in block `block` (1-based), exactly.

    Patches hold their mean colour in dimensions 3 to 5 from layer 0 on, the class token nothing but
    a little of class 0; the other blocks are identities. Block `block` adds to each position the
    mean of the (normed) colours of all. The head reads dimensions 3 to 5 as the three classes of
    the colours red, green, blue.
    """
    import transformers

    changes = {"num_hidden_layers": layers, "num_attention_heads": 1}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**CONFIG, **changes})  # type: ignore[arg-type]
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "layernorm" in name and name.endswith("weight")
            parameter.fill_(1.0 if is_norm else 0.0)
        modules: Any = model.named_modules()
        for name, module in modules:
            if isinstance(module, torch.nn.Conv2d):
                for channel in range(3):
                    module.weight[3 + channel, channel] = 1 / PATCH**2
            if f"layers.{block - 1}." in name or f"layer.{block - 1}." in name:
                if name.endswith(("v_proj", "value")):
                    for number in range(3, 6):
                        module.weight[number, number] = 1.0
                if name.endswith(("o_proj", "attention.output.dense")):
                    for number in range(3, 6):
                        module.weight[number, number] = 1.0
        whole: Any = model
        whole.vit.embeddings.cls_token[0, 0, 3] = 0.02
        whole.vit.layernorm.weight.fill_(1.5)
        for number in range(3):
            whole.classifier.weight[number, 3 + number] = 4.0
    model.save_pretrained(folder)
    save_processor(folder)
    return folder

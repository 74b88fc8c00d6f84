"""Search for lists of blocks that keep a residual stream of images: `block_candidates`.

`classifier_source.py` counts the positions of an image with it, on a model without numbers;
`classifier_blocks.py` verifies the candidates.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..model.block_search import BlockCall
from ..model.residual_axes import tensors_of


def block_shapes(classifier: nn.Module, pixels: torch.Tensor) -> list[tuple[int, ...]]:
    """Shapes (images, positions, d_model) of the streams of the candidates for the blocks.

    Candidates with most parameters come first. `pixels` has two images or more.
    """
    found = block_candidates(classifier, lambda n: classifier(pixel_values=pixels[:n]), len(pixels))
    return [shape for _, _, shape in found]


def block_candidates(
    model: nn.Module, run: Callable[[int], Any], images: int
) -> Iterator[tuple[str, list[nn.Module], tuple[int, ...]]]:
    """Yield name, calls and stream of the lists of blocks, those with most parameters first.

    `run(n)` runs the model on n images. The first tensor of every call of a block must be
    (images, positions, d_model) with the same numbers in all calls.
    """
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module)
    }
    modules = [module for members in lists.values() for module in members]
    calls, fewer_calls = (_record_calls(modules, lambda n=n: run(n)) for n in (images, images - 1))
    ranked = []
    for name, members in lists.items():
        member_set = set(members)
        of_list = [(block, shapes) for block, shapes in calls if block in member_set]
        of_fewer = [shapes for block, shapes in fewer_calls if block in member_set]
        streams = {shapes[0] if shapes else () for _, shapes in of_list}
        fewer = {shapes[0] if shapes else () for shapes in of_fewer}
        if len(streams) != 1 or len(of_list) < len(members) or len(of_fewer) != len(of_list):
            continue
        (shape,) = streams
        if len(shape) == 3 and shape[0] == images and fewer == {(images - 1, *shape[1:])}:
            size = sum(p.numel() for block in members for p in block.parameters())
            ranked.append((size, name, [block for block, _ in of_list], shape))
    ranked.sort(key=lambda entry: -entry[0])
    for _, name, blocks, shape in ranked:
        yield name, blocks, shape


def _record_calls(modules: list[nn.Module], run: Callable[[], Any]) -> list[BlockCall]:
    """The calls of `modules` in `run`, in order, with the shapes of their output tensors."""
    calls: list[BlockCall] = []

    def record(module: nn.Module, _: object, output: object) -> None:
        calls.append((module, [tuple(tensor.shape) for tensor in tensors_of(output)]))

    handles = [module.register_forward_hook(record) for module in dict.fromkeys(modules)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls

"""The picture of Future Lens: what a prompt says of the state of each layer and token of a passage.

All layers and tokens go through the model in batches, a layer at a time; each state is followed by
its own likeliest tokens (Pal et al., 2311.04897, figure of the future lens).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ....cache.errors import UsageError
from ....probes.prompts.patched_prompt import PatchedPrompt
from ....probes.prompts.prompt_runner import PromptRunner, batch_rows
from ...studies.results.study_figures import HeatPanel, StudyFigure
from ...token_texts.token_names import TokenNames
from .prompt_readings import generate

if TYPE_CHECKING:
    from ....cache.resuming.resumable_model import ResumableModel
    from ....cache.store.activation_cache import ActivationCache


@dataclass(frozen=True, eq=False)
class PassageCells:
    """Generated tokens of each layer and position of a passage."""

    sequence: int
    layers: tuple[int, ...]
    labels: tuple[str, ...]
    """Label of each input token."""
    tokens: np.ndarray
    """`(layers, positions, generated)` int64."""
    probabilities: np.ndarray
    """Probability of each generated token, `(layers, positions, generated)` float32."""
    texts: tuple[tuple[str, ...], ...]
    """Text of the generated tokens, a tuple for each layer."""
    token_labels: tuple[tuple[tuple[str, ...], ...], ...]
    """Label of each generated token."""
    prompt_names: tuple[str, ...]
    """Name of the prompt of each layer."""


def read_passage(
    cache: "ActivationCache",
    model: "ResumableModel",
    prompts: Mapping[int, PatchedPrompt],
    *,
    sequence: int,
    first: int = 0,
    tokens: int = 16,
    generated: int = 4,
    target_layer: int | None = None,
) -> PassageCells:
    """Generate `generated` tokens after each state of a passage of the cache.

    `prompts` has the prompt of each layer to read. The passage is `tokens` tokens of `sequence`
    from its token `first` on; states are put in at their own layer, or at `target_layer`. Raises
    `UsageError` for a passage without a token.
    """
    import torch

    start, length = int(cache.sequence_start[sequence]), int(cache.sequence_length[sequence])
    positions = np.arange(start + first, start + min(length, first + tokens))
    if not len(positions) or first < 0 or generated < 1:
        raise UsageError(
            f"sequence {sequence} has {length} tokens; there is nothing to read from token "
            f"{first} on"
        )
    names, state_tokens = TokenNames(cache), np.asarray(cache.tokens.take(positions), np.int64)
    head = cache.head.torch(model.device)
    layers = tuple(sorted(prompts))
    shape = (len(layers), len(positions), generated)
    found, probabilities = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    with torch.inference_mode():
        for row, layer in enumerate(layers):
            states = np.asarray(cache.residual_array(layer).take(positions), np.float32)
            runner = PromptRunner(model, prompts[layer])
            target = layer if target_layer is None else target_layer
            size = batch_rows(cache, 1, runner.prompt.length + generated)
            for begin in range(0, len(positions), size):
                part = slice(begin, begin + size)
                for step, logits, top in generate(
                    runner,
                    target,
                    torch.from_numpy(states[part]).to(model.device),
                    state_tokens[part],
                    generated,
                    head,
                ):
                    chosen = torch.from_numpy(top).to(logits.device)
                    p = logits.softmax(-1).gather(-1, chosen[:, None])[:, 0]
                    found[row, part, step] = top
                    probabilities[row, part, step] = p.float().cpu().numpy()
    return PassageCells(
        sequence=sequence,
        layers=layers,
        labels=tuple(names(int(token)) for token in state_tokens),
        tokens=found,
        probabilities=probabilities,
        texts=tuple(tuple(names.passage(cell) for cell in of_layer) for of_layer in found),
        token_labels=tuple(
            tuple(tuple(names(int(token)) for token in cell) for cell in of_layer)
            for of_layer in found
        ),
        prompt_names=tuple(prompts[layer].name for layer in layers),
    )


def passage_figure(cells: PassageCells) -> StudyFigure:
    """The heatmap of a passage: a cell for each layer and token."""
    values = cells.probabilities.mean(-1)
    hovers = [
        [
            f"layer {layer}, after {label!r}: {values[row, column]:.3f} on average\n"
            + "\n".join(
                f"{name} {probability:.3f}"
                for name, probability in zip(
                    cells.token_labels[row][column],
                    cells.probabilities[row, column].tolist(),
                    strict=True,
                )
            )
            for column, label in enumerate(cells.labels)
        ]
        for row, layer in enumerate(cells.layers)
    ]
    generated = cells.tokens.shape[-1]
    names = ", ".join(dict.fromkeys(repr(name) for name in cells.prompt_names))
    return StudyFigure(
        "passage",
        f"What the prompt {names} says of each state of sequence {cells.sequence}: its {generated} "
        "likeliest tokens, one after the other, beginning with the one after the input token. The "
        "colour is the mean of their probabilities.",
        [
            [
                HeatPanel(
                    title="States read by a prompt",
                    x_label="input token",
                    y_label="layer",
                    x_names=[f"{number} {label}" for number, label in enumerate(cells.labels)],
                    y_names=[str(layer) for layer in cells.layers],
                    values=[[float(value) for value in row] for row in values],
                    color_label="mean probability",
                    texts=[list(row) for row in cells.texts],
                    hovers=hovers,
                    color_range=(0.0, 1.0),
                )
            ]
        ],
    )

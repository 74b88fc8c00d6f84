"""Fits the embeddings of one prompt by AdamW on the KL to the model: `descend`.

The loss of a sample is KL(p || q) in nats: p is the model's distribution in the text at t+N, the
head on the cached layer L, q the one after the prompt with the state of t and the tokens t+1 to
t+N. A step reads one layer of the prompt and all its offsets, from one run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import UsageError
from .patched_prompt import PatchedPrompt
from .prompt_runner import PromptRunner
from .prompt_sample import PromptSample

if TYPE_CHECKING:
    import torch

    from ...cache.head.head import TorchHead
    from ...cache.resuming.resumable_model import ResumableModel
    from ..training.checkpoint import Checkpoint

SWEEP_RATES = (0.03, 0.1, 0.3, 1.0)
"""Learning rates of the sweep, in units of the root mean square of the first embeddings."""
SWEEP_STEPS = 20
"""Steps of each rate of a sweep."""
BETAS = (0.9, 0.999)
"""Decay of the moments of AdamW."""


@dataclass(frozen=True)
class DescentSettings:
    """How the embeddings of a prompt are fitted."""

    steps: int
    """Most steps."""
    batch: int
    """Samples of a step."""
    lr: float | None
    """Learning rate in units of the embeddings' root mean square; None takes the best of a sweep.
    """
    weight_decay: float
    seed: int
    patience: int
    """Measures of the validation KL without a better one that end the fit."""
    every: int = 25
    """Steps between two measures of the validation KL."""


@dataclass(eq=False)
class PromptTask:
    """What one prompt is fitted to: pairs of layer and offset, samples with targets, the model."""

    model: "ResumableModel"
    head: "TorchHead"
    prompt: PatchedPrompt
    """Its embeddings are where the fit begins."""
    layers: tuple[int, ...]
    offsets: tuple[int, ...]
    train: PromptSample
    validation: PromptSample
    settings: DescentSettings
    rows: dict[tuple[str, int], "torch.Tensor"] = field(default_factory=dict)
    """States by split and layer, targets by split and -1 - offset, as tensors on the device."""

    def tensor_of(
        self, sample: PromptSample, key: int, read: Callable[[], np.ndarray]
    ) -> "torch.Tensor":
        """A tensor of `read()` on the model's device, read once."""
        import torch

        name = (sample.split, key)
        if name not in self.rows:
            self.rows[name] = torch.from_numpy(read()).to(self.model.device)
        return self.rows[name]

    def states(self, sample: PromptSample, layer: int) -> "torch.Tensor":
        """States of `layer`, `(n, d_model)` float32."""
        return self.tensor_of(sample, layer, lambda: sample.states(layer))

    def last_states(self, sample: PromptSample, offset: int) -> "torch.Tensor":
        """Layer L at t+`offset`, `(n, d_model)` float32."""
        return self.tensor_of(sample, -1 - offset, lambda: sample.last_states(offset))

    def loss(
        self, embeddings: "torch.Tensor", sample: PromptSample, layer: int, rows: np.ndarray
    ) -> "torch.Tensor":
        """Mean KL over the samples `rows` and the offsets, in nats; with gradients."""
        import torch

        runner = PromptRunner(self.model, self.prompt, embeddings)
        tokens = self.prompt.tokens(sample.tokens[rows], sample.continuations[rows])
        index = torch.from_numpy(rows).to(self.model.device)
        states = self.states(sample, layer)[index]
        last = runner.read_with_gradient(layer, states, tokens)
        total = embeddings.new_zeros(())
        for offset in self.offsets:
            with torch.no_grad():
                log_p = self.head(self.last_states(sample, offset)[index]).log_softmax(-1)
            log_q = self.head(last[:, offset]).log_softmax(-1)
            p = log_p.exp()
            # 0 log 0 is 0: a probability that underflows has no part in the sum.
            total = total + torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).mean()
        return total / len(self.offsets)

    def validation_kl(self, embeddings: "torch.Tensor") -> float:
        """Mean KL over the validation sample, all layers and offsets, in nats."""
        import torch

        total, count = 0.0, self.validation.count
        with torch.no_grad():
            for layer in self.layers:
                for start in range(0, count, self.settings.batch * 4):
                    rows = np.arange(start, min(count, start + self.settings.batch * 4))
                    kl = self.loss(embeddings, self.validation, layer, rows)
                    total += float(kl) * len(rows)
        return total / (count * len(self.layers))


@dataclass(eq=False)
class DescentState:
    """The state of a descent, from which it goes on."""

    embeddings: "torch.Tensor"
    first_moment: "torch.Tensor"
    second_moment: "torch.Tensor"
    best: "torch.Tensor"
    """The embeddings of the least validation KL."""
    lr: float
    """In units of the first embeddings' root mean square."""
    step: int = 0
    best_kl: float = math.inf
    best_step: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    """Step and validation KL."""

    @classmethod
    def start(cls, embeddings: "torch.Tensor", lr: float) -> "DescentState":
        """The state before the first step."""
        import torch

        zeros = torch.zeros_like(embeddings)
        return cls(embeddings.clone(), zeros, zeros.clone(), embeddings.clone(), lr)

    def tensors(self) -> "dict[str, torch.Tensor]":
        """The tensors of the state, for a checkpoint."""
        names = ("embeddings", "first_moment", "second_moment", "best")
        return {name: getattr(self, name).detach().cpu() for name in names}

    def numbers(self) -> dict[str, Any]:
        """The numbers of the state, for a checkpoint."""
        names = ("lr", "step", "best_kl", "best_step", "history")
        return {name: getattr(self, name) for name in names}


def descend(
    task: PromptTask,
    checkpoint: "Checkpoint | None",
    report: Callable[[int], None],
) -> DescentState:
    """Fit the prompt of `task`; the result is the state at its end.

    With a `checkpoint`, the state is kept at each measure of the validation KL, and a fit that was
    killed goes on from there to the same embeddings. `report` is called with the steps done. The
    embeddings of the least validation KL count, those before the first step among them.
    """
    import torch

    settings, device = task.settings, task.model.device
    first = torch.from_numpy(np.ascontiguousarray(task.prompt.embeddings)).to(device)
    scale = float(first.square().mean().sqrt())
    state = _load(checkpoint, device)
    if state is None:
        state = _after_sweep(task, first, scale)
    while state.step < settings.steps and not _is_over(state, settings):
        _take_step(task, state, scale, settings.steps)
        if state.step % settings.every == 0 or state.step == settings.steps:
            _measure(task, state)
            if checkpoint is not None:
                checkpoint.save(state.numbers(), state.tensors())
        report(state.step)
    return state


def _after_sweep(task: PromptTask, first: "torch.Tensor", scale: float) -> DescentState:
    """The state with the learning rate to take: that of the least KL after a few steps each."""
    settings = task.settings
    if settings.lr is not None:
        state = DescentState.start(first, settings.lr)
        _measure(task, state)
        return state
    states = []
    for lr in SWEEP_RATES:
        state = DescentState.start(first, lr)
        for _ in range(min(SWEEP_STEPS, settings.steps)):
            _take_step(task, state, scale, settings.steps)
        kl = task.validation_kl(state.embeddings)
        states.append((kl if math.isfinite(kl) else math.inf, lr))
    state = DescentState.start(first, min(states)[1])
    _measure(task, state)
    return state


def _take_step(task: PromptTask, state: DescentState, scale: float, steps: int) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019), the rate falling along a cosine to 0."""
    import torch

    settings, train = task.settings, task.train
    rng = np.random.default_rng([settings.seed, state.step])
    size = min(settings.batch, train.count)
    rows = np.sort(rng.choice(train.count, size, replace=False))
    layer = task.layers[state.step % len(task.layers)]
    embeddings = state.embeddings.detach().requires_grad_(True)
    with torch.enable_grad():
        loss = task.loss(embeddings, train, layer, rows)
        (gradient,) = torch.autograd.grad(loss, [embeddings])
    state.step += 1
    lr = state.lr * scale * (1 + math.cos(math.pi * (state.step - 1) / steps)) / 2
    if not bool(gradient.isfinite().all()):
        return
    first, second = state.first_moment, state.second_moment
    first.lerp_(gradient, 1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    mean = first / (1 - BETAS[0] ** state.step)
    root = (second / (1 - BETAS[1] ** state.step)).sqrt_().add_(1e-8)
    with torch.no_grad():
        decayed = embeddings * (1 - lr * settings.weight_decay)
        state.embeddings = decayed.addcdiv_(mean, root, value=-lr)


def _measure(task: PromptTask, state: DescentState) -> None:
    """Measure the validation KL, and keep the embeddings if it is the least so far."""
    kl = task.validation_kl(state.embeddings)
    if not state.history and not math.isfinite(kl):
        raise UsageError(
            "the KL of the first embeddings is not finite: states of the cache or the model's "
            "logits overflow; fit on a cache of a wider dtype"
        )
    state.history.append((state.step, kl))
    if kl < state.best_kl:
        state.best_kl, state.best_step = kl, state.step
        state.best = state.embeddings.clone()


def _is_over(state: DescentState, settings: DescentSettings) -> bool:
    """Whether the last measures of the validation KL were none the better."""
    return state.step - state.best_step >= settings.patience * settings.every


def _load(checkpoint: "Checkpoint | None", device: Any) -> DescentState | None:
    """The state that a killed fit left, if there is one."""
    loaded = None if checkpoint is None else checkpoint.load()
    if loaded is None:
        return None
    numbers, tensors = loaded
    history = [(int(step), float(kl)) for step, kl in numbers["history"]]
    return DescentState(
        **{name: tensor.to(device) for name, tensor in tensors.items()},
        **{**numbers, "history": history},
    )


def group_pairs(
    layers: Sequence[int], offsets: Sequence[int], share: str
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Layers and offsets of each prompt: `none`, `offsets` or `all` pairs share one."""
    if share == "all":
        return [(tuple(layers), tuple(offsets))]
    if share == "offsets":
        return [((layer,), tuple(offsets)) for layer in layers]
    return [((layer,), (offset,)) for layer in layers for offset in offsets]

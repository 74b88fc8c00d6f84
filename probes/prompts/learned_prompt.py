"""`LearnedPrompt`: embeddings after which the model says what a cached state knows of later tokens.

`fit` takes a cache and its model. The texts are not read again: states and targets come from the
cache, and the model runs the prompt alone (`prompt_descent.py`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import MismatchError, NotFoundError, UsageError
from ...cache.files.json_fields import FieldError, integer_field, list_field, text_field
from ...cache.number_ranges import as_tuple, as_whole_number, format_ranges
from ...cache.progress import Auto, StageProgress, show_stages
from ...cache.store.activation_cache import ActivationCache
from ..base.fitted_probe import FittedProbe
from ..base.params import Params
from ..base.saved_tensors import SavedTensors
from ..saved.probe_methods import ProbeFiles
from ..saved.save import check_belongs
from ..training.checkpoint import Checkpoint, lock_folder
from .patched_prompt import MAX_TOKENS, PatchedPrompt
from .prompt_descent import DescentSettings, PromptTask, descend, group_pairs
from .prompt_runner import check_context, check_model_of
from .prompt_sample import PromptSample

if TYPE_CHECKING:
    from ...cache.resuming.resumable_model import ResumableModel

SHARES = ("none", "offsets", "all")
"""What shares one prompt: nothing, the offsets of a layer, all layers and offsets."""


class LearnedPrompt(FittedProbe, ProbeFiles, Params):
    """`tokens` trained embeddings; the state of a layer is put in at the last of them.

    The learned prompt of Future Lens (Pal et al., 2311.04897): the model reads the embeddings, then
    the tokens t+1 to t+N of the text, with the state of (layer, t) at the prompt's last position
    of the same layer, and is to say what it said in the text at t+N. The loss is KL(model || that)
    of final distributions. Embeddings replace layer 0, the output of the embedding; they begin as
    those of random tokens, which stay the ids that the model is given.

    There is a prompt for each (layer, offset), or one for those that `share` names: the `offsets`
    of a layer, or `all`. `steps` steps of AdamW with `batch` samples, the rate `lr` in units of the
    embeddings' root mean square (default: the best of a short sweep) falling along a cosine; a fit
    ends after `patience` measures of the validation KL without a better one, and the best
    embeddings count. The token t+1 is given: compare with shuffled states, and with a probe of
    state and next token (docs/interventions.md).
    """

    kind = "prompt"
    fitted_attribute = "embeddings_"

    embeddings_: dict[int, np.ndarray]
    """Number of a prompt -> its embeddings, `(tokens, d_model)` float32."""
    placeholders_: tuple[int, ...]
    """Token ids that the model is given at the prompt's positions."""
    model_: str
    """sha256 of the model's weights, as the cache names the model."""

    def __init__(
        self,
        layers: int | Sequence[int] | None = None,
        offsets: int | Sequence[int] = 1,
        tokens: int = 10,
        share: str = "none",
        steps: int = 400,
        batch: int = 32,
        lr: float | None = None,
        weight_decay: float = 1e-5,
        positions: int = 8192,
        validation_positions: int = 256,
        patience: int = 6,
        seed: int = 0,
        drop_first: int = 0,
    ) -> None:
        self.layers = layers
        self.offsets = offsets
        self.tokens = tokens
        self.share = share
        self.steps = steps
        self.batch = batch
        self.lr = lr
        self.weight_decay = weight_decay
        self.positions = positions
        self.validation_positions = validation_positions
        self.patience = patience
        self.seed = seed
        self.drop_first = drop_first

    def fit(
        self,
        X: ActivationCache,
        model: "ResumableModel | Any" = None,
        *,
        where: np.ndarray | None = None,
        checkpoint: str | Path | None = None,
        progress: StageProgress | Auto | None = "auto",
        device: str = "auto",
    ) -> "LearnedPrompt":
        """Fit the prompts on the train split of the cache `X`, with its `model`.

        `model` is the folder, hub id or loaded model (`residua.load_model`) of the cache; default
        the one it was extracted from. `where` is a bool mask over the positions t. With
        `checkpoint`, a folder, a killed fit that is started again goes on to the same embeddings.
        `progress` is called with ("prompt", steps done, steps).

        Raises `UsageError` for parameters and splits that do not fit, `MismatchError` for another
        model, `NotFoundError` for layers that the cache lacks.
        """
        if not isinstance(X, ActivationCache):
            raise UsageError("a prompt is fitted on a cache: it needs the model's states and texts")
        layers, offsets, settings = self._checked_params(X)
        samples = [
            PromptSample.draw(
                X,
                split,
                max(offsets),
                as_whole_number(most, "positions"),
                seed=settings.seed,
                where=where,
                drop_first=as_whole_number(self.drop_first, "drop_first"),
            )
            for split, most in (
                ("train", self.positions),
                ("validation", self.validation_positions),
            )
        ]
        resumable = model_of_cache(X, model, device)
        check_context(resumable, self.tokens + max(offsets))
        placeholders, first = first_embeddings(resumable, self.tokens, X.vocab, settings.seed)
        head = X.head.torch(resumable.device)
        groups = group_pairs(layers, offsets, self.share)
        folder = None if checkpoint is None else Path(checkpoint)
        found, rows = {}, []
        with lock_folder(folder), show_stages(progress) as show:
            checkpoints = []
            for number, (group_layers, group_offsets) in enumerate(groups):

                def report(steps: int, number: int = number) -> None:
                    if show is not None:
                        done = number * settings.steps + steps
                        show("prompt", done, len(groups) * settings.steps)

                task = PromptTask(
                    resumable,
                    head,
                    PatchedPrompt("learned", placeholders, first),
                    layers=group_layers,
                    offsets=group_offsets,
                    train=samples[0],
                    validation=samples[1],
                    settings=settings,
                )
                saved = None
                if folder is not None:
                    saved = self._checkpoint(X, folder, number, task, where)
                    checkpoints.append(saved)
                state = descend(task, saved, report)
                if saved is not None:
                    saved.save(state.numbers(), state.tensors())
                report(settings.steps)
                found[number] = state.best.cpu().numpy()
                rows += [
                    {
                        "layer": layer,
                        "offset": offset,
                        "prompt": number,
                        "steps": state.step,
                        "best_step": state.best_step,
                        "lr": state.lr,
                        "kl_before": state.history[0][1],
                        "kl": state.best_kl,
                        "n": samples[0].count,
                        "n_validation": samples[1].count,
                    }
                    for layer in group_layers
                    for offset in group_offsets
                ]
            for saved in checkpoints:
                saved.remove()
        self._forget_folder()
        self.embeddings_, self._rows = found, rows
        self.placeholders_ = placeholders
        self.model_ = X.manifest.model.weights
        self.cache_id_: str | None = X.id
        self.geometry_: str | None = X.head.digest
        self.split_: str | None = "train"
        self.n_features_in_: int = X.d_model
        return self

    def _checked_params(
        self, cache: ActivationCache
    ) -> tuple[tuple[int, ...], tuple[int, ...], DescentSettings]:
        """Layers, offsets and settings of the fit; raises `UsageError` for wrong ones."""
        last = cache.n_blocks
        cache.residual_array(last)
        layers = (
            tuple(layer for layer in cache.layers if layer < last)
            if self.layers is None
            else tuple(dict.fromkeys(as_tuple(self.layers, "layers")))
        )
        for layer in layers:
            cache.residual_array(layer)
        offsets = tuple(sorted(set(as_tuple(self.offsets, "offsets"))))
        if not layers or not offsets or min(offsets) < 0:
            raise UsageError("give at least one layer, and offsets of 0 or more")
        if last in layers and max(offsets) > 0:
            raise UsageError(
                f"layer {last} is the last one: no block is left that could carry its state to the "
                f"tokens behind the prompt; give layers below {last}"
            )
        if self.share not in SHARES:
            raise UsageError(f"share must be one of {', '.join(SHARES)}, not {self.share!r}")
        numbers = {
            name: as_whole_number(getattr(self, name), name)
            for name in ("tokens", "steps", "batch", "patience", "validation_positions")
        }
        for name, number in numbers.items():
            if number < 1:
                raise UsageError(f"{name} must be 1 or more, not {number}")
        if numbers["tokens"] > MAX_TOKENS:
            raise UsageError(f"tokens must be at most {MAX_TOKENS}, not {numbers['tokens']}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise UsageError(f"lr must be a number above 0, not {self.lr}")
        seed = as_whole_number(self.seed, "seed")
        if seed < 0:
            raise UsageError(f"seed must be 0 or more, not {seed}")
        settings = DescentSettings(
            steps=numbers["steps"],
            batch=numbers["batch"],
            lr=None if self.lr is None else float(self.lr),
            weight_decay=float(self.weight_decay),
            seed=seed,
            patience=numbers["patience"],
        )
        return layers, offsets, settings

    def _checkpoint(
        self,
        cache: ActivationCache,
        folder: Path,
        number: int,
        task: PromptTask,
        where: np.ndarray | None,
    ) -> Checkpoint:
        """The checkpoint of the prompt `number`, in a folder of its own."""
        mask = None if where is None else hashlib.sha256(np.packbits(where).tobytes()).hexdigest()
        identity = {
            "cache": cache.id,
            "layers": list(task.layers),
            "offsets": list(task.offsets),
            "tokens": self.tokens,
            "settings": asdict(task.settings),
            "positions": [task.train.count, task.validation.count],
            "drop_first": int(self.drop_first),
            "where": mask,
        }
        return Checkpoint(folder / f"prompt-{number}", identity)

    def pairs(self) -> list[tuple[int, int]]:
        """The fitted (layer, offset) pairs."""
        self.check_fitted()
        return [(row["layer"], row["offset"]) for row in self._rows]

    def prompt(self, layer: int, offset: int) -> PatchedPrompt:
        """The prompt that reads `layer` at `offset`; raises `NotFoundError` without one."""
        self.check_fitted()
        for row in self._rows:
            if (row["layer"], row["offset"]) == (layer, offset):
                embeddings = self.embeddings_[row["prompt"]]
                return PatchedPrompt("learned", self.placeholders_, embeddings)
        layers = format_ranges(sorted({layer for layer, _ in self.pairs()}))
        offsets = format_ranges(sorted({offset for _, offset in self.pairs()}))
        raise NotFoundError(
            f"no prompt was fitted for layer {layer}, offset {offset}; there are prompts for "
            f"layers {layers}, offsets {offsets}"
        )

    def check_model(self, cache: ActivationCache) -> None:
        """Raise `MismatchError` unless `cache` is of the model that the prompts were fitted on."""
        self.check_fitted()
        check_belongs(self, cache)
        if cache.manifest.model.weights != self.model_:
            raise MismatchError(
                f"the prompts were fitted on a model with weights {self.model_[:12]}, this cache "
                f"is of weights {cache.manifest.model.weights[:12]}; a prompt says something to "
                "its own model alone: fit prompts on this cache"
            )

    def metrics(self) -> list[dict[str, Any]]:
        """One row per (layer, offset): KL on the validation split before and after the fit, nats.

        `prompt` is the number of the prompt, `lr` its rate in units of the embeddings' root mean
        square; the KL is over all pairs that share the prompt.
        """
        self.check_fitted()
        return [dict(row) for row in self._rows]

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A JSON object and tensors for `save_probe`; `restore` is the inverse."""
        self.check_fitted()
        config = {
            **self._origin(),
            "model": self.model_,
            "placeholders": list(self.placeholders_),
            "pairs": self.metrics(),
        }
        return config, {f"prompt.{number}": rows for number, rows in self.embeddings_.items()}

    @classmethod
    def restore(
        cls, params: dict[str, Any], config: dict[str, Any], tensors: Mapping[str, np.ndarray]
    ) -> "LearnedPrompt":
        """The fitted prompts that `state` described."""
        probe, tensors = cls(**params), SavedTensors.of(tensors)
        placeholders = list_field(config, "placeholders")
        if not 1 <= len(placeholders) <= MAX_TOKENS or not all(
            type(token) is int and 0 <= token < 1 << 31 for token in placeholders
        ):
            raise FieldError("the placeholders are no token ids")
        probe.placeholders_ = tuple(placeholders)
        probe._rows = [dict(row) for row in config["pairs"]]
        numbers = sorted({integer_field(row, "prompt", 0, 1 << 20) for row in probe._rows})
        shape = (len(placeholders), config["d_model"])
        probe.embeddings_ = {
            number: tensors.array(f"prompt.{number}", shape).astype(np.float32, copy=False)
            for number in numbers
        }
        probe.model_ = text_field(config, "model")
        probe._restore_origin(config)
        return probe


def first_embeddings(
    model: "ResumableModel", tokens: int, vocab: int, seed: int
) -> tuple[tuple[int, ...], np.ndarray]:
    """Random token ids and their layer 0 in the model, `(tokens, d_model)` float32."""
    import torch

    rng = np.random.default_rng(seed)
    ids = rng.integers(0, min(vocab, model.vocab_read), tokens)
    with torch.no_grad():
        rows = model.run_residual(0, ids)
    return tuple(ids.tolist()), rows.float().cpu().numpy()


def model_of_cache(
    cache: ActivationCache, model: Any, device: str, trust_remote_code: bool = False
) -> "ResumableModel":
    """The model of `cache`, checked against it: `model`, its folder, or the one it remembers.

    A `ResumableModel` stays where it is, and is compared by its shape alone.
    """
    from ...cache.devices import choose_device
    from ...cache.extraction.model_reload import load_model_of
    from ...cache.resuming.resumable_model import ResumableModel

    if not isinstance(model, ResumableModel):
        blocks = load_model_of(cache, model, str(choose_device(device)), trust_remote_code)
        model = ResumableModel(blocks)
    check_model_of(cache, model)
    return model

"""Vocabulary probe: softmax regression from a layer's residual stream to the token N further on.

`VocabProbe.fit` describes the data and parameters as a `VocabFit` (`fit_job.py`), and
`fit_groups.py` fits its (layer, offset) pairs; this file keeps, applies and saves the parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ...cache.devices import choose_device
from ...cache.errors import UsageError
from ...cache.files.json_fields import FieldError, integer_field
from ...cache.files.json_files import plain_value
from ...cache.format.manifest import MAX_VOCAB
from ...cache.number_ranges import as_tuple
from ...cache.progress import Auto, Progress, show_stage
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import crossing_shares
from ..base.arguments import (
    LABELS,
    as_array,
    check_dask,
    check_labels,
    distinct_labels,
    is_dask,
    validated,
    warn_unvalidated,
)
from ..base.estimator import BaseEstimator, ClassifierMixin
from ..base.fitted_maps import FittedMaps
from ..base.readout import LayerOffset, ReadoutBatch
from ..base.resources import default_memory
from ..base.saved_tensors import SavedTensors
from ..saved.config_file import array_of
from ..saved.probe_methods import ProbeFiles
from ..saved.save import feature_names, saved_params, set_feature_names
from ..training.softmax_loss import PRODUCTS, ParameterTensors, row_tiles
from ..training.threads import ThreadCrew
from ..training.top_tokens import find_top_tokens
from .descent import CHECKPOINT_SECONDS, Outcome, Trainer, advance
from .examples import LOSSES, cache_examples
from .fit_groups import CheckpointFolder, fit_vocab_groups
from .fit_job import ArrayVocabFit, CacheVocabFit, VocabFit, layers_and_offsets, scope_of
from .parametrizations import PARAMETRIZATIONS, THROUGH_HEAD, apply_parametrization

PARTIAL_STEPS = 300
"""Steps of `partial_fit` that divide its first learning rate by sqrt 2."""


@dataclass(frozen=True)
class FittedVocabPair:
    """Parameters and losses of one fitted (layer, offset)."""

    parameters: ParameterTensors
    """`weight`, `bias` (and `down`), applied to unscaled residual streams."""
    row: dict[str, Any]
    """Row of `metrics`."""
    history: list[dict[str, float | None]]
    """Step, mean training loss since the row before, held-out loss; nats."""


class VocabProbe(  # pyright: ignore[reportIncompatibleVariableOverride] (HTML of its own)
    FittedMaps[LayerOffset], ProbeFiles, ClassifierMixin, BaseEstimator
):
    """Predicts the token that follows t+N from residual_l[t], for every layer and offset at once.

    Softmax regression, the vocabulary probe of Future Lens (Pal et al., 2311.04897); `offsets` are
    the N, one or several. `loss` is `model` (cross-entropy to the model's own top token), `text`
    (to the text's token at t+N+1) or `kl` (KL to the model's distribution). The matrix is `(vocab,
    d_model)`, of rank `rank` if given, or with `form="head"` a `(d_model, d_model)` map in front
    of the frozen head. `form="auto"` is the full matrix, or above 100 million weights the largest
    rank within (`default_rank`; 704 for d_model 4,096 and a vocabulary of 128,256), which `metrics`
    name; `form="full"` is full whatever its size. Without `lr` a short sweep chooses.

    The fit takes at most `epochs` passes over the train split in batches of `batch` positions; a
    (layer, offset) stops when its loss on the validation split no longer falls. Pairs (t, t+N) stay
    inside one document unless `across_documents`; the `drop_first` first positions of each sequence
    are not fitted. Gradients are computed from factors in bfloat16 (`products`) where the processor
    has such products; losses never are. Rows of arrays have labels `y` `(n,)` instead; a share
    `validation` of 100 rows or more is held out.
    """

    kind = "vocab"
    fitted_attribute = "fitted_"
    not_pickled: ClassVar[tuple[str, ...]] = ("_trainers",)
    forms: ClassVar[tuple[str, ...]] = PARAMETRIZATIONS
    """Values of `form`."""
    _chosen_rank: int | None = None
    """Rank that `form="auto"` chose, None for a full matrix or a given rank."""

    def __init__(
        self,
        offsets: int | Sequence[int] = 0,
        layers: Sequence[int] | None = None,
        loss: str = "model",
        form: str = "auto",
        rank: int | None = None,
        lr: float | None = None,
        epochs: int = 3,
        batch: int = 1024,
        validation: float = 0.1,
        products: str = "auto",
        seed: int = 0,
        across_documents: bool = False,
        drop_first: int = 0,
    ) -> None:
        self.offsets = offsets
        self.layers = layers
        self.loss = loss
        self.form = form
        self.rank = rank
        self.lr = lr
        self.epochs = epochs
        self.batch = batch
        self.validation = validation
        self.products = products
        self.seed = seed
        self.across_documents = across_documents
        self.drop_first = drop_first

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        client: Any = None,
        memory: int | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        progress: Progress | Auto | None = "auto",
        device: str | torch.device = "auto",
    ) -> "VocabProbe":
        """Fit the train split of a cache, or rows `X` `(n, d)` (numpy, dask) with labels `y`.

        Pairs (layer, offset) with weights that do not fit `memory` bytes together take several
        passes. The workers of `client` (of `dask.distributed`) share the pairs of a cache, which
        they see under the same path; each of their threads fits a group, and `memory` bounds each
        worker. Neither changes a bit of the result.

        With a folder `checkpoint`, which workers must see too, the state is saved every
        `checkpoint_seconds`. A killed fit that is started again continues to the same result; the
        checkpoint is removed at the end. `progress` is "auto" (bars in a terminal or notebook,
        elsewhere lines of the logger `residua`), None (nothing), or a function that is called with
        (positions done, positions in all).

        Parameters, AdamW's state and minibatches are on `device`: `auto` is the first GPU, or the
        CPU (with a `client`: the workers' CPUs). `memory` bounds the weights there, too. Results
        and checkpoints are on the CPU: a fit may go on on another device. Devices round
        differently, so that their results differ as those of two seeds do, or less.
        """
        on_workers = client is not None
        job = self._vocab_fit(X, y, device="cpu" if on_workers else device)
        rate = job.form.rate if self.lr is None else float(self.lr)
        folder = None
        if checkpoint is not None:
            identity = {**job.identity, "kind": self.kind, "params": saved_params(self)}
            folder = CheckpointFolder(Path(checkpoint).absolute(), identity, checkpoint_seconds)
        memory = memory or default_memory()
        self._clear(job)
        with show_stage(progress, "vocab") as report:
            plan, outcomes = fit_vocab_groups(
                job,
                rate,
                sweep=self.lr is None,
                memory=memory,
                client=client,
                checkpoints=folder,
                progress=report,
                worker_device="cpu" if device == "auto" else str(device),
            )
        self.sweep_ = plan.rows
        for pair, outcome in outcomes.items():
            self._set_fit(pair, outcome, plan.rates[pair], plan.positions)
        unvalidated = [p for p, fitted in self.fitted_.items() if fitted.row["validation"] is None]
        if unvalidated and isinstance(X, ActivationCache):
            warn_unvalidated(unvalidated, "they end with their last step")
        return self

    def partial_fit(
        self, X: Any, y: Any = None, classes: Any = None, *, device: str | torch.device = "auto"
    ) -> "VocabProbe":
        """One more pass: over the train split of a cache, or over rows `X` with labels `y`.

        The first call on rows needs all `classes`. The learning rate is `lr` (default: that of the
        form) over sqrt(1 + steps / 300); nothing is held out and no sweep is run. `device` as in
        `fit`; it may change between calls.
        """
        is_first = not hasattr(self, "fitted_")
        if is_first and classes is None and not isinstance(X, ActivationCache):
            raise UsageError("the first partial_fit on rows needs all classes: classes=[...]")
        agreed = self._agreed_classes(classes)
        job = self._vocab_fit(X, y, agreed, partial=not is_first, device=device)
        if is_first:
            self._clear(job)
        first_rate = job.form.rate if self.lr is None else float(self.lr)
        descent = job.descent(job.pairs)
        # A loaded or unpickled probe has parameters, but no optimisers: these start anew.
        if not self._trainers:
            fitted = {pair: fitted.parameters for pair, fitted in self.fitted_.items()}
            self._trainers = {p: descent.new_trainer(p, fitted.get(p)) for p in descent.pairs}
        for pair, trainer in self._trainers.items():
            if trainer.device != job.device:
                self._trainers[pair] = trainer.on_device(job.form, job.device)
        with ThreadCrew.of(len(self._trainers), job.device) as crew:
            for step in descent.examples.epoch(self.passes_):
                rate = first_rate / (1 + self.steps_ / PARTIAL_STEPS) ** 0.5
                advance(crew, self._trainers, step, lambda key, rate=rate: rate)
                self.steps_ += 1
        self.passes_ += 1
        for pair, trainer in self._trainers.items():
            trainer.record_losses(self.steps_, None)
            self._set_fit(pair, trainer.outcome(), first_rate, descent.examples.rows)
        return self

    def _agreed_classes(self, classes: Any) -> np.ndarray | None:
        """The classes of this and earlier calls of `partial_fit`; they must be the same."""
        if classes is None:
            return getattr(self, "classes_", None)
        distinct = np.unique(classes)
        if hasattr(self, "classes_") and not np.array_equal(distinct, self.classes_):
            raise UsageError(f"classes were {self.classes_.tolist()}, are {distinct.tolist()}")
        return distinct

    def _vocab_fit(
        self,
        X: Any,
        y: Any,
        classes: np.ndarray | None = None,
        partial: bool = False,
        *,
        device: str | torch.device = "auto",
    ) -> VocabFit:
        """Data, pairs, parameters and device of a fit; `UsageError` if any cannot be right."""
        self._check_params()
        chosen = choose_device(device)
        # Numbers of numpy as Python's: they come back in checkpoints and metrics.
        options = self._fit_options()
        offsets = as_tuple(self.offsets, "offsets")
        if isinstance(X, ActivationCache):
            layers = X.layers if self.layers is None else as_tuple(self.layers, "layers")
            if not layers:
                raise UsageError("name at least one layer; this cache or the probe names none")
            for layer in layers:
                X.residual_array(layer)
            pairs = [(layer, offset) for layer in layers for offset in offsets]
            return CacheVocabFit.of(X, pairs, options, chosen)
        if self.loss == "kl":
            raise UsageError("loss='kl' needs a cache: labelled rows have no model's distribution")
        X, y = as_array(X, "X"), as_array(y, "y", kinds=LABELS)
        if is_dask(X):
            X, y = check_dask(X, y)
            if partial and X.shape[1] != self.n_features_in_:
                raise UsageError(f"expected rows of width {self.n_features_in_}, got {X.shape[1]}")
        else:
            from sklearn.utils.multiclass import check_classification_targets

            X, y = validated(self, X, y, dtype=[np.float32, np.float64], reset=not partial)
            # Labels that cannot be kept are named before scikit-learn calls them unknown.
            check_labels(np.unique(y) if y.dtype.kind != "O" else y)
            check_classification_targets(y)
        classes = check_labels(distinct_labels(y) if classes is None else classes)
        pair = (as_tuple(self.layers)[0] if self.layers is not None else 0, offsets[0])
        identity = {"rows": len(y), "classes": len(classes), "width": X.shape[1]}
        return ArrayVocabFit(
            [pair], classes, X.shape[1], options, identity, device=chosen, X=X, y=y
        )

    def _fit_options(self) -> dict[str, Any]:
        """All parameters of a fit: those of the constructor."""
        return plain_value(self.get_params())

    def _check_params(self) -> None:
        """Raise `UsageError` for a parameter that cannot be right."""
        choices = {"loss": LOSSES, "form": self.forms, "products": PRODUCTS}
        for name, values in choices.items():
            value = getattr(self, name)
            if value not in values:
                raise UsageError(f"{name} must be one of {', '.join(values)}, not {value!r}")
        if self.form == "head" and self.rank is not None:
            raise UsageError("rank is for a matrix; a map in front of the head has none")
        for name in ("epochs", "batch", "rank", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} must be more than 0 and finite, not {value}")
        if not 0 <= self.validation < 1:
            raise UsageError(f"validation must be a share from 0 to 1, not {self.validation}")
        offsets = as_tuple(self.offsets, "offsets")
        if not offsets or min(offsets) < 0:
            raise UsageError(f"name at least one offset; offsets are 0 or more, not {self.offsets}")

    def _clear(self, job: VocabFit) -> None:
        """Forget the fit before, and note the data of `job`."""
        self._forget_folder()
        self.fitted_: dict[LayerOffset, FittedVocabPair] = {}
        self.sweep_: list[dict[str, float | None]] = []
        self.classes_: np.ndarray = job.classes
        self.n_features_in_: int = job.d_in
        cache = job.cache if isinstance(job, CacheVocabFit) else None
        # Predictions run on the CPU.
        self.head_ = None if cache is None or job.head is None else cache.head.torch()
        self.cache_id_: str | None = None if cache is None else cache.id
        self.geometry_: str | None = None if cache is None else cache.head.digest
        self.split_ = None if cache is None else "train"
        self.steps_: int = 0
        self.passes_: int = 0
        self._crossing: dict[int, float] | None = None
        if cache is not None:
            offsets, train = layers_and_offsets(job.pairs)[1], cache.sequences("train")
            self._crossing = crossing_shares(cache, train, offsets, scope_of(job.options))
        self._trainers: dict[Any, Trainer] = {}
        self._chosen_rank = job.rank if job.options["rank"] is None else None

    def _set_fit(self, pair: LayerOffset, outcome: Outcome, lr: float, rows: int) -> None:
        """Enter a fit of `rows` positions; raises `UsageError` if the fit diverged."""
        last = outcome.last
        is_finite = all(bool(tensor.isfinite().all()) for tensor in outcome.parameters.values())
        if not is_finite or last.get("validation", 0.0) is None:
            raise UsageError(
                f"layer {pair[0]}, offset {pair[1]}: the fit diverged at learning rate {lr:.3g}, "
                "its loss is not finite; give a smaller lr"
            )
        self.fitted_[pair] = FittedVocabPair(
            outcome.parameters,
            {
                "layer": pair[0],
                "offset": pair[1],
                "loss": self.loss,
                "lr": lr,
                "steps": last["step"],
                "train": last["train"],
                "validation": last.get("validation"),
                "n": rows,
                **({} if self._chosen_rank is None else {"rank": self._chosen_rank}),
                **({} if self._crossing is None else {"crossing": self._crossing[pair[1]]}),
            },
            outcome.history,
        )

    def metrics(self) -> list[dict[str, Any]]:
        """One row per (layer, offset): learning rate, steps taken, losses in nats, positions.

        Of a cache also `crossing`, the share of the pairs of its sequences that join two documents
        (left out unless `across_documents`), and `rank` where `form="auto"` did not take the full
        matrix.
        """
        self.check_fitted()
        return [dict(fitted.row) for fitted in self.fitted_.values()]

    def map(self, layer: int | None = None, offset: int | None = None) -> ParameterTensors:
        """`weight`, `bias` (and `down`, `(rank, d)`) of a (layer, offset), float32 tensors."""
        key = self._find_key(layer, offset)
        return self.fitted_[key].parameters

    def predict_log_proba(self, X: Any, layer: int | None = None, offset: int | None = None) -> Any:
        """Log-probabilities of `classes_` for rows `(n, d)`, `(n, classes)`; dask stays lazy."""
        return self._predict(X, (layer, offset), lambda logits: logits.log_softmax(-1).numpy())

    def predict_proba(self, X: Any, layer: int | None = None, offset: int | None = None) -> Any:
        """Probabilities of `classes_` for rows `(n, d)`, `(n, classes)`; dask stays lazy."""
        return self._predict(X, (layer, offset), lambda logits: logits.softmax(-1).numpy())

    def predict(self, X: Any, layer: int | None = None, offset: int | None = None) -> Any:
        """The most probable of `classes_` for rows `(n, d)`, `(n,)`; dask stays lazy."""
        return self._predict(X, (layer, offset), self._top_classes, per_class=False)

    def _top_classes(self, logits: torch.Tensor) -> np.ndarray:
        return self.classes_[logits.numpy().argmax(-1)]

    def _predict(
        self,
        X: Any,
        pair: tuple[int | None, int | None],
        read: Callable[[torch.Tensor], np.ndarray],
        *,
        per_class: bool = True,
    ) -> Any:
        """`read` of the logits of rows `(n, d)`: `(n, classes)` if `per_class`, else `(n,)`."""
        parameters, classes = self.map(*pair), len(self.classes_)
        if self.form in THROUGH_HEAD and self.head_ is None:
            raise UsageError("a saved map needs its head: set probe.head_ = cache.head.torch()")

        def predict_block(rows: np.ndarray) -> np.ndarray:
            predictions = []
            for tile in row_tiles(len(rows), classes):
                states = torch.from_numpy(np.ascontiguousarray(rows[tile], np.float32))
                mapped = apply_parametrization(parameters, states)
                logits = mapped if self.head_ is None else self.head_(mapped)
                # A NaN would be taken for the largest logit.
                if not bool(logits.amax(-1).isfinite().all()):
                    raise UsageError("the rows X, or their logits, hold values that are not finite")
                predictions.append(read(logits))
            return np.concatenate(predictions) if predictions else read(torch.empty(0, classes))

        X = as_array(X, "X", known_length=False)
        if is_dask(X):
            self._check_width(X)
            dtype = np.dtype(np.float32) if per_class else self.classes_.dtype
            return X.rechunk({1: -1}).map_blocks(
                predict_block,
                dtype=dtype,
                chunks=(X.chunks[0], (classes,)) if per_class else (X.chunks[0],),
                drop_axis=[] if per_class else [1],
                meta=np.empty((0, 0) if per_class else 0, dtype),
            )
        rows: Any = validated(self, X, dtype=[np.float32, np.float64], reset=False)
        return predict_block(rows)

    def _check_width(self, X: Any) -> None:
        if X.ndim != 2 or X.shape[1] != self.n_features_in_:
            raise UsageError(f"expected rows (n, {self.n_features_in_}), found shape {X.shape}")

    def score(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        layer: int | None = None,
        offset: int | None = None,
        split: str = "validation",
    ) -> float:
        """Share of right predictions on rows `X` with labels `y`, or on the `split` of a cache.

        On a cache, the right token is the text's for `loss="text"`, else the model's top token.
        """
        pair = self._find_key(layer, offset)
        if not isinstance(X, ActivationCache):
            from sklearn.metrics import accuracy_score

            if y is None:
                raise UsageError("score of rows X needs their labels: score(X, y)")
            y = as_array(y, "y", known_length=False, kinds=LABELS)
            predicted = np.asarray(self.predict(X, *pair))
            return accuracy_score(np.asarray(y), predicted, sample_weight=sample_weight)
        if self.form in THROUGH_HEAD and self.head_ is None:
            self.head_ = X.head.torch()
        top_tokens = np.zeros(0, np.int32)
        if self.loss != "text":
            top_tokens = find_top_tokens(X, X.sequences(split))
        examples = cache_examples(
            X,
            pair[:1],
            pair[1:],
            "text" if self.loss == "text" else "model",
            lambda: top_tokens,
            split=split,
            batch=self.batch,
            shuffle=False,
            across_documents=self.across_documents,
            drop_first=self.drop_first,
        )
        right = total = 0
        for step in examples.epoch():
            rows, target = step.target(pair[1])
            if not len(target):
                continue
            states = step.hidden[pair[0]] if rows is None else step.hidden[pair[0]][rows]
            assert target.token is not None
            right += int((self.predict(states.numpy(), *pair) == target.token.numpy()).sum())
            total += len(target)
        if not total:
            raise UsageError(f"split {split!r} has no pair at offset {pair[1]}")
        return right / total

    def logits(self, batch: ReadoutBatch, layer: int | None, offset: int) -> torch.Tensor:
        """Logits `(n, vocab)` for the token after t+N; float32."""
        if batch.hidden is None:
            raise UsageError("the vocabulary probe reads a layer; this batch has none")
        mapped = apply_parametrization(self.map(layer, offset), batch.hidden)
        return batch.head(mapped) if self.form in THROUGH_HEAD else mapped

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A JSON object and tensors for `save_probe`; `restore` is the inverse."""
        self.check_fitted()
        config = {
            **self._origin(),
            "vocab": len(self.classes_),
            "classes": None if self.cache_id_ is not None else self.classes_.tolist(),
            "classes_dtype": self.classes_.dtype.str,
            "sweep": self.sweep_,
            "steps": self.steps_,
            "passes": self.passes_,
            "feature_names": feature_names(self),
            "pairs": [{**fit.row, "history": fit.history} for fit in self.fitted_.values()],
        }
        tensors = {
            f"{layer}.{offset}.{name}": tensor.numpy()
            for (layer, offset), fitted in self.fitted_.items()
            for name, tensor in fitted.parameters.items()
        }
        return config, tensors

    @classmethod
    def restore(
        cls, params: dict[str, Any], config: dict[str, Any], tensors: Mapping[str, np.ndarray]
    ) -> "VocabProbe":
        """The fitted probe that `state` described; old files lack some keys of `config`."""
        tensors = SavedTensors.of(tensors)
        probe, width = cls(**params), config["d_model"]
        labels = config["classes"]
        dtype = config.get("classes_dtype")  # the first version did not write it
        vocab = integer_field(config, "vocab", 1, MAX_VOCAB)
        classes = np.arange(vocab) if labels is None else array_of(labels, dtype, "classes")
        if classes.shape != (vocab,):
            raise FieldError(f"classes have shape {classes.shape}; expected {(vocab,)}")
        probe._clear(VocabFit([], classes, width, probe._fit_options()))
        probe._restore_origin(config)
        probe.sweep_ = config["sweep"]
        probe.steps_, probe.passes_ = config.get("steps", 0), config.get("passes", 0)
        set_feature_names(probe, config.get("feature_names"))
        for row in config["pairs"]:
            pair = integer_field(row, "layer"), row["offset"]
            prefix = f"{pair[0]}.{pair[1]}."
            # The names and shapes of `parametrizations.py`.
            rank = width
            parameters = {}
            if f"{prefix}down" in tensors:
                down = tensors.array(f"{prefix}down", (None, width))
                parameters["down"], rank = torch.tensor(down), len(down)
            n_outputs = None if probe.form in THROUGH_HEAD else vocab
            weight = tensors.array(f"{prefix}weight", (n_outputs, rank))
            bias = tensors.array(f"{prefix}bias", weight.shape[:1])
            parameters |= {"weight": torch.tensor(weight), "bias": torch.tensor(bias)}
            if probe.form == "mlp":
                inner = tensors.array(f"{prefix}inner", (None, width))
                outer = tensors.array(f"{prefix}outer", (len(weight), len(inner)))
                inner_bias = tensors.array(f"{prefix}inner_bias", (len(inner),))
                arrays = {"inner": inner, "inner_bias": inner_bias, "outer": outer}
                parameters |= {name: torch.tensor(array) for name, array in arrays.items()}
            metrics = {name: value for name, value in row.items() if name != "history"}
            if "crossing" in row:
                probe._crossing = {**(probe._crossing or {}), pair[1]: row["crossing"]}
            probe.fitted_[pair] = FittedVocabPair(parameters, metrics, row["history"])
        return probe

"""Vocabulary probe: softmax regression from a layer's residual stream to the token N further on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...cache.errors import NotFoundError, UsageError
from ...cache.files.json_files import plain_value as plain_json
from ...cache.number_ranges import as_tuple
from ...cache.progress import Progress
from ...cache.store.activation_cache import ActivationCache
from ...cache.tokens.segments import crossing_shares
from ..base.arguments import (
    LABELS,
    as_array,
    check_dask,
    check_distinct,
    check_labels,
    is_dask,
    validated,
    warn_unvalidated,
)
from ..base.estimator import BaseEstimator, ClassifierMixin, check_is_fitted
from ..base.readout import LayerOffset, ReadoutBatch
from ..base.resources import default_memory
from ..saved.save import feature_names, plain_params, set_feature_names
from ..training.softmax_loss import PRODUCTS, ParameterTensors, row_tiles
from ..training.threads import ThreadCrew
from ..training.top_tokens import find_top_tokens
from .descent import CHECKPOINT_SECONDS, Outcome, Trainer, advance
from .examples import LOSSES, cache_examples
from .fit_groups import CheckpointFolder, fit_vocab_groups
from .fit_job import ArrayVocabFit, CacheVocabFit, VocabFit, layers_and_offsets, scope_of
from .parametrizations import PARAMETRIZATIONS, apply_parametrization

PARTIAL_STEPS = 300
"""Steps of `partial_fit` after which its learning rate is the first one over sqrt 2."""


@dataclass(frozen=True)
class FittedVocabPair:
    """What is known of one fitted (layer, offset)."""

    parameters: ParameterTensors
    """A map of raw states."""
    row: dict[str, Any]
    """Its line of `metrics`."""
    history: list[dict[str, float | None]]
    """Step, training loss since the line before, held-out loss; nats."""


class VocabProbe(ClassifierMixin, BaseEstimator):
    """Predicts the token that follows t+N from residual_l[t], for every layer and offset at once.

    Softmax regression, the vocabulary probe of Future Lens (Pal et al., 2311.04897). `loss` is
    `model` (cross-entropy to the model's own top token), `text` (to the text's token at t+N+1) or
    `kl` (KL to the model's distribution). The matrix is `(vocab, d_model)`, of rank `rank` if
    given, or with `form="head"` a `(d_model, d_model)` map in front of the frozen head. Without
    `lr` a short sweep chooses.
    At most `epochs` passes over the train split in batches of `batch` positions; a (layer, offset)
    stops when its loss on the validation split no longer falls. Pairs (t, t+N) stay inside one
    document unless `across_documents`; the `drop_first` first positions of each sequence are not
    fitted. Gradients are computed from factors
    in bfloat16 (`products`) where the processor has such products; losses never are. Rows of arrays
    have labels `y` `(n,)` instead; a share `validation` of 100 rows or more is held out.
    """

    kind = "vocab"

    def __init__(
        self,
        offset: int | Sequence[int] = 0,
        layers: Sequence[int] | None = None,
        loss: str = "model",
        form: str = "full",
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
        self.offset = offset
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
        progress: Progress | None = None,
    ) -> "VocabProbe":
        """Fit the train split of a cache, or rows `X` `(n, d)` (numpy, dask) with labels `y`.

        Pairs whose weights do not fit `memory` bytes together take one pass after the other. The
        workers of `client` (of `dask.distributed`) share the pairs of a cache, which they see under
        the same path; each thread of theirs fits a group, and `memory` bounds each worker. Neither
        changes a bit of the result. With a folder `checkpoint`, which workers must see too, the
        state is kept there every `checkpoint_seconds`, and a killed fit that is started again goes
        on from it to the same result; it is removed at the end.
        """
        job = self._job(X, y)
        rate = job.form.rate if self.lr is None else float(self.lr)
        kept = None
        if checkpoint is not None:
            identity = {
                **job.identity,
                "kind": self.kind,
                "params": plain_params(self.get_params()),
            }
            kept = CheckpointFolder(Path(checkpoint).absolute(), identity, checkpoint_seconds)
        memory = memory or default_memory()
        self._clear(job)
        plan, found = fit_vocab_groups(
            job,
            rate,
            sweep=self.lr is None,
            memory=memory,
            client=client,
            checkpoints=kept,
            progress=progress,
        )
        self.sweep_ = plan.rows
        for pair, outcome in found.items():
            self._keep(pair, outcome, plan.rates[pair], plan.positions)
        unvalidated = [p for p, fitted in self.fitted_.items() if fitted.row["validation"] is None]
        if unvalidated and isinstance(X, ActivationCache):
            warn_unvalidated(unvalidated, "they end with their last step")
        return self

    def partial_fit(self, X: Any, y: Any = None, classes: Any = None) -> "VocabProbe":
        """One more pass: over the train split of a cache, or over rows `X` with labels `y`.

        The first call on rows needs all `classes`. The learning rate is `lr` (default: that of the
        form) over sqrt(1 + steps / 300); nothing is held out and there is no sweep.
        """
        first = not hasattr(self, "fitted_")
        if first and classes is None and not isinstance(X, ActivationCache):
            raise UsageError("the first partial_fit on rows needs all classes: classes=[...]")
        job = self._job(X, y, self._known_classes(classes), partial=not first)
        if first:
            self._clear(job)
        rate = job.form.rate if self.lr is None else float(self.lr)
        descent = job.descent(job.pairs)
        if not self._trainers:
            known = {pair: fitted.parameters for pair, fitted in self.fitted_.items()}
            self._trainers = {p: descent.new_trainer(p, known.get(p)) for p in descent.pairs}
        with ThreadCrew.of(len(self._trainers)) as crew:
            for step in descent.examples.epoch(self.passes_):
                now = rate / (1 + self.steps_ / PARTIAL_STEPS) ** 0.5
                advance(crew, self._trainers, step, lambda key, now=now: now)
                self.steps_ += 1
        self.passes_ += 1
        for pair, trainer in self._trainers.items():
            trainer.record_losses(self.steps_, None)
            self._keep(pair, trainer.outcome(), rate, descent.examples.rows)
        return self

    def _known_classes(self, classes: Any) -> np.ndarray | None:
        if classes is None:
            return getattr(self, "classes_", None)
        found = np.unique(classes)
        if hasattr(self, "classes_") and not np.array_equal(found, self.classes_):
            raise UsageError(f"classes were {self.classes_.tolist()}, are {found.tolist()}")
        return found

    def _job(
        self, X: Any, y: Any, classes: np.ndarray | None = None, partial: bool = False
    ) -> VocabFit:
        """What is to be fitted; raises `UsageError` for parameters that cannot be right."""
        self._check()
        # Numbers of numpy as Python's: they come back in checkpoints and metrics.
        options = plain_json(self.get_params())
        offsets = as_tuple(self.offset, "offset")
        if isinstance(X, ActivationCache):
            layers = X.layers if self.layers is None else as_tuple(self.layers, "layers")
            for layer in layers:
                X.residual_array(layer)
            return CacheVocabFit.of(X, [(la, n) for la in layers for n in offsets], options)
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
        classes = check_labels(check_distinct(y) if classes is None else classes)
        pair = (as_tuple(self.layers)[0] if self.layers is not None else 0, offsets[0])
        identity = {"rows": len(y), "classes": len(classes), "width": X.shape[1]}
        return ArrayVocabFit([pair], classes, X.shape[1], options, identity, X=X, y=y)

    def _check(self) -> None:
        known = {"loss": LOSSES, "form": PARAMETRIZATIONS, "products": PRODUCTS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                found = getattr(self, name)
                raise UsageError(f"{name} must be one of {', '.join(values)}, not {found!r}")
        if self.form == "head" and self.rank is not None:
            raise UsageError("rank is for form='full'; a map in front of the head has none")
        for name in ("epochs", "batch", "rank", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} must be more than 0 and finite, not {value}")
        if not 0 <= self.validation < 1:
            raise UsageError(f"validation must be a share from 0 to 1, not {self.validation}")
        offsets = as_tuple(self.offset, "offset")
        if not offsets or min(offsets) < 0:
            raise UsageError(f"offsets are 0 or more, not {self.offset}")

    def _clear(self, job: VocabFit) -> None:
        self.fitted_: dict[LayerOffset, FittedVocabPair] = {}
        self.sweep_: list[dict[str, float | None]] = []
        self.classes_, self.n_features_in_ = job.classes, job.d_in
        self.head_ = job.head
        cache = job.cache if isinstance(job, CacheVocabFit) else None
        self.cache_id_ = None if cache is None else cache.id
        self.geometry_ = None if cache is None else cache.head.digest
        self.split_ = None if cache is None else "train"
        self.steps_ = self.passes_ = 0
        self._crossing: dict[int, float] | None = None
        if cache is not None:
            offsets, train = layers_and_offsets(job.pairs)[1], cache.sequences("train")
            self._crossing = crossing_shares(cache, train, offsets, scope_of(job.options))
        self._trainers: dict[Any, Trainer] = {}

    def _keep(self, pair: LayerOffset, outcome: Outcome, lr: float, rows: int) -> None:
        last = outcome.last
        finite = all(bool(tensor.isfinite().all()) for tensor in outcome.parameters.values())
        if not finite or last.get("validation", 0.0) is None:
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
                **({} if self._crossing is None else {"crossing": self._crossing[pair[1]]}),
            },
            outcome.history,
        )

    def pairs(self) -> list[tuple[int | None, int]]:
        """The fitted (layer, offset) pairs."""
        check_is_fitted(self, "fitted_")
        return list(self.fitted_)

    def metrics(self) -> list[dict[str, Any]]:
        """One row per (layer, offset): learning rate, steps taken, losses in nats, positions.

        Of a cache also `crossing`, the share of the pairs of its sequences that join two documents
        (left out unless `across_documents`).
        """
        check_is_fitted(self, "fitted_")
        return [dict(fitted.row) for fitted in self.fitted_.values()]

    def map(self, layer: int | None = None, offset: int | None = None) -> ParameterTensors:
        """`weight`, `bias` (and `down`, `(rank, d)`) of a (layer, offset), float32 tensors."""
        pair = self._pair(layer, offset)
        return self.fitted_[pair].parameters

    def _pair(self, layer: int | None, offset: int | None) -> LayerOffset:
        check_is_fitted(self, "fitted_")
        found = [p for p in self.fitted_ if layer in (None, p[0]) and offset in (None, p[1])]
        if len(found) == 1:
            return found[0]
        fitted = ", ".join(f"({la}, {n})" for la, n in self.fitted_)
        if not found:
            raise NotFoundError(f"no map for layer {layer}, offset {offset}; fitted are {fitted}")
        raise UsageError(f"name a layer and an offset; fitted (layer, offset) are {fitted}")

    def predict_log_proba(self, X: Any, layer: int | None = None, offset: int | None = None) -> Any:
        """Log-probabilities of `classes_` for rows `(n, d)`, `(n, classes)`; dask stays lazy."""
        return self._predict(X, layer, offset, lambda z: z.log_softmax(-1).numpy(), True)

    def predict_proba(self, X: Any, layer: int | None = None, offset: int | None = None) -> Any:
        """Probabilities of `classes_` for rows `(n, d)`, `(n, classes)`; dask stays lazy."""
        return self._predict(X, layer, offset, lambda z: z.softmax(-1).numpy(), True)

    def predict(self, X: Any, layer: int | None = None, offset: int | None = None) -> Any:
        """The most probable of `classes_` for rows `(n, d)`, `(n,)`; dask stays lazy."""
        return self._predict(X, layer, offset, self._label, False)

    def _label(self, logits: torch.Tensor) -> np.ndarray:
        return self.classes_[logits.numpy().argmax(-1)]

    def _predict(
        self, X: Any, layer: int | None, offset: int | None,
        read: Callable[[torch.Tensor], np.ndarray], wide: bool,
    ) -> Any:  # fmt: skip
        parameters, classes = self.map(layer, offset), len(self.classes_)
        if self.form == "head" and self.head_ is None:
            raise UsageError("a saved map needs its head: set probe.head_ = cache.head.torch()")

        def block(rows: np.ndarray) -> np.ndarray:
            out = []
            for tile in row_tiles(len(rows), classes):
                states = torch.from_numpy(np.ascontiguousarray(rows[tile], np.float32))
                found = apply_parametrization(parameters, states)
                logits = found if self.head_ is None else self.head_(found)
                # A NaN would be taken for the largest logit.
                if not bool(logits.amax(-1).isfinite().all()):
                    raise UsageError("the rows X, or their logits, hold values that are not finite")
                out.append(read(logits))
            return np.concatenate(out) if out else read(torch.empty(0, classes))

        X = as_array(X, "X", known=False)
        if is_dask(X):
            self._check_width(X)
            dtype = np.dtype(np.float32) if wide else self.classes_.dtype
            chunks = (X.chunks[0], (classes,)) if wide else (X.chunks[0],)
            X = X.rechunk({1: -1})
            return X.map_blocks(
                block, dtype=dtype, chunks=chunks, drop_axis=[] if wide else [1],
                meta=np.empty((0, 0) if wide else 0, dtype),
            )  # fmt: skip
        rows: Any = validated(self, X, dtype=[np.float32, np.float64], reset=False)
        return block(rows)

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

        Of a cache, right is what the probe was fitted to: the text's token for `loss="text"`, else
        the model's top token.
        """
        pair = self._pair(layer, offset)
        if not isinstance(X, ActivationCache):
            from sklearn.metrics import accuracy_score

            if y is None:
                raise UsageError("score of rows X needs their labels: score(X, y)")
            y = as_array(y, "y", known=False, kinds=LABELS)
            found = self.predict(X, *pair)
            return accuracy_score(np.asarray(y), np.asarray(found), sample_weight=sample_weight)
        if self.form == "head" and self.head_ is None:
            self.head_ = X.head.torch()
        loss = "text" if self.loss == "text" else "model"
        found = find_top_tokens(X, X.sequences(split)) if loss == "model" else np.zeros(0, np.int32)
        examples = cache_examples(
            X, pair[:1], pair[1:], loss, lambda: found,
            split=split, batch=self.batch, shuffle=False,
            across_documents=self.across_documents, drop_first=self.drop_first,
        )  # fmt: skip
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
        found = apply_parametrization(self.map(layer, offset), batch.hidden)
        return batch.head(found) if self.form == "head" else found

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())  # pyright: ignore
        return {**state, "_trainers": {}} if "_trainers" in state else state

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What `save_probe` writes: a JSON object and tensors."""
        check_is_fitted(self, "fitted_")
        about = {"cache": self.cache_id_, "geometry": self.geometry_, "split": self.split_}
        rows = [{**f.row, "history": f.history} for f in self.fitted_.values()]
        classes = None if self.cache_id_ is not None else self.classes_.tolist()
        config = {**about, "d_model": self.n_features_in_, "vocab": len(self.classes_),
                  "classes": classes, "classes_dtype": self.classes_.dtype.str,
                  "sweep": self.sweep_, "steps": self.steps_, "passes": self.passes_,
                  "feature_names": feature_names(self), "pairs": rows}  # fmt: skip
        tensors = {
            f"{layer}.{offset}.{name}": value.numpy()
            for (layer, offset), fitted in self.fitted_.items()
            for name, value in fitted.parameters.items()
        }
        return config, tensors

    @classmethod
    def restore(
        cls, params: dict[str, Any], config: dict[str, Any], tensors: dict[str, np.ndarray]
    ) -> "VocabProbe":
        """The probe that `state` described."""
        probe = cls(**params)
        known = config["classes"]
        dtype = config.get("classes_dtype")  # the first version did not write it
        classes = np.arange(config["vocab"]) if known is None else np.array(known, dtype)
        probe._clear(VocabFit([], classes, config["d_model"], params))
        probe.cache_id_, probe.geometry_ = config["cache"], config["geometry"]
        probe.split_, probe.sweep_ = config["split"], config["sweep"]
        probe.steps_, probe.passes_ = config.get("steps", 0), config.get("passes", 0)
        set_feature_names(probe, config.get("feature_names"))
        for row in config["pairs"]:
            pair = row["layer"], row["offset"]
            start = f"{pair[0]}.{pair[1]}."
            found = {
                key[len(start) :]: torch.tensor(value)
                for key, value in tensors.items()
                if key.startswith(start)
            }
            rest = {key: value for key, value in row.items() if key != "history"}
            if "crossing" in row:
                probe._crossing = {**(probe._crossing or {}), pair[1]: row["crossing"]}
            probe.fitted_[pair] = FittedVocabPair(found, rest, row["history"])
        return probe

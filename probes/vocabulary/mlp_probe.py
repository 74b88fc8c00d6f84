"""MLP probe: a non-linear control for probes of later tokens, fitted through the model's head."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ...cache.errors import UsageError
from ...cache.files.json_files import plain_value
from .vocab_probe import VocabProbe


class MlpProbe(VocabProbe):
    """Predicts the model's token after t+N from residual_l[t] by an MLP in front of its head.

    logits = head(A h + b + W2 gelu(W1 h + b1)), with `hidden` units. Against the same probe
    without the hidden layer, `VocabProbe(offsets, layers, form="head", loss="kl")`, it says what a
    state holds that no affine map reads: both start as the logit lens and are fitted by the same
    descent to the same loss. `loss` is `kl` (KL to the model's distribution, as lenses), `model`
    (cross-entropy to its top token) or `text`. A stronger probe finds more in any state; what it
    finds need not be what the model reads there (Hewitt and Liang, 2019): fit a `ControlProbe`,
    too.

    Fitted out of core like `VocabProbe`, with its parameters, learning-rate sweep, checkpoints and
    stop on the validation split, which returns the best parameters. Caches only: labelled rows have
    no head.
    """

    kind = "mlp"
    forms: ClassVar[tuple[str, ...]] = ("mlp",)
    form = "mlp"
    rank = None
    products = "auto"
    validation = 0.0

    def __init__(
        self,
        offsets: int | Sequence[int] = 0,
        layers: Sequence[int] | None = None,
        loss: str = "kl",
        hidden: int = 256,
        lr: float | None = None,
        epochs: int = 3,
        batch: int = 1024,
        seed: int = 0,
        across_documents: bool = False,
        drop_first: int = 0,
    ) -> None:
        self.offsets = offsets
        self.layers = layers
        self.loss = loss
        self.hidden = hidden
        self.lr = lr
        self.epochs = epochs
        self.batch = batch
        self.seed = seed
        self.across_documents = across_documents
        self.drop_first = drop_first

    def _fit_options(self) -> dict[str, Any]:
        """Parameters of the constructor, and those of `VocabProbe` that are fixed here."""
        fixed = {"form": self.form, "rank": self.rank, "products": self.products}
        return {**plain_value(self.get_params()), **fixed, "validation": self.validation}

    def _check_params(self) -> None:
        """Raise `UsageError` for a parameter that cannot be right."""
        super()._check_params()
        if not isinstance(self.hidden, int) or self.hidden < 1:
            raise UsageError(
                f"hidden must be a whole number of units, 1 or more, not {self.hidden!r}; without "
                "a hidden layer take VocabProbe(form='head', loss='kl')"
            )

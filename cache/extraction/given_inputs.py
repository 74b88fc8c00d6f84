"""Models and texts of an extraction that a caller holds in Python instead of naming them.

`residua.extract` enters `hold_inputs`; the `GivenInputs` travel with the `ExtractionRequest`, whose
`model` and `data` are then only names for people.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..documents.given_rows import GivenTexts, hold_texts
from ..errors import UsageError
from ..files.disk_columns import scratch_folder

if TYPE_CHECKING:
    from ..model.loaded_model import LoadedModel

LOADED = "loaded_model"
"""Key of provenance.json: the model was given in Python, and lies in no folder."""


@dataclass(frozen=True)
class GivenInputs:
    """What a caller holds of a request; None for what the request names."""

    model: "LoadedModel | None" = None
    texts: GivenTexts | None = None

    def __bool__(self) -> bool:
        return self.model is not None or self.texts is not None


@dataclass(frozen=True)
class NamedInputs:
    """Names of model and texts, and those that are given instead."""

    model: str
    data: str
    given: GivenInputs

    def attention(self, requested: str) -> str:
        """The attention kernel of the request; of a loaded model the one that it runs with."""
        if self.given.model is None:
            return requested
        from ..model.loaded_model import attention_of

        return attention_of(self.given.model.module, requested)


@contextmanager
def hold_inputs(model: Any, data: Any, tokenizer: Any, root: Path) -> Iterator[NamedInputs]:
    """Context with the names of `model` and `data`, and what was given instead of a name.

    Temporary files go to the disk of `root`. Raises `UsageError` for a tokenizer beside a model's
    name, and what `hold_loaded_model` and `hold_texts` raise.
    """
    from ..model.loaded_model import hold_loaded_model, is_loaded_model

    with ExitStack() as stack:
        loaded, texts = None, None
        if is_loaded_model(model):
            loaded = stack.enter_context(hold_loaded_model(model, tokenizer))
        elif not isinstance(model, str | Path):
            raise UsageError(
                f"a model cannot be a {type(model).__name__}; give a folder, a hub id or a loaded "
                "model of transformers"
            )
        elif tokenizer is not None:
            raise UsageError(
                "a tokenizer is given beside a loaded model; a model folder or hub id has its own: "
                "leave tokenizer out"
            )
        if not isinstance(data, str | Path):
            texts = stack.enter_context(hold_texts(data, scratch_folder(root)))
        yield NamedInputs(
            str(model) if loaded is None else loaded.name,
            str(data) if texts is None else texts.name,
            GivenInputs(loaded, texts),
        )

"""The class of each image by its label: `label_classes` matches labels with the model's classes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ....cache.errors import NotFoundError
from ...token_texts.token_names import read_class_names

if TYPE_CHECKING:
    from ....cache.store.activation_cache import ActivationCache

DEFAULT_LABEL = "label"
"""Label that is read if nobody names one: the subfolder of an image, the column of a data set."""
MOST_NAMED = 3
"""Most labels without a class that a note names."""


@dataclass(frozen=True)
class LabelClasses:
    """The class that the label of each sequence names."""

    name: str | None
    """Name of the label; None where the cache has none."""
    classes: np.ndarray
    """Class by sequence, `(sequences,)` int64; -1 without a label, or without a class for it."""
    notes: tuple[str, ...] = ()


def label_classes(cache: "ActivationCache", name: str | None = None) -> LabelClasses:
    """The class that the label `name` (default: `label`, if there is one) gives each sequence.

    A word is the class of the same name, in any case, `_` and spaces being the same, or of a name
    between the commas of the model's (`tench, Tinca tinca`); a number is the id of the class.
    Raises `NotFoundError` for a label that the cache lacks.
    """
    unknown = np.full(len(cache.sequence_length), -1, np.int64)
    if name is None and DEFAULT_LABEL not in cache.label_names:
        note = (
            "the images have no label, so that accuracy is undefined; agreement is with the model"
        )
        return LabelClasses(None, unknown, (note,))
    chosen = name or DEFAULT_LABEL
    values = cache.label(chosen, missing=None)
    if values.dtype.kind in "iuf":
        whole = np.isfinite(values) & (values == np.floor(values))
        is_class = whole & (values >= 0) & (values < cache.vocab)
        classes = np.where(is_class, np.where(is_class, values, 0), -1).astype(np.int64)
        words = [str(value) for value in values.tolist()]
        missing = ~np.isfinite(values)
    elif values.dtype.kind in "OU":
        class_of = classes_by_name(read_class_names(cache))
        classes = np.array([class_of.get(_key(word), -1) for word in values], np.int64)
        words = ["" if word is None else str(word) for word in values]
        missing = np.array([word is None for word in values])
    else:
        raise NotFoundError(f"the label {chosen!r} holds {values.dtype}, no names of classes")
    notes = []
    unmatched = sorted({words[n] for n in np.flatnonzero((classes < 0) & ~missing)})
    if unmatched:
        named = ", ".join(map(repr, unmatched[:MOST_NAMED]))
        notes.append(
            f"{len(unmatched)} values of the label {chosen!r} are no class of the model ({named}"
            f"{', ...' if len(unmatched) > MOST_NAMED else ''}): their images have no accuracy"
        )
    if missing.any():
        notes.append(f"{int(missing.sum())} images have no label {chosen!r}")
    return LabelClasses(chosen, classes, tuple(notes))


def classes_by_name(names: tuple[str, ...]) -> dict[str, int]:
    """Key of a name -> class; a name that several classes have is left out."""
    found: dict[str, set[int]] = {}
    for number, name in enumerate(names):
        for part in (name, *name.split(",")):
            found.setdefault(_key(part), set()).add(number)
    return {key: min(numbers) for key, numbers in found.items() if key and len(numbers) == 1}


def _key(word: object) -> str:
    """A name without differences of case, spaces and underscores."""
    return "" if word is None else " ".join(str(word).replace("_", " ").split()).casefold()

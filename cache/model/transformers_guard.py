"""One thread at a time uses transformers, without its progress bars and advice on the screen."""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


TRANSFORMERS = threading.RLock()
"""Held while transformers builds or loads something: that changes the whole process."""


@contextlib.contextmanager
def guard_transformers() -> Iterator[None]:
    """Let one thread at a time use transformers, without progress bars and advice on the screen.

    While transformers builds a model, it replaces methods of its classes (such as `tie_weights`)
    for the whole process; of two threads at once, the second would put back what the first had
    replaced, and no model of the process would be tied from then on.
    """
    from transformers.utils import logging

    with TRANSFORMERS:
        level = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.set_verbosity(level)
            logging.enable_progress_bar()

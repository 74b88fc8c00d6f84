"""Exclusive and silent use of transformers: `guard_transformers`, a lock without progress bars."""

import contextlib
import threading
import warnings
from collections.abc import Iterator

TRANSFORMERS_LOCK = threading.RLock()
"""Held while transformers builds or loads a model, which changes state of the whole process."""


@contextlib.contextmanager
def guard_transformers() -> Iterator[None]:
    """Context in which one thread at a time uses transformers, without progress bars and warnings.

    While transformers builds a model, it replaces methods of its classes (such as `tie_weights`)
    for the whole process. With two threads at once, the second thread would restore the replaced
    methods of the first, and from then on no model of the process would be tied.
    """
    from transformers.utils import logging

    with TRANSFORMERS_LOCK:
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

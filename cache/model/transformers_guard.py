"""Exclusive and silent use of transformers: `guard_transformers`, a lock, no bars, no questions."""

import contextlib
import threading
import warnings
from collections.abc import Iterator

TRANSFORMERS_LOCK = threading.RLock()
"""Held while transformers builds or loads a model, which changes state of the whole process."""


@contextlib.contextmanager
def guard_transformers() -> Iterator[None]:
    """Context in which one thread at a time uses transformers, without progress bars and warnings.

    transformers never asks on the terminal whether to run code that comes with a model: where no
    answer was given, the code does not run, and a `ValueError` says so.

    While transformers builds a model, it replaces methods of its classes (such as `tie_weights`)
    for the whole process. With two threads at once, the second thread would restore the replaced
    methods of the first, and from then on no model of the process would be tied.
    """
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    with TRANSFORMERS_LOCK:
        level, time_out = logging.get_verbosity(), dynamic_module_utils.TIME_OUT_REMOTE_CODE
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds to wait for an answer: no question
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            dynamic_module_utils.TIME_OUT_REMOTE_CODE = time_out
            logging.set_verbosity(level)
            logging.enable_progress_bar()

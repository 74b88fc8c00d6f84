"""The file of top tokens on a full disk is an error before the first token is written."""

import errno
import os
from typing import Any

import numpy as np
import pytest

from residua.cache.errors import LimitError, NoSpaceError
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.training.top_tokens import find_top_tokens


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, NoSpaceError), (errno.EFBIG, LimitError)]
)
def test_a_full_disk_is_no_signal(
    tiny_cache: ActivationCache,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error: type[Exception],
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(error):
        find_top_tokens(tiny_cache, tiny_cache.sequences("train"))


def test_without_reservation_the_tokens_are_the_same(
    tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "as the file system says")

    sequences = tiny_cache.sequences("train")
    tokens = find_top_tokens(tiny_cache, sequences)
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    np.testing.assert_array_equal(find_top_tokens(tiny_cache, sequences), tokens)

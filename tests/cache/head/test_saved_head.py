"""A saved head comes back as it was, in float32 once: torch shares the arrays on the CPU."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from residua.cache.head.head import TENSORS
from residua.cache.head.saved_head import load_head

from ...support.pretended_device import DEVICE, DeviceTensor, pretended_device
from ...support.synthetic import random_head

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_of_any_dtype_is_loaded_exactly_and_once(tmp_path: Path, dtype: torch.dtype) -> None:
    head = random_head(8, 30)
    tensors = {name: torch.tensor(getattr(head, name)).to(dtype) for name in TENSORS}
    head.save(tmp_path, tensors)
    loaded = load_head(tmp_path, 8, 30)
    for name in TENSORS:
        np.testing.assert_array_equal(getattr(loaded, name), tensors[name].float().numpy())
        assert getattr(loaded.torch(), name).data_ptr() == getattr(loaded, name).ctypes.data
    hidden = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    logits = loaded.torch()(torch.from_numpy(hidden)).numpy()
    np.testing.assert_allclose(logits, loaded.logits(hidden), rtol=1e-5, atol=1e-5)


def test_read_only_arrays_of_a_head_are_copied(recwarn: pytest.WarningsRecorder) -> None:
    head = random_head(8, 30)
    head.unembedding.flags.writeable = False
    tensor = head.torch().unembedding
    assert tensor.data_ptr() != head.unembedding.ctypes.data
    assert not recwarn.list


def test_a_large_head_takes_little_more_than_its_float32_arrays(tmp_path: Path) -> None:
    head = random_head(64, 20_000)
    tensors = {name: torch.tensor(getattr(head, name)).bfloat16() for name in TENSORS}
    head.save(tmp_path, tensors)
    tracemalloc.start()
    try:
        loaded = load_head(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The stored bytes are half of the float32 arrays; a little more for the digest's pieces.
    assert peak < 1.6 * loaded.nbytes


def test_the_head_runs_on_a_device() -> None:
    head = random_head(8, 30)
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    expected = head.torch()(hidden)
    with pretended_device():
        logits = head.torch(DEVICE)(hidden.to(DEVICE))
        assert isinstance(logits, DeviceTensor)
        torch.testing.assert_close(logits.cpu(), expected)

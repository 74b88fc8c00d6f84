"""KL and the weighted Aitchison cosine agree with plain sums in numpy, row by row."""

import numpy as np
import pytest
import torch

from residua.analysis.basis import distribution_changes
from residua.analysis.basis.distribution_changes import aitchison_cosine, kl_divergence


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def random_logits(seed: int, rows: int = 7, vocab: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, vocab, generator=generator)


@pytest.mark.parametrize("tile_bytes", [1, 8 * 11 * 3, 8 << 20])
def test_kl_is_that_of_plain_sums(tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(distribution_changes.TILE_BYTES, "cpu", tile_bytes)
    p, q = random_logits(0), random_logits(1)
    kl = kl_divergence(p, q)
    assert kl.dtype == torch.float64
    for row in range(len(p)):
        log_p, log_q = log_softmax(p[row].numpy()), log_softmax(q[row].numpy())
        assert float(kl[row]) == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(), rel=1e-12)
    assert kl_divergence(p[:0], q[:0]).shape == (0,)
    assert float(kl_divergence(p, p).abs().max()) == 0.0


def test_kl_of_excluded_tokens() -> None:
    p, q = random_logits(0, rows=4), random_logits(1, rows=4)
    p[:2, 3] = q[1:3, 3] = -torch.inf
    q[3, 0] = torch.nan
    kl = kl_divergence(p, q)
    keep = np.arange(11) != 3
    log_p, log_q = log_softmax(p[1].numpy()[keep]), log_softmax(q[1].numpy()[keep])
    assert float(kl[1]) == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(), rel=1e-12)
    assert bool(torch.isfinite(kl[0]))
    assert float(kl[2]) == np.inf
    assert bool(torch.isnan(kl[3]))


@pytest.mark.parametrize("tile_bytes", [1, 8 << 20])
def test_the_cosine_is_that_of_plain_sums(tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(distribution_changes.TILE_BYTES, "cpu", tile_bytes)
    stimulus, response = ((random_logits(s), random_logits(s + 1)) for s in (0, 2))
    cosine = aitchison_cosine(stimulus, response)
    for row in range(7):
        s0, s1, r0, r1 = (log_softmax(z[row].numpy()) for z in (*stimulus, *response))
        w = (np.exp(r0) + np.exp(r1)) / 2
        x, y = s1 - s0, r1 - r0
        x, y = x - (w * x).sum(), y - (w * y).sum()
        expected = (w * x * y).sum() / np.sqrt((w * x * x).sum() * (w * y * y).sum())
        assert float(cosine[row]) == pytest.approx(expected, rel=1e-10)


def test_the_cosine_of_equal_opposite_and_absent_changes() -> None:
    before, after = random_logits(0), random_logits(1)
    pair = (before, after)
    torch.testing.assert_close(aitchison_cosine(pair, pair), torch.ones(7, dtype=torch.float64))
    # A constant added to all logits changes nothing.
    torch.testing.assert_close(
        aitchison_cosine((before, after + 5), pair), torch.ones(7, dtype=torch.float64)
    )
    opposite = aitchison_cosine((after, before), pair)
    torch.testing.assert_close(opposite, -torch.ones(7, dtype=torch.float64))
    assert bool(torch.isnan(aitchison_cosine((before, before), pair)).all())
    # Tokens that the model excludes on both sides have no weight.
    cut, changed = before.clone(), after.clone()
    cut[:, 2] = changed[:, 2] = -torch.inf
    assert bool(torch.isfinite(aitchison_cosine(pair, (cut, changed))).all())

"""A difference that has no interval is not called unclear."""

from pathlib import Path

import numpy as np

from residua.analysis.studies.jacobian.jacobian_study import _compared
from residua.analysis.studies.trajectories.position_sample import choose_positions
from residua.analysis.studies.trajectories.readings import Trajectories

from ....support.synthetic import make_cache, random_head


def test_one_document_gives_a_difference_without_an_interval(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers = [rng.normal(0, 1, (20, 8)) for _ in range(3)]
    cache = make_cache(tmp_path, layers, [20], random_head(8, 11))
    sample = choose_positions(cache, "all")

    def reading(name: str, kl: float) -> Trajectories:
        values = {"kl": np.full((20, 3), kl, np.float32)}
        return Trajectories(name, (0, 1, 2), values, np.zeros((20, 3), np.int64))

    said = _compared(sample, {"a": reading("a", 1.0), "b": reading("b", 3.0)}, "a", "b")
    assert (
        said == "a and b differ in KL by +2.000, without an interval (mean over 2 layers, n = 20)."
    )

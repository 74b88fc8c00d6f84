"""A vocabulary probe is bit for bit the same whatever the groups, the threads and the workers."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client

from residua import VocabProbe
from residua.cache import cluster as clusters
from residua.cache.errors import MismatchError, UsageError
from residua.cache.files.json_files import read_json
from residua.cache.store.activation_cache import ActivationCache
from residua.probes.training.checkpoint import lock_folder
from residua.probes.training.minibatches import MinibatchStream
from residua.probes.training.threads import thread_pool
from residua.probes.vocabulary import descent, fit_groups
from residua.probes.vocabulary.fit_groups import divide
from residua.probes.vocabulary.fit_job import COPIES
from residua.probes.vocabulary.learning_rate_sweep import Sweep

from ...support.local import local_client
from ...support.synthetic import make_cache, random_head
from .test_vocab_probe import planted, same

OPTIONS: dict[str, Any] = {"offsets": (0, 2), "layers": [0, 1], "epochs": 1, "batch": 256}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return planted(tmp_path_factory.mktemp("echo"))


@pytest.fixture
def short_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits of few steps, in this process and the threads of its clusters."""
    monkeypatch.setattr(descent, "LEAST_STEPS", 40)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    """Two workers in this process, two threads each."""
    with local_client(threads=2) as client:
        yield client


def equal_probes(first: VocabProbe, second: VocabProbe) -> bool:
    same_sweep = first.sweep_ == second.sweep_
    return same(first, second) and same_sweep and first.pairs() == second.pairs()


def wide_cache(folder: Path) -> ActivationCache:
    """States so wide that a buffer of 128 KiB has room for 512 rows of one layer, 256 of two."""
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(4000, 64)) @ rng.normal(size=(64, 64)) for _ in range(3)]
    return make_cache(folder, layers, [40] * 100, random_head(64, 50))


@pytest.mark.parametrize("form", [{}, {"loss": "kl", "rank": 3}, {"loss": "text", "form": "head"}])
def test_threads_of_a_cluster_give_what_this_process_gives(
    echo: ActivationCache, cluster: Client, form: dict[str, Any], short_fits: None
) -> None:
    seen: list[tuple[int, int]] = []
    alone = VocabProbe(**OPTIONS, **form).fit(echo)
    shared = VocabProbe(**OPTIONS, **form).fit(
        echo, client=cluster, progress=lambda *done: seen.append(done)
    )
    assert equal_probes(alone, shared)
    assert {row["layer"] for row in shared.sweep_} == {0, 1}
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)


@pytest.mark.slow
def test_processes_of_a_cluster_give_what_this_process_gives_even_if_one_dies(
    echo: ActivationCache, tmp_path: Path
) -> None:
    alone = VocabProbe(**OPTIONS).fit(echo)
    with local_client(processes=True) as client:
        assert equal_probes(VocabProbe(**OPTIONS).fit(echo, client=client), alone)
        found: Any = client.run(os.getpid)
        pids = list(found.values())

        def kill(done: int, total: int) -> None:
            if done > total // 3 and pids:
                os.kill(pids.pop(), signal.SIGKILL)
                pids.clear()

        probe = VocabProbe(**OPTIONS).fit(
            echo,
            client=client,
            memory=1,
            progress=kill,
            checkpoint=tmp_path / "fit",
            checkpoint_seconds=0,
        )
        assert not pids
        assert equal_probes(probe, alone)
    assert not (tmp_path / "fit").exists()


@pytest.mark.parametrize("buffer_bytes", [None, 1 << 17])
def test_memory_decides_how_many_pairs_are_fitted_together_and_nothing_else(
    tmp_path: Path, buffer_bytes: int | None, short_fits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows are so wide that a buffer for more layers has room for fewer of them."""
    if buffer_bytes is not None:
        defaults: Any = MinibatchStream.__init__.__kwdefaults__
        monkeypatch.setitem(defaults, "buffer_bytes", buffer_bytes)
    cache, probes, group_sizes, run = wide_cache(tmp_path), [], [], descent.Descent.run

    def run_and_count(self: descent.Descent) -> Any:
        group_sizes.append(len(self.pairs))
        return run(self)

    monkeypatch.setattr(descent.Descent, "run", run_and_count)
    pair_bytes = 4 * COPIES * 50 * (64 + 1)
    for memory in (None, 4 * pair_bytes, 1):
        probe = VocabProbe((0, 1, 2), [0, 1], epochs=1, batch=128)
        probes.append(probe.fit(cache, memory=memory))
    assert group_sizes == [6, 3, 3, 1, 1, 1, 1, 1, 1]
    assert equal_probes(probes[0], probes[1])
    assert equal_probes(probes[0], probes[2])


def test_eigenvectors_are_found_by_one_thread_here_as_on_workers(
    tmp_path: Path, cluster: Client, short_fits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their last bits depend on how many of torch's threads look for them."""
    cache, number, plain = wide_cache(tmp_path), torch.get_num_threads(), torch.linalg.eigh
    used: list[int] = []

    def eigh(matrix: torch.Tensor) -> Any:
        used.append(torch.get_num_threads())
        return plain(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    torch.set_num_threads(2)
    try:
        alone = VocabProbe(0, [1], epochs=1, batch=128).fit(cache)
    finally:
        torch.set_num_threads(number)
    assert set(used) == {1}
    assert equal_probes(alone, VocabProbe(0, [1], epochs=1, batch=128).fit(cache, client=cluster))
    assert set(used) == {1}


def test_each_thread_of_a_worker_runs_one_of_torchs_and_leaks_it_to_none(
    echo: ActivationCache, cluster: Client, short_fits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, now, most, used = threading.Lock(), [0], [0], set()
    plain, own = descent.Trainer.step, torch.get_num_threads()

    def step(self: descent.Trainer, *args: Any) -> None:
        with lock:
            used.add(torch.get_num_threads())
            now[0] += 1
            most[0] = max(most[0], now[0])
        plain(self, *args)
        with lock:
            now[0] -= 1

    def numbers() -> list[int]:
        with ThreadPoolExecutor(1) as pool:
            return [pool.submit(torch.get_num_threads).result(), torch.get_num_threads()]

    monkeypatch.setattr(descent.Trainer, "step", step)
    torch.set_num_threads(3)
    try:
        VocabProbe(**OPTIONS).fit(echo, client=cluster)
        assert numbers() == [3, 3]
        with thread_pool(2) as pool:
            assert numbers() == [3, 3]
            assert list(pool.map(lambda _: torch.get_num_threads(), range(2))) == [1, 1]
    finally:
        torch.set_num_threads(own)
    assert used == {1}
    assert 1 < most[0] <= 4


def fail_at(owner: Any, name: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the method of a class raise from its call number `calls` on."""
    plain, taken = getattr(owner, name), [0]

    def method(self: Any, *args: Any) -> Any:
        taken[0] += 1
        if taken[0] >= calls:
            raise Killed
        return plain(self, *args)

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize("on_workers", [False, True])
def test_a_fit_that_broke_off_anywhere_goes_on_to_the_same_bits(
    echo: ActivationCache,
    cluster: Client,
    tmp_path: Path,
    on_workers: bool,
    short_fits: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, probe = VocabProbe(**OPTIONS).fit(echo), VocabProbe(**OPTIONS)
    client, folder = cluster if on_workers else None, tmp_path / "fit"
    options: dict[str, Any] = {"memory": 1, "checkpoint": folder, "checkpoint_seconds": 0}
    places = [
        (Sweep, "_fit_briefly", 3),
        (descent.Descent, "run", 1),
        (descent.Trainer, "record_losses", 6),
        (descent.Trainer, "step", 12),
    ]
    for owner, name, calls in places:
        with monkeypatch.context() as patch:
            if (folder / "plan" / "plan.json").is_file():
                fail_at(Sweep, "run", 1, patch)
            fail_at(owner, name, calls, patch)
            with pytest.raises(Killed):
                probe.fit(echo, client=client, **options)
    steps = [read_json(path)["state"]["step"] for path in folder.rglob("fit.json")]
    assert max(steps) > 0
    # The result of the sweep is saved: the sweep does not run again.
    fail_at(Sweep, "run", 1, monkeypatch)
    # The resumed fit may have other workers and another memory than the killed fit.
    probe.fit(echo, client=None if on_workers else cluster, **{**options, "memory": None})
    assert equal_probes(probe, whole)
    assert not folder.exists()


def test_groups_that_no_longer_fit_the_memory_are_refused_and_not_lost(
    echo: ActivationCache, tmp_path: Path, short_fits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "lr": 0.1}
    whole, probe = VocabProbe(**options).fit(echo), VocabProbe(**options)
    with monkeypatch.context() as patch:
        fail_at(descent.Trainer, "record_losses", 5, patch)
        with pytest.raises(Killed):
            probe.fit(echo, checkpoint=tmp_path, checkpoint_seconds=0)
    with pytest.raises(MismatchError, match="pairs was"):
        probe.fit(echo, memory=1, checkpoint=tmp_path)
    assert equal_probes(probe.fit(echo, checkpoint=tmp_path), whole)


def test_a_fit_waits_for_one_that_still_works_in_its_folder(
    echo: ActivationCache, tmp_path: Path, short_fits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()

    def cut(*args: Any) -> Any:
        begun.set()
        return divide(*args)

    monkeypatch.setattr(fit_groups, "divide", cut)
    probe = VocabProbe(0, [0], lr=0.1, epochs=1)
    with ThreadPoolExecutor(1) as pool:
        with lock_folder(tmp_path):
            found = pool.submit(probe.fit, echo, checkpoint=tmp_path)
            assert not begun.wait(1)
        assert found.result(timeout=60) is probe
    assert begun.is_set()


def test_pairs_are_divided_evenly() -> None:
    pairs = [(layer, offset) for layer in range(3) for offset in range(3)]
    assert divide(pairs, 9, 1) == [pairs]
    assert [len(group) for group in divide(pairs, 4, 1)] == [3, 3, 3]
    assert [len(group) for group in divide(pairs, 9, 4)] == [2, 2, 2, 3]
    assert [len(group) for group in divide(pairs, 9, 40)] == [1] * 9
    assert sum(divide(pairs, 2, 3), []) == pairs


def test_a_client_for_rows_and_one_without_workers_are_refused(
    echo: ActivationCache, cluster: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="leave client= out"):
        VocabProbe().fit(rng.normal(size=(50, 3)), np.arange(50) % 2, client=cluster)
    monkeypatch.setattr(clusters, "GRACE_SECONDS", 0.2)
    with (
        local_client(workers=0) as client,
        pytest.raises(UsageError, match="has no workers"),
    ):
        VocabProbe().fit(echo, client=client)

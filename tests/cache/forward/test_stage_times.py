"""Stages of an extraction: what they book, and batches that do not fit into memory."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import residua
from residua.analysis.console.terminal import Meter, bandwidths
from residua.cache.devices import is_out_of_memory
from residua.cache.errors import ModelError
from residua.cache.extraction.answer import answer_request
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.forward import part_runner as runner
from residua.cache.forward.batches import (
    BATCH_TOKENS,
    BatchHalving,
    SequenceBatch,
    choose_batch_tokens,
    find_batch_tokens,
)
from residua.cache.forward.device_copies import DEPTH, HostRows, PendingCopies, PendingCopy
from residua.cache.forward.stage_times import STAGES, StageTimes
from residua.cache.model.blocks import DecoderBlocks
from residua.cache.tokens.token_stream import TokenStream
from residua.cli import main


def test_every_row_passes_every_stage_once(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    request = ExtractionRequest(
        str(model_folder), str(texts_file), tmp_path, context=64, part_positions=512
    )
    made = answer_request(request)
    cache, stages = made.cache, made.stages
    layers = [cache.array(f"residual/{layer}") for layer in cache.layers]
    rows = cache.positions * sum(array.layout.row_bytes for array in layers)
    assert stages.bytes["write"] == rows
    # Short sequences, the last of each split: what pads them beside longer ones is computed and
    # copied, not written; alone in their batch they need none.
    padding = int((64 - cache.sequence_length).sum()) * rows // cache.positions
    assert stages.bytes["copy"] == stages.bytes["forward"]
    assert rows <= stages.bytes["copy"] <= rows + padding
    # A sequence that runs over the end of a part goes through the model once all the same.
    assert stages.tokens == cache.positions
    assert all(0 < stages.seconds[stage] < made.seconds for stage in STAGES)
    value = made.to_dict()["stages"]
    assert value["bottleneck"] == max(STAGES, key=stages.seconds.__getitem__)
    assert value["write"]["bandwidth"] == pytest.approx(rows / stages.seconds["write"])
    hit = answer_request(request).to_dict()["stages"]
    assert hit["bottleneck"] is None
    assert hit["forward"] == {
        "seconds": 0,
        "bytes": 0,
        "bandwidth": None,
        "tokens": 0,
        "tokens_per_second": None,
    }


def test_the_longest_stage_is_the_bottleneck_and_is_named() -> None:
    stages = StageTimes()
    assert bandwidths(stages.to_dict()) == ""
    stages.add("forward", 2.0, 4_000, tokens=6_200)
    stages.add("copy", 0.5, 6_000_000_000)
    stages.add("write", 2.5, 2_000_000_000)
    assert bandwidths(stages.to_dict()) == (
        "forward 3.1k tok/s · copy 12 GB/s · write 800 MB/s (bottleneck: write)"
    )
    stages.merge(stages.to_dict())
    assert (stages.tokens, stages.seconds["copy"]) == (12_400, 1.0)


def test_stages_lose_nothing_to_threads() -> None:
    stages = StageTimes()

    def book() -> None:
        for _ in range(2000):
            stages.add("write", 1.0, 3)

    threads = [threading.Thread(target=book) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (stages.seconds["write"], stages.bytes["write"]) == (8000.0, 24000)


def test_people_see_the_speeds_after_an_extraction_and_not_after_a_hit(
    model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    args = ["extract", str(model_folder), str(texts_file), "--root", str(tmp_path)]
    made, hit = (CliRunner().invoke(main, args).stdout for _ in range(2))
    assert "tok/s" in made
    assert "(bottleneck: " in made
    assert "bottleneck" not in hit


def test_a_terminal_shows_the_speeds_under_the_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    stages = StageTimes()
    with Meter() as shown:
        shown.note("extract", lambda: bandwidths(stages.to_dict()))
        shown.stage("tokenize", 5, 5)
        shown.stage("extract", 1, 2)
        stages.add("forward", 1.0, 10, tokens=500)
    lines = capsys.readouterr().err.splitlines()
    (place,) = [n for n, line in enumerate(lines) if "forward 500 tok/s (bottleneck" in line]
    assert " extract" in lines[place - 1]


class CountingCopy:
    """A pending copy that counts calls of `wait`."""

    def __init__(self) -> None:
        self.waits = 0

    def wait(self) -> None:
        self.waits += 1


def test_one_more_pending_copy_waits_for_the_oldest() -> None:
    pending, copies = PendingCopies(2), [CountingCopy() for _ in range(5)]
    for count, copy in enumerate(copies, 1):
        pending.add(copy)
        n_ended = max(0, count - 2)
        assert [copy.waits for copy in copies] == [1] * n_ended + [0] * (5 - n_ended)
    pending.drain()
    assert [copy.waits for copy in copies] == [1] * 5
    pending.drain()
    assert [copy.waits for copy in copies] == [1] * 5
    assert DEPTH >= 2  # one computes while one is copied


class FakeEvent:
    """A stand-in for a CUDA event: its time in milliseconds, reached when it is waited for."""

    def __init__(self, time: float) -> None:
        self.time = time
        self.reached = False

    def synchronize(self) -> None:
        self.reached = True

    def elapsed_time(self, other: "FakeEvent") -> float:
        assert other.reached or self.time <= other.time
        return other.time - self.time


def test_rows_arrive_once_and_their_times_are_booked_once() -> None:
    events, stages = [FakeEvent(t) for t in (0.0, 300.0, 400.0, 450.0)], StageTimes()
    copy = PendingCopy(events, stages, 1000, 7)
    rows = HostRows(np.zeros((2, 3, 4), np.uint16), np.zeros((2, 3), np.float32), copy.wait)
    sequence_rows = rows.of_sequence(1, 2)
    assert sequence_rows.stored.shape == (2, 4)
    threads = [threading.Thread(target=sequence_rows.wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert events[3].reached
    assert stages.tokens == 7
    assert stages.seconds == {"forward": 0.3, "copy": 0.05, "write": 0.0}
    assert stages.bytes == {"forward": 1000, "copy": 1000, "write": 0}


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_say_that_memory_ran_out(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


def forward_that_fits(
    limit: int, error: type[Exception] = RuntimeError
) -> Callable[[SequenceBatch], str]:
    """A forward pass that runs out of memory beyond `limit` sequences of ten tokens."""

    def forward(batch: SequenceBatch) -> str:
        if 10 * len(batch.sequences) > limit:
            raise error("CUDA out of memory")
        return ",".join(map(str, batch.sequences))

    return forward


@pytest.mark.parametrize("count", [1, 2, 7, 8, 33])
@pytest.mark.parametrize("limit", [10, 25, 70, 1000])
def test_halved_batches_keep_every_sequence_in_order(count: int, limit: int) -> None:
    releases: list[int] = []
    halving = BatchHalving(np.full(count, 10), release=lambda: releases.append(1))
    pieces = list(halving.run(SequenceBatch(tuple(range(count))), forward_that_fits(limit)))
    assert ",".join(text for _, text in pieces) == ",".join(map(str, range(count)))
    assert all(10 * len(piece.sequences) <= limit for piece, _ in pieces)
    assert bool(releases) == (10 * count > limit)
    # The limit holds for the next batch, which is cut before any attempt.
    n_failures = len(releases)
    pieces_again = list(halving.run(SequenceBatch(tuple(range(count))), forward_that_fits(limit)))
    assert [piece for piece, _ in pieces_again] == [piece for piece, _ in pieces]
    assert len(releases) == n_failures


def test_a_sequence_that_does_not_fit_alone_is_an_error_that_says_what_to_do() -> None:
    halving = BatchHalving(np.array([10, 10]))
    with pytest.raises(ModelError, match="10 tokens does not fit .* shorter --context"):
        list(halving.run(SequenceBatch((0, 1)), forward_that_fits(5, MemoryError)))
    with pytest.raises(RuntimeError, match="other"):
        list(
            halving.run(SequenceBatch((0,)), lambda _: (_ for _ in ()).throw(RuntimeError("other")))
        )


def limit_memory(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[int]:
    """Make forward passes of more than `limit` tokens run out of memory; the sizes that ran."""
    whole, sizes = DecoderBlocks.residuals, list[int]()

    def residuals(self: DecoderBlocks, ids: torch.Tensor, mask: Any = None) -> Any:
        if ids.numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(ids.numel())
        return whole(self, ids, mask)

    monkeypatch.setattr(DecoderBlocks, "residuals", residuals)
    return sizes


@pytest.mark.parametrize("pack", [True, False])
def test_an_extraction_that_runs_out_of_memory_loses_no_row(
    model_folder: Path,
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pack: bool,
) -> None:
    options: dict[str, Any] = {
        "context": 48,
        "pack": pack,
        "dtype": "float32",
        "part_positions": 1024,
    }
    args = str(model_folder), str(texts_file)
    whole = residua.extract(*args, root=tmp_path / "whole", **options)
    sizes = limit_memory(monkeypatch, 200)
    small = residua.extract(*args, root=tmp_path / "small", **options)
    assert max(sizes) <= 200
    assert small.id == whole.id
    assert residua.verify(small.path).ok
    for layer in whole.layers:
        one, other = whole.residual_array(layer)[:], small.residual_array(layer)[:]
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-5)


def test_a_model_that_fits_with_no_sequence_at_all_is_a_clear_error(
    model_folder: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(runner.PartRunner, "_residuals", full)
    with pytest.raises(ModelError, match="64 tokens does not fit .* shorter --context"):
        residua.extract(str(model_folder), str(texts_file), root=tmp_path, context=64)


@pytest.mark.parametrize(
    ("longest", "message"), [(10, "4 sequences of 48 tokens"), (100, "or one of 128, do not fit")]
)
def test_a_check_of_the_model_that_does_not_fit_says_what_to_do(
    model_folder: Path,
    texts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    longest: int,
    message: str,
) -> None:
    whole = DecoderBlocks.residuals

    def residuals(self: DecoderBlocks, ids: torch.Tensor, mask: Any = None) -> Any:
        if ids.shape[1] > longest:
            torch.empty(1 << 60, dtype=torch.uint8)  # more than any machine has
        return whole(self, ids, mask)

    monkeypatch.setattr(DecoderBlocks, "residuals", residuals)
    with pytest.raises(ModelError, match=f"{message}.* shorter --context.*another --device"):
        residua.extract(str(model_folder), str(texts_file), root=tmp_path, context=128)
    assert not list(tmp_path.glob("*/manifest.json"))


def test_a_model_larger_than_the_memory_is_a_clear_error(
    model_folder: Path, texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to(*_: object, **__: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    with pytest.raises(ModelError, match="does not fit into the memory of cpu; take another"):
        residua.extract(str(model_folder), str(texts_file), root=tmp_path)


class StackWithLimitedMemory:
    """Decoder blocks whose memory holds the residuals of batches of at most `limit` tokens."""

    def __init__(self, limit: int) -> None:
        self.model = torch.nn.Linear(1, 1)
        self.depth, self.d_model = 1, 1
        self.limit, self.batch_sizes = limit, list[int]()

    def residuals(self, ids: torch.Tensor, mask: Any = None) -> list[torch.Tensor]:
        self.batch_sizes.append(ids.numel())
        if ids.numel() > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [ids, ids]


@pytest.mark.parametrize(
    ("limit", "cap", "batch_tokens"),
    [(300, 4096, 256), (300, 100, 64), (10**6, 4096, 4096), (20, 4096, 32), (10**6, 10, 32)],
)
def test_the_batch_size_is_doubled_until_memory_or_the_cap_ends(
    limit: int, cap: int, batch_tokens: int
) -> None:
    stream = TokenStream(np.arange(96, dtype=np.int32), np.full(3, 32), np.arange(3))
    stack: Any = StackWithLimitedMemory(limit)
    assert find_batch_tokens(stack, stream, cap) == batch_tokens
    assert max(stack.batch_sizes, default=0) <= 2 * max(batch_tokens, 32)
    assert choose_batch_tokens(stack, stream, 2) == BATCH_TOKENS["cpu"]


def test_booking_a_batch_takes_microseconds() -> None:
    stages = StageTimes()
    began = time.perf_counter()
    for _ in range(1000):
        with stages.timed("write", 1), stages.waiting():
            stages.add("forward", 0.0, 1, 1)
    assert time.perf_counter() - began < 1.0

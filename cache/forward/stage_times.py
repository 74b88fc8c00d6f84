"""Seconds and bytes of the stages of an extraction: forward, copy to the host, write.

`PartRunner` and `PartExtraction` fill one `StageTimes` per process; processes are merged by
`StageTimes.merge`, and the console prints throughput and bottleneck.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STAGES: tuple[str, ...] = ("forward", "copy", "write")
"""The model's blocks; cast and copy from device to host; writing and committing shard files.

Stages overlap, so their seconds may add up to more than the wall time."""


class StageTimes:
    """Seconds and bytes of each stage; safe to fill from several threads, a few µs per batch."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.bytes: dict[str, int] = dict.fromkeys(STAGES, 0)
        """Bytes of rows, in their stored dtype, that the stage gave to the next one."""
        self.tokens: int = 0
        """Tokens that the model read, without padding."""
        self.waited: float = 0.0
        """Seconds in which the model did not run because the writer was behind."""
        self._lock = threading.Lock()

    def add(self, stage: str, seconds: float, count: int = 0, tokens: int = 0) -> None:
        """Add to `stage` the seconds of work on `count` bytes; `tokens` count for the model."""
        with self._lock:
            self.seconds[stage] += seconds
            self.bytes[stage] += count
            self.tokens += tokens

    @contextmanager
    def timed(self, stage: str, count: int = 0, tokens: int = 0) -> Iterator[None]:
        """Add the time of the context to `stage`, unless the context raises."""
        began = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - began, count, tokens)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Add the time of the context to `waited`."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def merge(self, other: dict[str, Any]) -> None:
        """Add the `to_dict` of another process that worked at the same time."""
        for stage in STAGES:
            self.add(stage, other[stage]["seconds"], other[stage]["bytes"])
        self.tokens += other["forward"]["tokens"]
        self.waited += other["waited"]

    @property
    def bottleneck(self) -> str | None:
        """The stage with the most seconds; None if no stage ran."""
        slowest = max(STAGES, key=self.seconds.__getitem__)
        return slowest if self.seconds[slowest] else None

    def to_dict(self) -> dict[str, Any]:
        """JSON object: seconds, bytes and bytes per second of each stage.

        `forward` also has tokens and tokens per second.
        """
        value: dict[str, Any] = {
            stage: {
                "seconds": round(self.seconds[stage], 6),
                "bytes": self.bytes[stage],
                "bandwidth": _rate(self.bytes[stage], self.seconds[stage]),
            }
            for stage in STAGES
        }
        rate = _rate(self.tokens, self.seconds["forward"])
        value["forward"] |= {"tokens": self.tokens, "tokens_per_second": rate}
        return {**value, "waited": round(self.waited, 6), "bottleneck": self.bottleneck}


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if seconds else None

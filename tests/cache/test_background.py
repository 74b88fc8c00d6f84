"""Claims about the background thread: order, bounded memory, and errors that reach the caller."""

import threading
import time
from collections.abc import Iterator

import pytest

from residua.cache.background import BackgroundThread, iterate_in_background


def test_calls_run_in_order_in_another_thread_and_end_with_the_context() -> None:
    calls: list[tuple[int, int]] = []
    with BackgroundThread(2) as background:
        for number in range(20):
            background.put(lambda n: calls.append((n, threading.get_ident())), number)
    assert [number for number, _ in calls] == list(range(20))
    assert threading.get_ident() not in {thread for _, thread in calls}


def test_put_waits_while_the_queue_is_full() -> None:
    release = threading.Event()
    queued: list[int] = []

    def put_five(background: BackgroundThread) -> None:
        for number in range(5):
            background.put(release.wait)
            queued.append(number)

    with BackgroundThread(2) as background:
        caller = threading.Thread(target=put_five, args=(background,))
        caller.start()
        time.sleep(0.1)
        assert queued == [0, 1, 2]  # the running call, and two in the queue
        release.set()
        caller.join()
    assert queued == list(range(5))


def test_wait_returns_when_all_calls_have_ended() -> None:
    ended: list[int] = []
    with BackgroundThread(4) as background:
        for number in range(3):
            background.put(lambda n: (time.sleep(0.01), ended.append(n)), number)
        background.wait()
        assert ended == [0, 1, 2]


def fail(message: str) -> None:
    raise OSError(message)


def test_the_first_error_is_raised_by_every_later_request() -> None:
    calls: list[str] = []

    def go_on_after_the_error() -> None:
        with BackgroundThread(4) as background:
            background.put(fail, "first")
            with pytest.raises(OSError, match="first"):
                background.wait()
            with pytest.raises(OSError, match="first"):
                background.put(calls.append, "later")

    with pytest.raises(OSError, match="first"):
        go_on_after_the_error()
    assert not calls


def test_after_an_error_queued_calls_do_not_run() -> None:
    release = threading.Event()
    calls: list[str] = []

    def queue_calls() -> None:
        with BackgroundThread(4) as background:
            background.put(release.wait)
            background.put(fail, "first")
            background.put(fail, "second")
            background.put(calls.append, "later")
            release.set()

    with pytest.raises(OSError, match="first"):
        queue_calls()
    assert not calls


def test_an_error_of_the_caller_is_not_hidden_by_one_of_the_thread() -> None:
    def interrupt() -> None:
        with BackgroundThread() as background:
            background.put(fail, "in the thread")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_a_thread_that_waits_for_calls_keeps_no_arguments_alive() -> None:
    class Rows:
        alive = 0

        def __init__(self) -> None:
            Rows.alive += 1

        def __del__(self) -> None:
            Rows.alive -= 1

    with BackgroundThread() as background:
        background.put(lambda rows: None, Rows())
        background.wait()
        assert Rows.alive == 0


def test_items_come_in_order_and_at_most_depth_ahead() -> None:
    computed: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(10):
            computed.append(number)
            yield number

    items = iterate_in_background(numbers(), 2)
    assert next(items) == 0
    time.sleep(0.05)
    assert len(computed) <= 4  # one read, two in the queue, one that waits for room
    assert list(items) == list(range(1, 10))


def test_an_error_of_the_iterator_comes_after_the_items_before() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise ValueError("two")

    seen: list[int] = []
    with pytest.raises(ValueError, match="two"):
        seen.extend(iterate_in_background(numbers(), 3))
    assert seen == [1]


def test_a_reader_that_stops_early_ends_the_thread() -> None:
    before = threading.active_count()
    items = iterate_in_background(iter(range(10**9)), 2)
    assert next(items) == 0
    assert threading.active_count() == before + 1
    items.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before

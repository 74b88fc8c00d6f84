"""Claims about the plan of batches: every row once, bounded, and the same for any worker."""

from collections import Counter

import numpy as np
import pytest

from residua.cache.format.layout import Layout
from residua.cache.forward.batches import WINDOW_CHUNKS, SequenceBatch, plan_batches

SEEDS = range(24)


class Case:
    """Random lengths, layout and batch size."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        longest = int(rng.choice([1, 3, 20, 100, 900]))
        self.lengths = rng.integers(1, longest + 1, int(rng.integers(1, 200))).astype(np.int64)
        if seed % 4 == 0:  # packed: equal lengths but for the last
            self.lengths[:-1] = longest
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)
        chunk = int(2 ** rng.integers(0, 6))
        self.layout = Layout(chunk, chunk * int(rng.integers(1, 17)))
        self.batch_tokens = int(rng.choice([1, 16, 128, 1024]))
        self.positions = int(self.lengths.sum())
        self.parts = range(self.layout.parts(self.positions))

    def plan(self, part: int, pad: bool = True) -> list[SequenceBatch]:
        return plan_batches(self.starts, self.lengths, self.layout, part, self.batch_tokens, pad)

    def rows(self, part: int) -> tuple[int, int]:
        return self.layout.rows(part, self.positions)

    def end(self, number: int) -> int:
        return int(self.starts[number] + self.lengths[number])


@pytest.fixture(params=SEEDS)
def case(request) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("pad", [True, False])
def test_every_row_of_every_part_is_covered_by_exactly_one_batch(case, pad):
    for part in case.parts:
        begin, end = case.rows(part)
        covered = np.zeros(end - begin, int)
        for batch in case.plan(part, pad):
            for number in batch.sequences:
                first, last = max(int(case.starts[number]), begin), min(case.end(number), end)
                assert first < last, "a sequence outside of the part"
                covered[first - begin : last - begin] += 1
        assert (covered == 1).all()


@pytest.mark.parametrize("pad", [True, False])
def test_a_batch_keeps_to_its_tokens_unless_it_is_one_longer_sequence(case, pad):
    for part in case.parts:
        for batch in case.plan(part, pad):
            longest = max(int(case.lengths[number]) for number in batch.sequences)
            assert len(batch.sequences) == 1 or len(batch.sequences) * longest <= case.batch_tokens


def test_a_sequence_over_an_edge_is_alone_from_both_sides(case):
    for part in case.parts[:-1]:
        edge = case.rows(part)[1]
        over = [n for n in range(len(case.starts)) if case.starts[n] < edge < case.end(n)]
        for plan in (case.plan(part), case.plan(part + 1)):
            for number in over:
                assert [b for b in plan if number in b.sequences] == [SequenceBatch((number,))]


def test_the_batches_of_a_sequence_do_not_depend_on_the_part_that_asks(case):
    found: dict[int, set[SequenceBatch]] = {}
    for part in case.parts:
        for batch in case.plan(part):
            for number in batch.sequences:
                found.setdefault(number, set()).add(batch)
    assert set(map(len, found.values())) == {1}
    assert set(found) == set(range(len(case.starts)))


def test_sequences_of_a_batch_start_within_one_window_and_windows_come_in_order(case):
    for part in case.parts:
        begin, end = case.rows(part)
        last = -1
        for batch in case.plan(part):
            starts = case.starts[list(batch.sequences)]
            if len(batch.sequences) == 1 and (
                starts[0] < begin or case.end(batch.sequences[0]) > end
            ):
                continue
            windows = set(((starts - begin) // (WINDOW_CHUNKS * case.layout.chunk_rows)).tolist())
            assert len(windows) == 1
            assert windows.pop() >= last
            last = int((starts[0] - begin) // (WINDOW_CHUNKS * case.layout.chunk_rows))


def test_the_straddlers_come_first_and_last(case):
    for part in case.parts:
        begin, end = case.rows(part)
        numbers = [batch.sequences[0] for batch in case.plan(part)]
        before = [n for n in numbers if case.starts[n] < begin]
        after = [n for n in numbers if case.end(n) > end]
        assert before in ([], numbers[:1])
        assert after in ([], numbers[-1:])


def test_without_padding_the_lengths_of_a_batch_are_equal(case):
    for part in case.parts:
        for batch in case.plan(part, pad=False):
            assert len({int(case.lengths[number]) for number in batch.sequences}) == 1


def test_the_first_of_a_batch_is_the_longest(case):
    for part in case.parts:
        for batch in case.plan(part):
            lengths = case.lengths[list(batch.sequences)]
            assert lengths[0] == lengths.max()


def test_packed_sequences_fill_their_batches():
    lengths = np.full(64, 32, np.int64)
    batches = plan_batches(np.arange(64) * 32, lengths, Layout(128, 2048), 0, 256)
    assert Counter(len(batch.sequences) for batch in batches) == {8: 8}

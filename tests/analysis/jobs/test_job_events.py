"""Events of jobs are numbered, bounded, read on by number, and survive a torn line."""

from pathlib import Path

from residua.analysis.jobs import job_events
from residua.analysis.jobs.job_events import JobEventReader, JobEventWriter


def test_events_are_read_on_by_number(tmp_path: Path) -> None:
    writer = JobEventWriter(tmp_path)
    reader = JobEventReader(tmp_path)
    for number in range(1, 4):
        assert writer.append("progress", {"done": number}) == number
    assert [event.number for event in reader.read_new()] == [1, 2, 3]
    assert reader.read_new() == []
    writer.append("state", {"state": "done"})
    assert [event.kind for event in reader.read_new()] == ["state"]
    assert [event.number for event in JobEventReader(tmp_path, after=2).read_new()] == [3, 4]
    assert JobEventReader(tmp_path, after=99).read_new() == []


def test_numbers_go_on_after_a_crash_that_tore_a_line(tmp_path: Path) -> None:
    JobEventWriter(tmp_path).append("state", {"state": "queued"})
    path = tmp_path / job_events.EVENTS_FILE
    with path.open("ab") as file:
        file.write(b'{"id":2,"event":"sta')
    reader = JobEventReader(tmp_path)
    assert [event.number for event in reader.read_new()] == [1]
    assert JobEventWriter(tmp_path).append("state", {"state": "running"}) == 2
    assert [event.data["state"] for event in reader.read_new()] == ["running"]


def test_forged_lines_are_passed_over(tmp_path: Path) -> None:
    writer = JobEventWriter(tmp_path)
    writer.append("state", {"state": "queued"})
    path = tmp_path / job_events.EVENTS_FILE
    forged = (b"[]", b'{"id":-1}', b'{"id":2,"event":"x","data":{}}', b"\xff", b"[" * 99_999)
    with path.open("ab") as file:
        file.write(b"\n".join(forged) + b"\n")
    assert [event.number for event in JobEventReader(tmp_path).read_new()] == [1]
    assert JobEventWriter(tmp_path).append("log", {"text": "on"}) == 2


def test_a_long_job_keeps_its_states_and_its_latest_events(tmp_path: Path) -> None:
    writer = JobEventWriter(tmp_path)
    writer.append("state", {"state": "queued"})
    count = job_events.MAX_FILE_BYTES // 500
    for number in range(2 * count):
        writer.append("log", {"text": f"{number:>500}"})
    path = tmp_path / job_events.EVENTS_FILE
    assert path.stat().st_size < job_events.MAX_FILE_BYTES + 2 * job_events.MAX_LINE_BYTES
    events = JobEventReader(tmp_path).read_new()
    assert events[0].data == {"state": "queued"}
    numbers = [event.number for event in events]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 2 * count + 1
    assert len(numbers) >= job_events.KEPT_EVENTS

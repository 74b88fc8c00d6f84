"""Progress callbacks: functions that long work calls to say how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, total), in the unit that the caller of the work documents."""
StageProgress = Callable[[str, int, int], None]
"""Called with (stage, done, total) by work of several stages, such as `tokenize` and `extract`."""

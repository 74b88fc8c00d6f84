"""Names of probes in an evaluation: by kind and number, or given by the user.

`evaluate` names its probes with `name_readouts`; rows, tables and pictures carry the names, and
`probe_style.py` draws a probe by the kind and the number that its `ProbeName` knows.
"""

from collections.abc import Mapping, Sequence

from ...cache.errors import UsageError
from ...cache.format.manifest import SHORT_ID
from ...probes.base.readout import Readout, check_readout


class ProbeName(str):
    """The name of a probe, a string that knows the probe's kind: `ridge 2`, or what a user gave."""

    kind: str
    """Kind of the probe, such as `ridge` or `ridge/shuffled`."""
    number: int
    """1 for the first probe of its kind in the evaluation, 2 for the second."""
    is_given: bool
    """Whether the user gave the name."""

    def __new__(
        cls, name: str, kind: str | None = None, number: int = 1, is_given: bool = False
    ) -> "ProbeName":
        value = super().__new__(cls, name)
        value.kind, value.number, value.is_given = kind or name, number, is_given
        return value


def probe_list(probes: "Readout | Sequence[Readout] | Mapping[str, Readout]") -> list[Readout]:
    """The probes that `evaluate` was given: one, several, or several with names."""
    if isinstance(probes, Mapping):
        values = list(probes.values())
    elif isinstance(probes, Sequence):
        values = list(probes)
    else:
        values = [probes]
    for value in values:
        check_readout(value)
    return values


def name_readouts(
    readouts: "Sequence[Readout] | Mapping[str, Readout]",
    baselines: Sequence[Readout] = (),
) -> dict[str, Readout]:
    """`baselines`, then `readouts`, by `ProbeName`: given names, else kinds (`ridge`, `ridge 2`).

    Raises `UsageError` for a name that is no printable text, or that two probes would share.
    """
    given = [str(name) for name in readouts] if isinstance(readouts, Mapping) else None
    if isinstance(readouts, Mapping):
        for name in readouts:
            _check_name(name)
        readouts = list(readouts.values())
    readout_by_name: dict[str, Readout] = {}
    for index, readout in enumerate((*baselines, *readouts)):
        number = 1 + sum(named.kind == readout.kind for named in readout_by_name.values())
        if given is None or index < len(baselines):
            text = f"{readout.kind} {number}" if number > 1 else readout.kind
            name = ProbeName(text, readout.kind, number)
        else:
            name = ProbeName(given[index - len(baselines)], readout.kind, number, is_given=True)
        if name in readout_by_name:
            raise UsageError(
                f"the name {str(name)!r} is that of a baseline beside the probes; give another one"
            )
        readout_by_name[name] = readout
    return readout_by_name


def _check_name(name: object) -> None:
    """Raise `UsageError` unless `name` can stand in tables and legends."""
    # matplotlib leaves names with an underscore at the beginning out of its legends.
    is_usable = isinstance(name, str) and name.strip() and name.isprintable()
    if not is_usable or str(name).startswith("_"):
        raise UsageError(
            f"a probe cannot be named {name!r}: a name is printable text that does not begin with "
            "an underscore"
        )


def describe_names(readouts: Mapping[str, Readout]) -> list[str]:
    """Sentences that say which probe each name stands for: given names, and probes of one kind."""
    kinds = [readout.kind for readout in readouts.values()]
    notes = []
    for name, readout in readouts.items():
        if (isinstance(name, ProbeName) and name.is_given) or kinds.count(readout.kind) > 1:
            folder = getattr(readout, "folder_", None)
            cache_id = getattr(readout, "cache_id_", None)
            description = [
                " ".join(repr(readout).split()),
                *([f"of cache {cache_id[:SHORT_ID]}"] if cache_id else []),
                *([f"in {folder}"] if folder else []),
            ]
            notes.append(f"{name} is {' '.join(description)}")
    return notes

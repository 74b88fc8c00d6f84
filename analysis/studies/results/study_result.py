"""`StudyResult`: what every study gives: its question and method, tables, figures, sentences."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....cache.errors import NotFoundError
from ....cache.files.json_files import plain_value
from ....cache.function_above import call_above
from ....cache.optional_libraries import require_library
from .study_figures import StudyFigure, plain_figures

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from plotly.graph_objects import Figure as PlotlyFigure

    from ....cache.store.activation_cache import ActivationCache


@dataclass(frozen=True)
class StudyTable:
    """Rows of one dataclass, with the headings of the fields that people are shown."""

    name: str
    """Lower-case words with hyphens; the key of the table in JSON."""
    title: str
    """A sentence or heading for pages."""
    headings: Mapping[str, str]
    """Field -> heading with its unit, in the order of columns; other fields are in JSON and CSV."""
    rows: Sequence[Any]
    """Instances of one frozen dataclass; intervals are fields `*_interval` of `(low, high)`."""
    most_shown: int = 40
    """Most rows in a terminal; pages show all."""

    def __post_init__(self) -> None:
        kinds = {type(row) for row in self.rows}
        if len(kinds) > 1 or not all(is_dataclass(kind) for kind in kinds):
            raise ValueError(f"the rows of the table {self.name!r} are not of one dataclass")
        for kind in kinds:
            if missing := set(self.headings) - {field.name for field in fields(kind)}:
                raise ValueError(f"the rows of {self.name!r} have no field {sorted(missing)}")

    def to_dicts(self) -> list[dict[str, Any]]:
        """Rows as plain values for JSON; undefined and infinite numbers are None."""
        return [plain_value(asdict(row)) for row in self.rows]


@dataclass(frozen=True)
class StudySubject:
    """What a study read."""

    caches: tuple[str, ...]
    """Ids of the caches."""
    model_name: str
    data_name: str
    split: str
    n: int
    """Number of what is measured: positions, answers, sequences."""
    n_of: str
    """Plural noun of what `n` counts."""
    units: str
    """What intervals resample: `document`, `sequence`, `question`."""
    n_units: int
    probes: Mapping[str, str] = field(default_factory=dict)
    """Name in the tables -> what it is, for probes that were given."""

    @classmethod
    def of(cls, cache: "ActivationCache", split: str, **others: Any) -> "StudySubject":
        """The subject of a study of one cache."""
        manifest = cache.manifest
        return cls(
            caches=(cache.id,),
            model_name=manifest.model_name,
            data_name=manifest.data_name,
            split=split,
            **others,
        )


@dataclass(frozen=True)
class StudyResult:
    """The result of a study; `write_html` makes the page that reads from top to bottom."""

    study: str
    """Name on the command line, such as `tuned-lens`."""
    title: str
    """Such as `Essential layers of sample-neox`."""
    question: str
    method: str
    """Three sentences, with the source (paper)."""
    subject: StudySubject
    tables: Sequence[StudyTable]
    """The first one is the study's main table."""
    figures: Sequence[StudyFigure]
    """The first one is the study's picture."""
    says: Sequence[str]
    """What the numbers say, a sentence each, with n and intervals."""
    does_not_say: Sequence[str]
    """What a reader may not conclude."""
    notes: Sequence[str] = ()
    """What a reader must know about single figures: undefined values, few documents, samples."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that change the numbers: seeds, limits, layers."""

    def table(self, name: str) -> StudyTable:
        """The table of that name; raises `NotFoundError` for another one."""
        for table in self.tables:
            if table.name == name:
                return table
        names = ", ".join(table.name for table in self.tables)
        raise NotFoundError(f"this study has no table {name!r}; its tables are {names}")

    def figure(self, name: str) -> StudyFigure:
        """The figure of that name; raises `NotFoundError` for another one."""
        for figure in self.figures:
            if figure.name == name:
                return figure
        names = ", ".join(figure.name for figure in self.figures)
        raise NotFoundError(f"this study has no figure {name!r}; its figures are {names}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `residua study`: texts, `tables` by name, and `figures`."""
        return {
            "study": self.study,
            "title": self.title,
            "question": self.question,
            "method": self.method,
            "subject": plain_value(asdict(self.subject)),
            "settings": plain_value(dict(self.settings)),
            "says": list(self.says),
            "does_not_say": list(self.does_not_say),
            "notes": list(self.notes),
            "tables": {table.name: table.to_dicts() for table in self.tables},
            "figures": plain_figures(self.figures),
        }

    def to_dataframe(self, table: str | None = None) -> "pd.DataFrame":
        """A table as a data frame, the main one by default (extra `report`)."""
        require_library("pandas", "a data frame")
        import pandas as pd

        chosen = self.tables[0] if table is None else self.table(table)
        return pd.DataFrame([asdict(row) for row in chosen.rows])

    def plot(self, figure: str | None = None) -> "Figure":
        """A figure drawn by matplotlib, the study's picture by default (extra `report`)."""
        require_library("matplotlib", "a picture")
        chosen = self.figures[0] if figure is None else self.figure(figure)
        return call_above("analysis.studies.results.matplotlib_figures", "draw_figure", chosen)

    def to_plotly(self, figure: str | None = None) -> "PlotlyFigure":
        """A figure drawn by plotly, the study's picture by default (extra `report`)."""
        require_library("plotly", "a figure of plotly")
        chosen = self.figures[0] if figure is None else self.figure(figure)
        return call_above("analysis.studies.results.plotly_figures", "draw_interactive", chosen)

    def write_html(self, path: "str | Path", command: str | None = None) -> "Path":
        """Write the page to `path`; it quotes the `command` that made it (extra `report`)."""
        require_library("plotly", "a page")
        return call_above(
            "analysis.studies.results.study_page", "write_study_page", [self], Path(path), command
        )

    def _repr_html_(self) -> str:
        """Question, what the study says, and its main table, for notebooks."""
        return call_above("analysis.studies.results.study_page", "short_html", self)

    def __repr__(self) -> str:
        tables = ", ".join(f"{table.name} ({len(table.rows)} rows)" for table in self.tables)
        return f"<study {self.study} of {self.subject.model_name}: {tables}>"

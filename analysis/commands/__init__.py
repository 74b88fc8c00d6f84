"""Groups of commands that cli.py joins: texts for studies, studies, and interventions."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .data_commands import data as data
    from .intervention_commands import intervene as intervene
    from .study_commands import study as study
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

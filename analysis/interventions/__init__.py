"""Interventions: the model run on from cached layers of which rows were changed."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .edit_study import study_edits as study_edits
    from .erase_study import study_erasure as study_erasure
    from .exit_study import study_early_exit as study_early_exit
    from .layer_runs import LayerRuns as LayerRuns
    from .patch_map import patch_passage as patch_passage
    from .patch_study import study_patching as study_patching
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

"""Shared by the commands of the command line: options, progress, messages."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .actions import check_outputs as check_outputs
    from .actions import fit_and_save as fit_and_save
    from .actions import write_outputs as write_outputs
    from .messages import print_cache as print_cache
    from .messages import print_caches as print_caches
    from .messages import print_differences as print_differences
    from .messages import print_estimate as print_estimate
    from .messages import print_evaluation as print_evaluation
    from .messages import print_export as print_export
    from .messages import print_extraction as print_extraction
    from .messages import print_fit as print_fit
    from .messages import print_quickstart as print_quickstart
    from .messages import print_repair as print_repair
    from .messages import print_verification as print_verification
    from .options import CONTEXT as CONTEXT
    from .options import MASKS as MASKS
    from .options import NUMBER as NUMBER
    from .options import NUMBERS as NUMBERS
    from .options import JsonErrorGroup as JsonErrorGroup
    from .options import across_documents_option as across_documents_option
    from .options import drop_first_option as drop_first_option
    from .options import probe_options as probe_options
    from .options import residua_command as residua_command
    from .options import scheduler_option as scheduler_option
    from .quickstart import run_quickstart as run_quickstart
    from .saved_actions import find_saved as find_saved
    from .saved_actions import plan_removals as plan_removals
    from .saved_actions import pull_saved as pull_saved
    from .saved_actions import push_saved as push_saved
    from .saved_actions import remove_saved as remove_saved
    from .saved_messages import print_probe as print_probe
    from .saved_messages import print_probes as print_probes
    from .saved_messages import print_push as print_push
    from .saved_messages import print_removals as print_removals
    from .saved_messages import print_shared as print_shared
    from .terminal import Meter as Meter
    from .terminal import bandwidths as bandwidths
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

"""Probes on disk, under a root, and on the hub."""

from typing import TYPE_CHECKING

from ...cache.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .kinds import probe_class as probe_class
    from .library import checkpoint_path as checkpoint_path
    from .library import find_probe as find_probe
    from .library import load_probe_for as load_probe_for
    from .library import new_probe_path as new_probe_path
    from .library import probe_path as probe_path
    from .probe_files import copy_probe as copy_probe
    from .probe_files import remove_probe as remove_probe
    from .probe_list import describe_probe as describe_probe
    from .probe_list import list_probes as list_probes
    from .probe_methods import ProbeFiles as ProbeFiles
    from .save import check_belongs as check_belongs
    from .save import check_finite as check_finite
    from .save import feature_names as feature_names
    from .save import save_probe as save_probe
    from .save import saved_params as saved_params
    from .save import set_feature_names as set_feature_names
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

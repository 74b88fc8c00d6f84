"""Paths on disk or in an object store, atomic JSON, lines of texts, leases, errors of disks."""

from typing import TYPE_CHECKING

from ..lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .confined_files import check_folders as check_folders
    from .confined_files import check_regular as check_regular
    from .confined_files import confined_digest as confined_digest
    from .confined_files import confined_path as confined_path
    from .confined_files import is_regular as is_regular
    from .confined_files import open_confined as open_confined
    from .confined_files import read_confined as read_confined
    from .confined_files import read_confined_json as read_confined_json
    from .disk_columns import BLOCK as BLOCK
    from .disk_columns import ComputedColumn as ComputedColumn
    from .disk_columns import DiskColumn as DiskColumn
    from .disk_columns import NumberColumn as NumberColumn
    from .disk_columns import row_blocks as row_blocks
    from .disk_columns import scratch_folder as scratch_folder
    from .disk_columns import take_rows as take_rows
    from .disk_errors import check_target as check_target
    from .disk_errors import check_writable as check_writable
    from .disk_errors import translate_any_disk_errors as translate_any_disk_errors
    from .disk_errors import translate_disk_errors as translate_disk_errors
    from .disk_errors import translate_store_errors as translate_store_errors
    from .json_files import file_digest as file_digest
    from .json_files import json_digest as json_digest
    from .json_files import make_folder as make_folder
    from .json_files import parse_json as parse_json
    from .json_files import plain_value as plain_value
    from .json_files import read_json as read_json
    from .json_files import sync_folder as sync_folder
    from .json_files import write_atomically as write_atomically
    from .json_files import write_json as write_json
    from .leases import FileLease as FileLease
    from .leases import Lease as Lease
    from .leases import hold_lock as hold_lock
    from .leases import lease_holder as lease_holder
    from .leases import lease_part as lease_part
    from .paths import TRANSFERS as TRANSFERS
    from .paths import as_path as as_path
    from .paths import copy_object as copy_object
    from .paths import is_remote as is_remote
    from .paths import list_folder as list_folder
    from .paths import read_all as read_all
    from .paths import store_error_code as store_error_code
    from .paths import store_of as store_of
    from .paths import total_bytes as total_bytes
    from .paths import upload_folder as upload_folder
    from .paths import write_object as write_object
    from .process_limits import raise_file_limit as raise_file_limit
    from .removal import exclusive_bytes as exclusive_bytes
    from .removal import remove_folder as remove_folder
    from .staging import publish_folder as publish_folder
    from .staging import resumable_staging_folder as resumable_staging_folder
    from .staging import staging_folder as staging_folder
    from .staging import sweep_staging as sweep_staging
else:
    __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

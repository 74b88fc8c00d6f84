"""An `Evaluation` of the JSON object that `residua evaluate --json` prints."""

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ...cache.errors import CorruptError
from ..evaluation.confidence_buckets import BucketRow, ResultKey
from ..evaluation.metrics import EvaluationRow
from ..evaluation.result import Evaluation

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache


def evaluation_of(value: Mapping[str, Any], cache: "ActivationCache") -> Evaluation:
    """The evaluation of `cache` that `value` holds; without its probes, which stay on the server.

    Raises `CorruptError` if `value` is no evaluation.
    """
    from ...probes.ridge.error_share import ErrorShare

    try:
        rows = [_make_row(EvaluationRow, row) for row in value["rows"]]
        buckets = [_make_row(BucketRow, row) for row in value["buckets"]]
        shares = {
            ResultKey(entry["probe"], entry["layer"], entry["offset"]): _make_row(ErrorShare, entry)
            for entry in value["squared_errors"]
        }
        names = ("split", "seed", "n", "positions", "sequences", "across_documents", "drop_first")
        return Evaluation(
            rows=rows,
            buckets=buckets,
            cache_id=cache.id,
            model_name=cache.manifest.model_name,
            data_name=cache.manifest.data_name,
            layers=tuple(sorted({row.layer for row in rows if row.layer is not None})),
            offsets=tuple(sorted({row.offset for row in rows})),
            probes=tuple(dict.fromkeys(row.probe for row in rows)),
            crossing={int(offset): share for offset, share in value["crossing"].items()},
            unit=value["unit"],
            units=value["units"],
            shares=shares,
            notes=tuple(value["notes"]),
            cache=cache,
            split_positions=int(cache.sequence_length[cache.sequences(value["split"])].sum()),
            **{name: value[name] for name in names},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"the server's answer is no evaluation: {error!r}") from None


def _make_row(kind: Any, row: Mapping[str, Any]) -> Any:
    """A row of the dataclass `kind`; other fields of the object are left out."""
    return kind(**{field.name: row[field.name] for field in fields(kind)})

"""What `residua study ...` prints."""

from collections.abc import Sequence

from ..studies.essential_layers import EssentialLayers
from .terminal import print_table


def print_essential_layers(result: EssentialLayers, written: Sequence[str]) -> None:
    """Print the table of depths, the curves and the notes."""
    from ..studies.essential_layers_page import TABLE, describe_curve, table_cells

    print_table(
        f"{result.n_units:,} {result.units}s, {result.n_blocks} layers; subset final: answers that "
        "the model gets right",
        tuple(TABLE.values()),
        [tuple(table_cells(row)) for row in result.rows],
    )
    for curve in result.curves:
        print(describe_curve(curve))
    for note in result.notes:
        print(note)
    for path in written:
        print(f"written: {path}")

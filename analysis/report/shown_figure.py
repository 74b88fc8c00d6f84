"""`ShownFigure`: a figure of matplotlib that a notebook shows as it stands.

It is imported where a figure is drawn: it loads matplotlib.
"""

from io import BytesIO

from matplotlib.figure import Figure

NOTEBOOK_DPI = 100
"""Dots per inch of a figure in a notebook."""


class ShownFigure(Figure):
    """A figure that is its own picture in a notebook.

    A figure that pyplot did not make is text there, unless `%matplotlib inline` was said.
    """

    def _repr_png_(self) -> bytes:
        """The picture as PNG."""
        picture = BytesIO()
        self.savefig(picture, format="png", dpi=NOTEBOOK_DPI)
        return picture.getvalue()

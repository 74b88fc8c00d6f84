"""`DisplayMethods`: how probes show themselves in notebooks, and the heatmaps of lenses."""

from typing import Any

from ...cache.function_above import call_above


class DisplayMethods:
    """HTML for notebooks; in place of scikit-learn's diagram, which says nothing about a fit."""

    def _repr_html_(self) -> str:
        """Parameters, origin and first metrics."""
        return call_above("analysis.display.object_html", "probe_html", self)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, str]:
        """The same as `_repr_html_`, beside the plain text; `options` are those of IPython."""
        return {"text/plain": repr(self), "text/html": self._repr_html_()}

"""`DisplayMethods`: how probes show themselves in notebooks, and the heatmaps of lenses."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ...cache.function_above import call_above

if TYPE_CHECKING:
    import torch


class DisplayMethods:
    """HTML for notebooks; in place of scikit-learn's diagram, which says nothing about a fit."""

    def _repr_html_(self) -> str:
        """Parameters, origin and first metrics."""
        return call_above("analysis.display.object_html", "probe_html", self)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, str]:
        """The same as `_repr_html_`, beside the plain text; `options` are those of IPython."""
        return {"text/plain": repr(self), "text/html": self._repr_html_()}


class HeatmapMethods:
    """The heatmap of a lens: any probe that reads layers and predicts tokens."""

    def heatmap(
        self,
        passage: Any,
        *,
        layers: int | Iterable[int] | None = None,
        offsets: int | Iterable[int] | None = None,
        measure: str = "probability",
        track: str | int | None = None,
        model: Any = None,
        cache: Any = None,
        force: bool = False,
        device: "str | torch.device" = "auto",
    ) -> Any:
        """What this lens reads in a text or a passage, layer by layer and token by token.

        Args:
            passage: A text of your own, which `model` reads; a `residua.CachePassage`; or a cache,
                for a telling passage of its test split.
            layers: Layers to show. Default all that were fitted.
            offsets: Offsets N to show, a map each. Default the smallest.
            measure: Colour of the cells: `probability`, `entropy`, `kl` or `rank`.
            track: A token, as its text (such as " Paris") or its id, whose probability and rank are
                shown.
            model: For a text: the model's folder or hub id, or the loaded model.
            cache: For a text: a cache of the model; without `model`, the model is loaded from
                where it was extracted.
            force: Read with a lens of another model, too.
            device: Device of the products, and of a model that is loaded here.

        Gives `LensMaps`, which a notebook shows: `plot()`, `plot("plotly")`, `to_png(path)`,
        `to_html(path)`, `to_dataframe()`; two of them make a difference,
        `ridge.heatmap(p) - lens.heatmap(p)`. `residua.read_lens_maps` reads several lenses at once,
        and says which errors are raised.
        """
        options: dict[str, Any] = {"layers": layers, "offsets": offsets, "measure": measure}
        return call_above(
            "analysis.display.lens_maps",
            "read_lens_maps",
            self,
            passage,
            track=track,
            model=model,
            cache=cache,
            force=force,
            device=device,
            **options,
        )

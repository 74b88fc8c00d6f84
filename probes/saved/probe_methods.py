"""`ProbeFiles`: the methods `save`, `load`, `push` and `pull` of fitted probes.

All probes that can be saved inherit them. They call the functions of `save.py` and `hub.py`, which
take a probe of any kind.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ...cache.errors import MismatchError

if TYPE_CHECKING:
    from ...cache.store.activation_cache import ActivationCache


class ProbeFiles:
    """Saving, loading and sharing of a fitted probe."""

    def save(self, folder: str | Path) -> Path:
        """Write the fitted probe to `folder`, as `residua.save_probe` does, and return the path."""
        from .save import save_probe

        probe: Any = self
        probe.check_fitted()
        return save_probe(probe, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the probe of this class that was saved in `folder`, without its cache.

        Raises as `residua.load_probe` does, which reads a probe of any kind, and `MismatchError`
        for a probe of another class.
        """
        from .save import load_probe

        return cls._of_this_class(load_probe(folder), str(folder))

    def push(
        self,
        repo_id: str,
        *,
        cache: "ActivationCache | None" = None,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the fitted probe to a model repository of the hub; gives the address.

        As `residua.push_probe`: with the `cache` of the fit, the card names the model and texts.
        """
        from .hub import push_probe

        probe: Any = self
        probe.check_fitted()
        return push_probe(
            probe, repo_id, cache=cache, private=private, revision=revision, token=token
        )

    @classmethod
    def pull(cls, repo_id: str, *, revision: str | None = None, token: str | None = None) -> Self:
        """Download and load a probe of this class from the hub, see `load`."""
        from .hub import pull_probe

        probe = pull_probe(repo_id, revision=revision, token=token)
        return cls._of_this_class(probe, repo_id)

    @classmethod
    def _of_this_class(cls, probe: Any, where: str) -> Self:
        """`probe` itself; raises `MismatchError` unless it is of this class."""
        if not isinstance(probe, cls):
            name = type(probe).__name__
            raise MismatchError(
                f"{where} holds a {name} (kind {probe.kind}), not a {cls.__name__}; load it with "
                f"{name}, or with residua.load_probe"
            )
        return probe

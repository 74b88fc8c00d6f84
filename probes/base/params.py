"""Constructor parameters as scikit-learn reads them, for probes that must load without it."""

from inspect import signature
from typing import Any, Self

from ...cache.errors import UsageError


class NotFitted(ValueError, AttributeError):
    """A probe was used before `fit`; stands in for scikit-learn's `NotFittedError`."""


def not_fitted_error() -> type[Exception]:
    """scikit-learn's `NotFittedError`, or `NotFitted` where it is not installed."""
    try:
        from sklearn.exceptions import NotFittedError
    except ImportError:
        return NotFitted
    return NotFittedError


class Params:
    """`get_params` and `set_params` over the constructor's arguments, stored untouched.

    With these two, scikit-learn's `clone` takes a probe like any estimator.
    """

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters of the constructor; `deep` changes nothing, there are none inside."""
        return {name: getattr(self, name) for name in signature(type(self)).parameters}

    def set_params(self, **params: Any) -> Self:
        """Change parameters; raises `UsageError` for one that the constructor does not take."""
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise UsageError(f"there is no parameter {name!r}; they are {', '.join(known)}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        given = signature(type(self)).parameters
        changed = {k: v for k, v in self.get_params().items() if repr(v) != repr(given[k].default)}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in changed.items())})"

    def check_fitted(self) -> None:
        """Raise scikit-learn's `NotFittedError` before `fit`."""
        if not hasattr(self, "maps_"):
            raise not_fitted_error()(
                f"this {type(self).__name__} is not fitted; call fit(cache) first"
            )

"""Constructor parameters as scikit-learn reads them, for probes to load without scikit-learn.

`Params` stands under the tuned lenses, the baselines and the control probes; `RidgeProbe` and
`VocabProbe` take scikit-learn's `BaseEstimator` where it is installed (see `estimator.py`).
"""

from inspect import signature
from typing import Any, Self

from ...cache.errors import UsageError


class Params:
    """`get_params` and `set_params` over the constructor's arguments, stored untouched.

    With these two, scikit-learn's `clone` takes a probe like any estimator.
    """

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters of the constructor by name; `deep` is ignored."""
        return {name: getattr(self, name) for name in signature(type(self)).parameters}

    def set_params(self, **params: Any) -> Self:
        """Change parameters; raises `UsageError` for a name that the constructor does not take."""
        names = self.get_params()
        for name, value in params.items():
            if name not in names:
                raise UsageError(f"there is no parameter {name!r}; they are {', '.join(names)}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        """The constructor call, without the parameters that have their default."""
        arguments = signature(type(self)).parameters
        changed = [
            f"{name}={value!r}"
            for name, value in self.get_params().items()
            if repr(value) != repr(arguments[name].default)
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

"""Estimators of the hypergradient by name, those that have no option without a default."""

from metaloom.engine.hypergradients.base import Hypergradient
from metaloom.engine.hypergradients.finite_difference import FiniteDifference
from metaloom.engine.hypergradients.first_order import FirstOrder
from metaloom.engine.hypergradients.implicit import Implicit
from metaloom.engine.hypergradients.mixed_mode import MixedMode
from metaloom.engine.hypergradients.rematerialized import Rematerialized
from metaloom.engine.hypergradients.reptile import Reptile
from metaloom.engine.hypergradients.unrolled import Unrolled

HYPERGRADIENTS: dict[str, type[Hypergradient]] = {
    estimator.name: estimator
    for estimator in (
        Unrolled,
        Rematerialized,
        MixedMode,
        FirstOrder,
        Implicit,
        FiniteDifference,
        Reptile,
    )
}

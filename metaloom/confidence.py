"""How sure a mean over episodes is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def confidence_95(values: Sequence[float], clusters: Sequence[str]) -> float:
    """Half the width of the 95 % confidence interval of the mean, clustered.

    With residuals r_i and G clusters: `t * sqrt(G / (G - 1) * sum_c (sum_{i in c} r_i)^2) / n`, t the
    quantile of Student's distribution with G - 1 degrees of freedom (Cameron and Miller 2015, "A
    Practitioner's Guide to Cluster-Robust Inference", section II). Where no cluster repeats it is
    the ordinary interval. Infinite for a single cluster.
    """
    mean = statistics.fmean(values)
    sums: dict[str, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    num_clusters = len(sums)
    if num_clusters < 2:
        return math.inf
    variance = num_clusters / (num_clusters - 1) * sum(total**2 for total in sums.values())
    return _student_975(num_clusters - 1) * math.sqrt(variance) / len(values)


# Where the series of `_student_975` is too narrow, by a quarter for a single degree of freedom.
_FEW_DEGREES = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058)


def _student_975(degrees: int) -> float:
    """The 97.5 % quantile of Student's distribution (Abramowitz and Stegun 1964, table 26.10 and
    equation 26.7.5), right to 0.0014."""
    if degrees <= len(_FEW_DEGREES):
        return _FEW_DEGREES[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )

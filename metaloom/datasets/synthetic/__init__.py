"""Tasks that are computed, not read: the problems of the meta-learning literature. Numpy alone."""

from metaloom.datasets.synthetic.base import GENERATOR_VERSION, Task, TaskFamily
from metaloom.datasets.synthetic.equivariant_1d import Equivariant1d
from metaloom.datasets.synthetic.equivariant_2d import Equivariant2d
from metaloom.datasets.synthetic.non_exclusive import NonExclusiveSinusoids
from metaloom.datasets.synthetic.sinusoids import Sinusoids
from metaloom.datasets.synthetic.sources import SyntheticEpisodes, SyntheticSamples
from metaloom.datasets.synthetic.unequal_scales import UnequalScales

__all__ = [
    "GENERATOR_VERSION",
    "Equivariant1d",
    "Equivariant2d",
    "NonExclusiveSinusoids",
    "Sinusoids",
    "SyntheticEpisodes",
    "SyntheticSamples",
    "Task",
    "TaskFamily",
    "UnequalScales",
]

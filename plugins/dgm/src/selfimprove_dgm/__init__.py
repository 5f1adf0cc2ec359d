"""The Darwin Gödel Machine (Zhang et al. 2025, arXiv 2505.22954) and HGM (Wang et al. 2025), as plugins of `selfimprove`."""

from selfimprove_dgm.archive import Archive
from selfimprove_dgm.editor import SelfEdit
from selfimprove_dgm.hgm import CladeThompson, ExpandOrEvaluate
from selfimprove_dgm.islands import Islands
from selfimprove_dgm.rewarder import Believed, Repairs, Runs
from selfimprove_dgm.selectors import Repeated, SigmoidNovelty, Uniform

__all__ = [
    "Archive",
    "Believed",
    "CladeThompson",
    "ExpandOrEvaluate",
    "Islands",
    "Repairs",
    "Repeated",
    "Runs",
    "SelfEdit",
    "SigmoidNovelty",
    "Uniform",
]

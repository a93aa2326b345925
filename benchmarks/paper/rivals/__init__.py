"""The approximate attentions that the paper compares itself with; none is part of the package.

Each is a module from Q, K and V to the output, made for one layer of a model, and stands in it by
``dropin.replace``. What a rival is in our hands, where its paper leaves that open, is said in its
file.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.paper.rivals.flatten import Flatten
from benchmarks.paper.rivals.hydra import Hydra
from benchmarks.paper.rivals.hyper import Hyper
from benchmarks.paper.rivals.layer import Layer, Rival
from benchmarks.paper.rivals.primal import Primal

__all__ = ["RIVALS", "Flatten", "Hydra", "Hyper", "Layer", "Primal", "Rival"]

RIVALS: dict[str, Callable[[Layer], Rival]] = {
    "Hydra": Hydra,
    "Hyper": Hyper,
    "Flatten": Flatten,
    "Primal": Primal,
}
"""By the paper's names. Hydra and Hyper have no parameters; the others have to be trained."""

"""Small models with real skill: trained weights, data they were not trained on, and metrics."""

from __future__ import annotations

from collections.abc import Callable

from tests.zoo import digits, language, minilm, t5, tagger
from tests.zoo.recipe import Recipe, ZooModel

__all__ = ["RECIPES", "ZOO", "ZooModel", "load"]

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (*digits.RECIPES, *language.RECIPES, *tagger.RECIPES, *t5.RECIPES)
}
"""The models that are trained here."""

ZOO: dict[str, Callable[[], ZooModel]] = {
    "minilm": minilm.load,
    **{name: recipe.load for name, recipe in RECIPES.items()},
}
"""What makes each model with its data, in a few seconds."""


def load(name: str) -> ZooModel:
    """The model called ``name`` with its data.

    Raises:
        KeyError: there is no such model; ``ZOO`` has the names.
    """
    return ZOO[name]()

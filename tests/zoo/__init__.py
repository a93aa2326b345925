"""Small models with real skill: trained weights, data they were not trained on, and metrics."""

from __future__ import annotations

from collections.abc import Callable

from tests.zoo import digits, language, minilm, reactions, t5, tagger
from tests.zoo.recipe import Recipe, ZooModel

__all__ = ["OPTIONAL", "RECIPES", "TRAINED", "ZOO", "ZooModel", "load"]

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (*digits.RECIPES, *language.RECIPES, *tagger.RECIPES, *t5.RECIPES)
}
"""The models of the accuracy gate that are trained here."""

TRAINED = {**RECIPES, digits.FINE_TUNED.name: digits.FINE_TUNED}
"""All models that are trained here."""

ZOO: dict[str, Callable[[], ZooModel]] = {
    "minilm": minilm.load,
    **{name: recipe.load for name, recipe in RECIPES.items()},
}
"""What makes each model of the gate with its data, in a few seconds."""

OPTIONAL: dict[str, Callable[[], ZooModel]] = {"reactions": reactions.load}
"""Models that are too large to be shipped; their modules say how they are fetched."""


def load(name: str) -> ZooModel:
    """The model called ``name`` with its data.

    Raises:
        KeyError: there is no such model; ``ZOO``, ``TRAINED`` and ``OPTIONAL`` have the names.
        FileNotFoundError: it is optional and was not fetched.
    """
    trained = {name: recipe.load for name, recipe in TRAINED.items()}
    return {**trained, **ZOO, **OPTIONAL}[name]()

"""Recipes: parts of training specific to one kind of upsampler, each in its own file."""

from upfeat.training.config import TrainConfig
from upfeat.training.recipes.base import RECIPES, Recipe
from upfeat.training.recipes.detail import DetailRecipe
from upfeat.training.recipes.neighbourhood import NeighbourhoodRecipe
from upfeat.upsamplers.base import Upsampler

__all__ = ["DetailRecipe", "NeighbourhoodRecipe", "Recipe", "recipe_for"]


def recipe_for(upsampler: Upsampler, config: TrainConfig) -> Recipe:
    """Create the recipe of an upsampler, found by the name of its class or of a base class."""
    names = (getattr(cls, "name", "") for cls in type(upsampler).__mro__)
    found = next((RECIPES[name] for name in names if name in RECIPES), Recipe)
    return found(upsampler, config)

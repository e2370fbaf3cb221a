"""Recipes: training beyond the views, one file for each kind of upsampler that has any."""

from upfeat.training.config import TrainConfig
from upfeat.training.recipes.base import RECIPES, Recipe
from upfeat.training.recipes.detail import DetailRecipe
from upfeat.training.recipes.neighbourhood import NeighbourhoodRecipe
from upfeat.upsamplers.base import Upsampler

__all__ = ["DetailRecipe", "NeighbourhoodRecipe", "Recipe", "recipe_for"]


def recipe_for(upsampler: Upsampler, config: TrainConfig) -> Recipe:
    """Make the recipe of an upsampler, by the name of its class or of one that it derives from."""
    names = (getattr(cls, "name", "") for cls in type(upsampler).__mro__)
    found = next((RECIPES[name] for name in names if name in RECIPES), Recipe)
    return found(upsampler, config)

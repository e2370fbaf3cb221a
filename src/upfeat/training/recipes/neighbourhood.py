"""Training of the neighbourhood upsampler: no corrections until it is trained."""

from __future__ import annotations

from upfeat.training.recipes.base import RECIPES, Recipe
from upfeat.upsamplers.neighbourhood import NeighbourhoodUpsampler


@RECIPES.register
class NeighbourhoodRecipe(Recipe[NeighbourhoodUpsampler]):
    """Corrections would reward smooth weights: none while training, those asked for after it."""

    name = NeighbourhoodUpsampler.name

    def start(self) -> None:
        """See :meth:`Recipe.start`."""
        if self.config.back_projections is not None:
            self.upsampler.back_projections = 0

    def finish(self) -> None:
        """See :meth:`Recipe.finish`."""
        if self.config.back_projections is not None:
            self.upsampler.back_projections = self.config.back_projections

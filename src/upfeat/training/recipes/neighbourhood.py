"""Recipe of the neighbourhood upsampler: training without back-projections."""

from __future__ import annotations

from upfeat.training.recipes.base import RECIPES, Recipe
from upfeat.upsamplers.neighbourhood import NeighbourhoodUpsampler


@RECIPES.register
class NeighbourhoodRecipe(Recipe[NeighbourhoodUpsampler]):
    """Recipe that disables back-projections in training, since they would reward smooth weights.

    After the last step, ``back_projections`` is set to the configured number.
    """

    name = NeighbourhoodUpsampler.name

    def start(self) -> None:
        """See :meth:`Recipe.start`."""
        if self.config.back_projections is not None:
            self.upsampler.back_projections = 0

    def finish(self) -> None:
        """See :meth:`Recipe.finish`."""
        if self.config.back_projections is not None:
            self.upsampler.back_projections = self.config.back_projections

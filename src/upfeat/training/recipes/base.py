"""Interface of recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from upfeat.registry import Registry
from upfeat.training.config import TrainConfig
from upfeat.upsamplers.base import Upsampler

ENLARGEMENT = 2
"""Factor by which images are enlarged for the features that a :class:`Term` is given."""

AnyUpsampler = TypeVar("AnyUpsampler", bound=Upsampler)


class Term(nn.Module):
    """An additional term of the loss; its state is part of a run's checkpoints."""

    def forward(self, upsampler: Any, kernels: Any, features: Tensor, seen: Tensor) -> Tensor:
        """Compute the term.

        Args:
            upsampler: upsampler that is trained.
            kernels: kernels of the images.
            features: (B, C, h, w), the backbone's features of the images.
            seen: (B, C, h', w'), its features of the images enlarged by :data:`ENLARGEMENT`.

        Returns:
            A scalar.
        """
        raise NotImplementedError

    def absorb(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Update the term's state from the last step; ``mean`` averages over processes."""


class Recipe(Generic[AnyUpsampler]):
    """Base of recipes, which adapt training to one kind of upsampler; the base does nothing."""

    name: ClassVar[str]
    """Name of the upsampler's class."""

    def __init__(self, upsampler: AnyUpsampler, config: TrainConfig) -> None:
        """Store the upsampler and the settings."""
        self.upsampler, self.config = upsampler, config

    def start(self) -> None:
        """Change the upsampler before the first step."""

    def finish(self) -> None:
        """Change the upsampler after the last step."""

    def cautions(self) -> list[str]:
        """Return warnings about allowed settings that are seldom intended, a line each."""
        return []

    def term(self, embed_dim: int) -> Term | None:
        """Return the additional term for a backbone of ``embed_dim`` channels, or ``None``.

        Raises:
            ValueError: the configuration has a setting for a part that this upsampler lacks.
        """
        if self.config.mix_share != 1:
            raise ValueError(
                f"mix_share={self.config.mix_share:g} is of the detail upsampler alone; give 1"
            )
        if self.config.detail_weight:
            raise ValueError(
                f"detail_weight={self.config.detail_weight:g} is of the detail upsampler alone; "
                "give 0"
            )
        return None


RECIPES = Registry[type[Recipe[Any]]]("recipe")
"""Recipes by the name of the upsampler."""

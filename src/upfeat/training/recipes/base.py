"""The contract of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from upfeat.registry import Registry
from upfeat.training.config import TrainConfig
from upfeat.upsamplers.base import Upsampler

ENLARGEMENT = 2
"""Factor of the image whose features a :class:`Term` is given."""

AnyUpsampler = TypeVar("AnyUpsampler", bound=Upsampler)


class Term(nn.Module):
    """A term of the loss beside those of the views; its state is part of a run's checkpoints."""

    def forward(self, upsampler: Any, kernels: Any, features: Tensor, seen: Tensor) -> Tensor:
        """Compute the term.

        Args:
            upsampler: that is trained.
            kernels: of the images.
            features: (B, C, h, w) of the images.
            seen: (B, C, h', w') of the images, enlarged by :data:`ENLARGEMENT`.

        Returns:
            A scalar.
        """
        raise NotImplementedError

    def absorb(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Take in what the last step showed; ``mean`` is that over processes."""


class Recipe(Generic[AnyUpsampler]):
    """Training of one kind of upsampler beyond the views; here nothing."""

    name: ClassVar[str]
    """Of the upsampler's class."""

    def __init__(self, upsampler: AnyUpsampler, config: TrainConfig) -> None:
        """Keep both."""
        self.upsampler, self.config = upsampler, config

    def start(self) -> None:
        """Change the upsampler before the first step."""

    def finish(self) -> None:
        """Change the upsampler after the last one."""

    def cautions(self) -> list[str]:
        """Warnings about settings that are allowed but seldom meant, a line each."""
        return []

    def term(self, embed_dim: int) -> Term | None:
        """The further term of the loss for a backbone of ``embed_dim`` channels, if there is one.

        Raises:
            ValueError: the configuration asks for a term that this upsampler does not have.
        """
        if self.config.detail_weight:
            raise ValueError(
                f"detail_weight={self.config.detail_weight:g} is of the detail upsampler alone; "
                "give 0"
            )
        return None


RECIPES = Registry[type[Recipe[Any]]]("recipe")
"""Recipes by the name of the upsampler."""

"""The contract of upsamplers: linear in the features, with weights that depend on the image alone.

up(F) = K(g)·M(F) + o, where K(g) are per-pixel weights made from the guidance g, M is a linear map
of the channels of one cell, and o a constant per channel. M therefore runs on the coarse grid; a
linear head gives the same result before upsampling as after it; and the same K(g) serves every
backbone, layer and block of channels of one image.

An upsampler may add a term that depends on the image alone, D(g): a few maps on a coarse grid times
a basis of channels. A head then applies to the basis as well, and all of the above still holds;
:class:`Head` applies one head to features, to a basis and to a constant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, nn

from upfeat.backends import dispatch
from upfeat.bounds import path_of
from upfeat.normalization import Colour, Normalization, Normalized
from upfeat.registry import Registry
from upfeat.sharing import push_to_hub
from upfeat.tensor_checks import check_values
from upfeat.types import Size, Window
from upfeat.upsamplers.checks import (
    check_hidden,
    check_inputs,
    check_rendering,
    check_result,
)
from upfeat.upsamplers.head import Head, add_offset, apply_head
from upfeat.upsamplers.kernels import Kernels
from upfeat.upsamplers.maps import Map
from upfeat.upsamplers.saved import load_pretrained, save_pretrained

AnyUpsampler = TypeVar("AnyUpsampler", bound="Upsampler")


class Upsampler(nn.Module, ABC):
    """Features on a coarse grid and an image in, features at any size out.

    Subclasses define :meth:`prepare`; those that change channels also define :meth:`mix` and
    :attr:`offset`. ``config()`` returns the constructor's arguments, which
    :meth:`save_pretrained` writes to a file.
    """

    name: ClassVar[str]
    """The name by which ``upfeat.load(upsampler=…)`` finds the class."""
    linear: ClassVar[bool] = True
    """True if other maps, such as a head's output, may be upsampled in place of the features."""
    unsaved: ClassVar[frozenset[str]] = frozenset({"backend", "start"})
    """Constructor arguments that no file may set: the backend, and further files to read."""
    always_small: ClassVar[bool] = False
    """True if no arguments make the module larger than some hundred megabytes."""
    magnitudes: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Smallest and largest magnitude accepted of a parameter, by the last part of its name."""
    takes_hidden: ClassVar[bool] = False
    """True if the upsampler can use the features of early layers of the backbone (``hidden``)."""
    wants_hidden: ClassVar[bool] = False
    """True if the upsampler was trained with ``hidden``, which models then pass by default."""
    needs_features: ClassVar[bool] = False
    """True if the weights depend on the features as well as on the image."""
    exact_parts: ClassVar[str] = "windows"
    """Parts of a map that, computed alone, equal the whole exactly: "windows" or "channels"."""
    guidance_bands: int | None = 3
    """The number of bands of the guidance; ``None``: any number (see :mod:`.bands`)."""
    backend: str = "auto"
    """The backend that every operator runs on; see :meth:`set_backend`."""
    displacement: int = 0
    """Displacement of the backbone's features, in pixels, that was corrected in training: models
    align the backbone by it (:meth:`upfeat.Backbone.aligned`)."""
    mean: Colour | None = None
    """Mean that the guidance is normalised by, RGB in [0, 1]; ``None``: the backbone's mean."""
    std: Colour | None = None
    """Standard deviation that the guidance is normalised by; ``None``: the backbone's."""
    published_by: ClassVar[str | None] = None
    """The repository that published the weights, where the package contains none."""
    origin: str | None = None
    """Description of the checkpoint that was loaded; ``None`` if none was."""
    trained_for: str | None = None
    """Name of the backbone that the weights were trained for; ``None``: any, or unknown. Models
    refuse another one if :attr:`wants_hidden`."""

    if TYPE_CHECKING:  # nn.Module declares the result of every call as Any

        def __call__(
            self,
            features: Tensor,
            guidance: Tensor,
            output_size: Size | None = None,
            *,
            hidden: Tensor | None = None,
        ) -> Tensor:
            """See :meth:`forward`."""
            ...

    @property
    def reach(self) -> int | None:
        """Cells beyond its own that an output pixel can depend on; ``None``: the whole image.

        Counts the features and the guidance, where guidance and output both have 4 or more pixels
        per cell. A window of a map (:meth:`render`) always equals that window of the whole map. A
        tile of an image, with ``reach`` more cells on every side, gives the same result upsampled
        as an image of its own if :attr:`step` divides the sides of the tile, the sides of the image
        and the tile's first row and column. Guidance of other than three bands is decorrelated over
        the whole image first (:mod:`.bands`).
        """
        return None

    @property
    def step(self) -> int:
        """Period in cells: tiles that begin and end at multiples of it can be images of their own.

        See :attr:`reach`.
        """
        return 1

    def set_backend(self, backend: str) -> None:
        """Choose the backend of every operator, for weights, sums, windows and training alike.

        Args:
            backend: "auto" chooses the fastest backend that can run and logs its name at DEBUG
                level; any other name is the only backend that runs, and operators that it cannot
                run raise an error; see :mod:`upfeat.functional`.

        Raises:
            ValueError: there is no backend of that name, or it has none of these operators.
        """
        dispatch.check_name(backend)
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = backend  # pyright: ignore[reportArgumentType]

    @property
    def normalization(self) -> Normalization | None:
        """Mean and standard deviation together; ``None`` for those of the backbone."""
        if self.mean is None or self.std is None:
            return None
        return Normalization(self.mean, self.std)

    def guidance_from(self, x: Tensor, source: Normalized) -> Tensor:
        """Convert an image from a backbone's normalisation to the upsampler's.

        Args:
            x: (B, 3, H, W), normalised for the backbone; other numbers of bands are not converted.
            source: the backbone.

        Returns:
            ``x`` itself where both normalisations agree; otherwise (B, 3, H, W) of its dtype.
        """
        own = self.normalization
        if own is None or x.shape[1] != 3:  # other bands are standardised by their own values
            return x
        return source.normalization.convert(x, own)

    @abstractmethod
    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
    ) -> Kernels:
        """Make the weights of one guidance.

        Args:
            guidance: (B, 3, H, W) normalised image; or (B, N, H, W), see :attr:`guidance_bands`.
            grid_size: (h, w) of the features that will be upsampled.
            output_size: (height, width) of the result.
            features: (B, C, h, w) of the same image; upsamplers with :attr:`needs_features` require
                them, all others ignore them.

        Raises:
            TypeError: the guidance is not a tensor.
            ValueError: a shape or a size is wrong, or features are required and do not fit.
        """

    def prepare_with(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Kernels:
        """As :meth:`prepare`, with the features of early layers of the backbone as well.

        Args:
            guidance: as in :meth:`prepare`.
            grid_size: as in :meth:`prepare`.
            output_size: as in :meth:`prepare`.
            features: as in :meth:`prepare`.
            hidden: (B, D, h', w'), features of early layers, on a grid finer than that of
                ``features``; ``None`` for none.

        Raises:
            ValueError: ``hidden`` is given, and the upsampler makes no use of it.
        """
        if hidden is not None:
            raise ValueError(f"{self.name} makes no use of hidden; leave it out, or take detail")
        return self.prepare(guidance, grid_size, output_size, features)

    @property
    def means_halo(self) -> int | None:
        """Cells of the image that a tile needs on every side if cell means are shared among tiles.

        ``None`` if the upsampler has no such means; otherwise a multiple or a divisor of
        :attr:`step`. :meth:`cell_means` computes the means of a large image, and
        :meth:`prepare_tile` uses them.
        """
        return None

    def cell_means(self, guidance: Tensor, grid_size: Size, cells: Window) -> Tensor:
        """Means over cells, which tiles of a large image read from far outside the tile.

        They are computed once for each cell of the large image and passed to :meth:`prepare_tile`
        of every tile that reads the cell.

        Args:
            guidance: (B, 3, H, W), a part of the image.
            grid_size: (h, w) cells of that part.
            cells: window of those cells, at least :attr:`means_halo` cells from every side of the
                part that is not a side of the image.

        Returns:
            (B, D, f·cells.height, f·cells.width) for a factor f of the upsampler.
        """
        raise NotImplementedError(f"{type(self).__name__} has no means; see means_halo")

    def prepare_tile(
        self,
        guidance: Tensor,
        grid_size: Size,
        features: Tensor,
        means: Tensor | None,
        hidden: Tensor | None = None,
    ) -> Kernels:
        """Make the weights of a tile, as :meth:`prepare_with` does, of the guidance's size.

        Args:
            guidance: (B, 3, H, W), the image of the tile; with ``means``, it has no effect on
                pixels farther away than :attr:`means_halo` cells.
            grid_size: (h, w) cells of the tile.
            features: (B, C, h, w) of the tile.
            means: means over all cells of the tile, as :meth:`cell_means` returns them; ``None`` if
                :attr:`means_halo` is ``None``.
            hidden: (B, D, h', w'), features of early layers of the tile; ``None`` for none.

        Raises:
            ValueError: ``hidden`` is given, and the upsampler makes no use of it.
        """
        del means
        size = (guidance.shape[2], guidance.shape[3])
        return self.prepare_with(guidance, grid_size, size, features, hidden)

    def mix(self, features: Tensor) -> Tensor:
        """Map the channels of each cell, (B, C, h, w) -> (B, C, h, w); the identity by default."""
        return features

    @property
    def offset(self) -> Tensor | None:
        """Constant added to every output pixel, (C,), or ``None``."""
        return None

    @property
    def constants(self) -> list[Tensor]:
        """Parameters of the offset, which are in the unit of the features, unlike all others."""
        return []

    def forward(
        self,
        features: Tensor,
        guidance: Tensor,
        output_size: Size | None = None,
        *,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Upsample features.

        Args:
            features: (B, C, h, w).
            guidance: (B, 3, H, W), the image that the features came from, normalised by
                :attr:`mean` and :attr:`std`; :class:`upfeat.FeatUp` normalises it by itself.
                Where :attr:`guidance_bands` is ``None``, any number of bands, in any units.
            output_size: (height, width) of the result in pixels; ``None`` for the guidance's size.
            hidden: (B, D, h', w'), features of early layers of the backbone, as
                :meth:`upfeat.Backbone.with_hidden` returns them, for upsamplers with
                :attr:`takes_hidden`; ``None`` for none.

        Returns:
            (B, C, *output_size).

        Raises:
            ValueError: shapes or batch sizes disagree, or the features contain NaN or infinity.
        """
        size = check_inputs(features, guidance, output_size, self.guidance_bands)
        grid = (features.shape[2], features.shape[3])
        check_hidden(hidden, features)
        kernels = self.prepare_with(guidance, grid, size, features, hidden)
        out = self.render(kernels, self.mix(features))
        return check_result(self.name, out, (*features.shape[:2], *size))

    def render(
        self,
        kernels: Kernels,
        mixed: Tensor | Map,
        *,
        head: Head | Tensor | slice | None = None,
        window: Window | None = None,
    ) -> Tensor:
        """Upsampled features, or a linear head of them, at every pixel or in a window.

        Args:
            kernels: weights of the image, from :meth:`prepare`.
            mixed: (B, C, h, w), the coarse features after :meth:`mix`.
            head: a :class:`Head`; or its weight alone, (K, C); either is applied before upsampling,
                with the same result. Or a range of channels; ``None`` for all channels unchanged.
            window: window of the output in pixels; ``None`` for the whole output.

        Returns:
            (B, K or C, height, width).

        Raises:
            TypeError: an argument is of another type.
            ValueError: the head does not fit the features, or the window does not lie in the
                output.
        """
        head = Head.of(head)
        check_rendering(kernels, mixed, head, window)
        out = self.render_linear(kernels, mixed, head=head.weight, window=window)
        constant = head.constant(self.offset)
        return out if constant is None else add_offset(out, constant)

    def render_linear(
        self,
        kernels: Kernels,
        mixed: Tensor | Map,
        *,
        head: Tensor | slice | None = None,
        window: Window | None = None,
    ) -> Tensor:
        """As :meth:`render`, but without the constant; ``head`` may also be (B, K, C)."""
        coarse = apply_head(mixed, head)
        return kernels(coarse) if window is None else kernels.crop(coarse, window)

    def precompute(self, kernels: Kernels, mixed: Tensor) -> tuple[Kernels, Tensor | Map]:
        """Precompute everything that does not depend on the window.

        Args:
            kernels: weights of the image, from :meth:`prepare`.
            mixed: (B, C, h, w), the coarse features after :meth:`mix`.

        Returns:
            Kernels and features from which :meth:`render` returns the same values, for any head and
            window; by default the arguments themselves.
        """
        return kernels, mixed

    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this upsampler, as JSON values."""
        return {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``, created if missing.

        Raises:
            OSError: the folder cannot be written.
            ValueError: a weight is NaN or infinite, or the class has arguments and no
                :meth:`config`, so that the folder would load as another upsampler.
        """
        has_config = type(self).config is not Upsampler.config
        save_pretrained(self, path_of("folder", folder), has_config=has_config)

    def push_to_hub(self, repo_id: str, *, run: str | Path | None = None, **options: Any) -> str:
        """Put the upsampler on the Hugging Face hub, with a model card; needs ``huggingface_hub``.

        Args:
            repo_id: "owner/name"; :meth:`from_pretrained` accepts this name.
            run: folder of the training that made the upsampler, whose settings, versions and scores
                go into the card; ``None`` for none.
            **options: options of ``huggingface_hub.ModelHubMixin.push_to_hub``, such as
                ``private``, ``token``, ``branch``, ``commit_message``.

        Returns:
            The URL of the commit.

        Raises:
            FileNotFoundError: ``run`` is not the folder of a training.
            ValueError: huggingface_hub is not installed, or ``repo_id`` is not a valid name.
            OSError: the hub cannot be reached, or refuses.
        """
        config = {"upsampler": self.name, **self.config()}
        return push_to_hub(self.save_pretrained, config, run, repo_id, **options)

    @classmethod
    def from_pretrained(cls: type[AnyUpsampler], folder: str | Path) -> AnyUpsampler:
        """Rebuild an upsampler that :meth:`save_pretrained` wrote; in eval mode.

        Args:
            folder: a local folder with ``config.json`` and ``model.safetensors``, or the name of
                a model repository on the Hugging Face hub (needs ``huggingface_hub``).

        Raises:
            FileNotFoundError: the folder, or one of its two files, does not exist.
            ValueError: the folder contains another upsampler, arguments out of range, or tensors
                that do not fit or are not finite.
        """
        return load_pretrained(cls, folder, UPSAMPLERS)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Every way of loading weights calls this method before any weight is changed.
        own = {name: one for name, one in state_dict.items() if name.startswith(prefix)}
        check_values(f"weights of {type(self).__name__}", own, magnitudes=self.magnitudes)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


UPSAMPLERS = Registry[type[Upsampler]]("upsampler")
"""Upsampler classes by name; ``@UPSAMPLERS.register`` adds a class where it is defined."""

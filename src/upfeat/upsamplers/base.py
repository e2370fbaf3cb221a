"""The contract of upsamplers: linear in the features, with weights from the image alone.

up(F) = K(g)·M(F) + o, where K(g) are per-pixel weights made from the guidance g, M a map of the
channels of one cell, and o a constant per channel. So M runs on the coarse grid, a linear head
applied to the coarse features gives what it would give after upsampling, and K(g) serves every
backbone, layer and block of channels that goes with one image.

An upsampler may add what the image alone says, D(g), a few maps on a coarse grid times a basis of
channels. A head then applies to the basis, so all of the above still holds; :class:`Head` says how
it applies to features, to a basis and to a constant.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from upfeat.backends import dispatch
from upfeat.normalization import Colour, Normalization, Normalized
from upfeat.registry import Registry
from upfeat.sharing import CARD_FILE, model_card, push_to_hub, read_record
from upfeat.storage import write_bytes, write_tensors
from upfeat.tensor_checks import check_values
from upfeat.types import Size, Window
from upfeat.upsamplers.checks import check_hidden, check_inputs
from upfeat.upsamplers.head import Head, add_offset, apply_head
from upfeat.upsamplers.maps import Map
from upfeat.upsamplers.saved import CONFIG_FILE, WEIGHTS_FILE, load_pretrained

AnyUpsampler = TypeVar("AnyUpsampler", bound="Upsampler")


class Kernels(Protocol):
    """Per-pixel upsampling weights of one guidance, ready for any features on its grid."""

    def __call__(self, features: Any) -> Tensor:
        """(B, C, h, w) -> (B, C, H, W), any C, or as :meth:`Upsampler.precompute` gives it."""
        ...

    def crop(self, features: Any, window: Window) -> Tensor:
        """The window of what :meth:`__call__` gives, computed alone.

        (B, C, h, w) -> (B, C, window.height, window.width).
        """
        ...


class Upsampler(nn.Module, ABC):
    """Features on a coarse grid and an image in, features at any size out.

    Subclasses give :meth:`prepare`, and :meth:`mix` and :attr:`offset` where they change channels.
    ``config()`` holds what the constructor needs; :meth:`save_pretrained` writes it down.
    """

    name: ClassVar[str]
    """The name by which ``upfeat.load(upsampler=…)`` finds the class."""
    linear: ClassVar[bool] = True
    """True if anything may be upsampled in place of the features, such as a head's output."""
    unsaved: ClassVar[frozenset[str]] = frozenset({"backend", "start"})
    """Arguments of constructors that no file may give: where to compute, what else to read."""
    always_small: ClassVar[bool] = False
    """True if no arguments make it larger than some hundred megabytes."""
    magnitudes: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Smallest and largest magnitude of parameters that make sense, by the last part of a name."""
    takes_hidden: ClassVar[bool] = False
    """True if it makes use of what early layers of a backbone say."""
    wants_hidden: ClassVar[bool] = False
    """True if it was trained to: models that hold it show it the early layers unasked."""
    needs_features: ClassVar[bool] = False
    """True if the weights depend on the features too, not on the image alone."""
    exact_parts: ClassVar[str] = "windows"
    """Parts of a map that have the very sums of the whole: its "windows", or its "channels"."""
    guidance_bands: int | None = 3
    """The number of bands of the guidance; ``None``: any (:mod:`.bands` has the rule)."""
    backend: str = "auto"
    """The backend that every operator runs on; see :meth:`set_backend`."""
    mean: Colour | None = None
    """Mean that the guidance is normalised by, RGB in [0, 1]; ``None``: the backbone's own."""
    std: Colour | None = None
    """Standard deviation that it is normalised by, likewise."""
    published_by: ClassVar[str | None] = None
    """The repository that published the weights, where the package has none."""
    origin: str | None = None
    """The kind of file that it was loaded from; ``None`` where there was none."""

    @property
    def reach(self) -> int | None:
        """Cells beyond its own that an output pixel depends on, at most; ``None``: the whole image.

        Through features and guidance alike, where both guidance and output have 4 or more pixels a
        cell. A window of a map (:meth:`render`) is that of the whole map anyway. A tile of an image
        with as many cells around it, upsampled as an image of its own, is the same as in the whole
        image if :attr:`step` divides its sides, those of the image, and the place where it begins.
        Guidance that is not three bands is first evened over the whole image.
        """
        return None

    @property
    def step(self) -> int:
        """Cells: tiles that begin and end at multiples of it can be images of their own.

        See :attr:`reach`.
        """
        return 1

    def set_backend(self, backend: str) -> None:
        """Choose the backend of every operator, for weights, sums, windows and training alike.

        Args:
            backend: "auto" takes the fastest that can run and says at DEBUG level which; any other
                is the only one that runs, or raises; see :mod:`upfeat.functional`.

        Raises:
            ValueError: there is no backend of that name, or it has none of these operators.
        """
        dispatch.check_name(backend)
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = backend  # pyright: ignore[reportArgumentType]

    @property
    def normalization(self) -> Normalization | None:
        """Mean and std together; ``None`` for the backbone's own."""
        if self.mean is None or self.std is None:
            return None
        return Normalization(self.mean, self.std)

    def guidance_from(self, x: Tensor, source: Normalized) -> Tensor:
        """Bring an image from a backbone's normalisation into the upsampler's.

        Args:
            x: (B, 3, H, W), normalised for the backbone; of other numbers of bands as it is.
            source: the backbone.

        Returns:
            ``x`` itself where both agree; otherwise (B, 3, H, W) of its dtype.
        """
        own = self.normalization
        if own is None or x.shape[1] != 3:  # other bands are put on one footing by their values
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
            guidance: (B, 3, H, W) normalised image, or of :attr:`guidance_bands`.
            grid_size: (h, w) of the features to come.
            output_size: (height, width) of the result.
            features: (B, C, h, w), the image's own; only upsamplers with :attr:`needs_features`
                look at them, and they need them.
        """

    def prepare_with(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Kernels:
        """As :meth:`prepare`, given what early layers of the backbone say of the image.

        Args:
            guidance: as there.
            grid_size: likewise.
            output_size: likewise.
            features: likewise.
            hidden: (B, D, h', w'), a grid finer than that of the features; ``None`` for none.

        Raises:
            ValueError: the upsampler makes no use of it.
        """
        if hidden is not None:
            raise ValueError(f"{self.name} makes no use of hidden; leave it out, or take detail")
        return self.prepare(guidance, grid_size, output_size, features)

    @property
    def means_halo(self) -> int | None:
        """Cells around a tile that its image must show where means are shared; ``None``: no means.

        Those of a large image are made by :meth:`cell_means` and used by :meth:`prepare_tile`. A
        multiple or a part of :attr:`step`.
        """
        return None

    def cell_means(self, guidance: Tensor, grid_size: Size, cells: Window) -> Tensor:
        """Means over cells that tiles of a large image look at far beyond themselves.

        Made once for each cell of the large image, they are given to :meth:`prepare_tile` of every
        tile that sees the cell.

        Args:
            guidance: (B, 3, H, W), a part of the image.
            grid_size: (h, w) cells of that part.
            cells: of them, those at least :attr:`means_halo` from ends that are not the image's.

        Returns:
            (B, D, f·cells.height, f·cells.width) for a factor f of the upsampler.
        """
        raise NotImplementedError(f"{type(self).__name__} has no means; see means_halo")

    def prepare_tile(
        self, guidance: Tensor, grid_size: Size, features: Tensor, means: Tensor | None
    ) -> Kernels:
        """Make the weights of a tile at the size of its image, as :meth:`prepare` does.

        Args:
            guidance: (B, 3, H, W); with means, of no effect farther than :attr:`means_halo` from
                the pixels that are asked for.
            grid_size: (h, w).
            features: (B, C, h, w).
            means: of all cells of the tile, as :meth:`cell_means` gives them; ``None`` where
                :attr:`means_halo` is.
        """
        del means
        size = (guidance.shape[2], guidance.shape[3])
        return self.prepare(guidance, grid_size, size, features)

    def mix(self, features: Tensor) -> Tensor:
        """The map of each cell's channels, (B, C, h, w) -> (B, C, h, w). Here the identity."""
        return features

    @property
    def offset(self) -> Tensor | None:
        """Constant added to every output pixel, (C,), or ``None``."""
        return None

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
                :attr:`mean` and :attr:`std`; :class:`upfeat.FeatUp` brings it there by itself.
                Where :attr:`guidance_bands` is ``None``, any number of bands, in any units.
            output_size: (height, width) of the result in pixels; ``None`` for the guidance's.
            hidden: (B, D, h', w'), what early layers of the backbone say of the image, as
                :meth:`upfeat.Backbone.with_hidden` gives it, for upsamplers with
                :attr:`takes_hidden`; ``None`` for none.

        Returns:
            (B, C, *output_size).

        Raises:
            ValueError: shapes or batch sizes disagree, or the features hold NaN or infinity.
        """
        size = check_inputs(features, guidance, output_size, self.guidance_bands)
        grid = (features.shape[2], features.shape[3])
        check_hidden(hidden, features)
        kernels = self.prepare_with(guidance, grid, size, features, hidden)
        return self.render(kernels, self.mix(features))

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
            kernels: of the image, from :meth:`prepare`.
            mixed: (B, C, h, w), the coarse features after :meth:`mix`.
            head: a :class:`Head`; or its weight alone, (K, C), applied before upsampling with the
                same result; or a range of channels; ``None`` for all channels as they are.
            window: of the output; ``None`` for all of it.

        Returns:
            (B, K or C, height, width).
        """
        head = Head.of(head)
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
        """As :meth:`render`, without the constant; ``head`` may be (B, K, C) too."""
        coarse = apply_head(mixed, head)
        return kernels(coarse) if window is None else kernels.crop(coarse, window)

    def precompute(self, kernels: Kernels, mixed: Tensor) -> tuple[Kernels, Tensor | Map]:
        """Precompute everything that does not depend on the window.

        Args:
            kernels: of the image, from :meth:`prepare`.
            mixed: (B, C, h, w), the coarse features after :meth:`mix`.

        Returns:
            Kernels and features of which :meth:`render` gives the same, with any head and window.
            Here those that were given.
        """
        return kernels, mixed

    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this upsampler, as JSON values."""
        return {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``, made if need be.

        Raises:
            OSError: the folder cannot be written.
            ValueError: a weight is NaN or infinite.
        """
        folder = Path(folder)
        state = {key: value.contiguous() for key, value in self.state_dict().items()}
        check_values(f"{folder}: not written", state, magnitudes=self.magnitudes)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS_FILE, state, {"upsampler": self.name})
        config = {"upsampler": self.name, **self.config()}
        if self.mean is not None and self.std is not None:
            config |= {"mean": list(self.mean), "std": list(self.std)}
        write_bytes(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())

    def push_to_hub(self, repo_id: str, *, run: str | Path | None = None, **options: Any) -> str:
        """Put the upsampler on the Hugging Face hub, with a model card; needs ``huggingface_hub``.

        Args:
            repo_id: "owner/name"; :meth:`from_pretrained` takes it.
            run: folder of the training that made it, whose settings, versions and scores go into
                the card; ``None`` for none.
            **options: of ``huggingface_hub.ModelHubMixin.push_to_hub``, as ``private``, ``token``,
                ``branch``, ``commit_message``.

        Returns:
            The address of the commit.

        Raises:
            FileNotFoundError: ``run`` is no folder of a training.
            ValueError: huggingface_hub is not installed, or the name is none.
            OSError: the hub is out of reach, or refuses.
        """
        record = {} if run is None else read_record(Path(run))

        def save(folder: Path) -> None:
            self.save_pretrained(folder)
            card = model_card({"upsampler": self.name, **self.config()}, record, repo_id)
            write_bytes(folder / CARD_FILE, card.encode())

        return push_to_hub(save, repo_id, **options)

    @classmethod
    def from_pretrained(cls: type[AnyUpsampler], folder: str | Path) -> AnyUpsampler:
        """Rebuild an upsampler that :meth:`save_pretrained` wrote; in eval mode.

        Args:
            folder: a local folder with ``config.json`` and ``model.safetensors``, or the name of
                a model repository on the Hugging Face hub (needs ``huggingface_hub``).

        Raises:
            FileNotFoundError: the folder, or one of its two files, is not there.
            ValueError: it holds another upsampler, arguments out of range, or tensors that do not
                fit or are not finite.
        """
        return load_pretrained(cls, folder, UPSAMPLERS)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Every way of loading weights comes by here, before any of them is changed.
        own = {name: one for name, one in state_dict.items() if name.startswith(prefix)}
        check_values(f"weights of {type(self).__name__}", own, magnitudes=self.magnitudes)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


UPSAMPLERS = Registry[type[Upsampler]]("upsampler")
"""Classes by name; one registers where it is defined, by ``@UPSAMPLERS.register``."""


def cells_of_pixels(pixels: int) -> int:
    """Cells that so many pixels touch at most, where cells are 4 or more pixels wide."""
    return -(-pixels // 4)

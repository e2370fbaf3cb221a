"""Dense features of CLIP and SigLIP, in the same space as the models' embeddings of texts.

An image tower returns one vector for a whole image: its last attention combines the patches. If
that attention is left out (MaskCLIP: Zhou, Loy and Dai, Extract Free Dense Labels from CLIP, 2022),
every patch keeps the value that it would have contributed, which is in the space of the vector and
can be compared with embeddings of texts. For CLIP this is the last block's value projection; for
SigLIP it is the output of the pooling head applied to a single patch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.backbones import Backbone
from upfeat.backbones.libraries import import_library, quiet
from upfeat.backbones.open_clip import load_open_clip
from upfeat.backbones.patches import Patches
from upfeat.backbones.pretrained import load_transformers
from upfeat.backbones.transformers import remove_recorders
from upfeat.bounds import shown
from upfeat.normalization import HALF, Normalization

CLIP = Normalization((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Normalisation of CLIP's images."""

TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a close-up photo of a {}.",
    "a photo of many {}.",
    "there is a {} in the scene.",
)
"""Sentences for a class's name in place of "{}"; their mean is more reliable than each alone."""


def load_text_backbone(
    model: str | nn.Module,
    tokenizer: Callable[..., Any] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> TextBackbone:
    """Load a model of images and texts as a backbone whose features can be compared with texts.

    Args:
        model: "hf:ID" or "hf:FOLDER" (CLIP and SigLIP of transformers), "open_clip:NAME/TAG", or a
            loaded model: transformers' ``CLIPModel``, ``SiglipModel`` or ``Siglip2Model``, or
            open_clip's ``CLIP``.
        tokenizer: tokenizer of a loaded model; without it, texts cannot be encoded. ``None`` for
            the tokenizer of a model given by name, which is loaded with it.
        mean: mean of each channel with which images are normalised, RGB in [0, 1]; ``None`` for the
            model's.
        std: standard deviation of each channel; ``None`` for the model's.

    Raises:
        FileNotFoundError: there is no such folder, or a download fails.
        ValueError: the model is of another kind, its package is not installed, or it cannot be
            loaded.

    For an example see docs/guides/text.md.
    """
    name = None
    if isinstance(model, str):
        name = model
        model, tokenizer, found = _load_named(model, tokenizer)
        mean, std = mean or (found and found.mean), std or (found and found.std)
    return TextBackbone(model, tokenizer, name=name, mean=mean, std=std)


class TextBackbone(Backbone):
    """CLIP or SigLIP as a backbone: dense features of images and embeddings of texts in one space.

    The model is frozen, in eval mode. Position embeddings are interpolated to the image's grid.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[..., Any] | None = None,
        *,
        name: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        """Wrap a model; see :func:`load_text_backbone`.

        Raises:
            ValueError: the model's structure is not supported.
        """
        tower = _tower(model)
        super().__init__(
            name=name or type(model).__name__,
            embed_dim=tower.embed_dim(model),
            stride=tower.patch(model),
            mean=mean or tower.normalization(model).mean,
            std=std or tower.normalization(model).std,
        )
        self.model, self.tokenizer = model, tokenizer
        self._tower = tower
        self.eval().requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled."""
        remove_recorders(self.model)
        return dict(self.__dict__)

    def extract(self, x: Tensor) -> Tensor:
        """See :meth:`Backbone.extract`."""
        weight = next(self.model.parameters())
        tokens = self._tower.patches(self.model, x.to(weight.dtype))  # (B, N, C)
        grid = x.shape[2] // self.stride, x.shape[3] // self.stride
        return tokens.mT.unflatten(2, grid).to(x.dtype)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], templates: Sequence[str] = ("{}",)) -> Tensor:
        """Encode texts as vectors in the space of the features.

        Args:
            prompts: K texts; with ``templates``, names of classes.
            templates: sentences with "{}" in place of the prompt, such as :data:`TEMPLATES`; the
                vector of a prompt is the mean over templates.

        Returns:
            (K, C), rows of unit length.

        Raises:
            ValueError: there are no prompts, a template has no "{}", or there is no tokenizer.
        """
        texts = isinstance(prompts, Sequence) and all(isinstance(one, str) for one in prompts)
        if isinstance(prompts, str) or not texts or not prompts:
            raise ValueError(f"prompts={shown(prompts)} must be one or more texts, in a list")
        if not templates or not all("{}" in template for template in templates):
            raise ValueError(
                f'templates={shown(templates)} must each have a place "{{}}" for a prompt'
            )
        if self.tokenizer is None:
            raise ValueError(f"{self.name} was given without tokenizer=, which encode_text needs")
        # replace, not format: other braces are part of the text.
        texts = [template.replace("{}", one) for one in prompts for template in templates]
        vectors = F.normalize(self._tower.texts(self.model, self.tokenizer, texts).float(), dim=1)
        return F.normalize(vectors.unflatten(0, (len(prompts), -1)).mean(1), dim=1)


class _Clip:
    """Access to the parts of transformers' CLIP."""

    @staticmethod
    def embed_dim(model: Any) -> int:
        return model.config.projection_dim

    @staticmethod
    def patch(model: Any) -> int:
        return model.config.vision_config.patch_size

    @staticmethod
    def normalization(model: Any) -> Normalization:
        return CLIP

    @staticmethod
    def patches(model: Any, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, C): the last attention's values, projected to the texts' space."""
        tower = model.vision_model
        out = tower(x, interpolate_pos_encoding=True, output_hidden_states=True)
        last, before = tower.encoder.layers[-1], out.hidden_states[-2][:, 1:]
        values = last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(before)))
        return model.visual_projection(tower.post_layernorm(values))

    @staticmethod
    def texts(model: Any, tokenizer: Callable[..., Any], texts: list[str]) -> Tensor:
        """K texts -> (K, C)."""
        # SigLIP was trained on padded texts of one length, and the last token represents the text.
        padding = "max_length" if "siglip" in model.config.model_type else True
        # Not every tokenizer knows the length; without it, such a one neither pads nor truncates.
        length = model.config.text_config.max_position_embeddings
        tokens = tokenizer(
            texts, padding=padding, truncation=True, max_length=length, return_tensors="pt"
        )
        device = next(model.parameters()).device
        out = model.get_text_features(**{name: value.to(device) for name, value in tokens.items()})
        return out if isinstance(out, Tensor) else out.pooler_output


class _Siglip(_Clip):
    """Access to the parts of transformers' SigLIP, whose pooling head attends to the patches."""

    @staticmethod
    def embed_dim(model: Any) -> int:
        return model.config.vision_config.hidden_size

    @staticmethod
    def normalization(model: Any) -> Normalization:
        return HALF

    @staticmethod
    def patches(model: Any, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, C): the pooling head, applied to each patch alone."""
        tower = model.vision_model
        needed = Patches.needed(tower, inspect.signature(tower.forward).parameters)
        if needed is None:
            tokens = tower(x, interpolate_pos_encoding=True).last_hidden_state
        else:  # SigLIP2 NaFlex
            patches, beside = Patches(tower, needed).given(x)
            tokens = tower(patches, **beside).last_hidden_state
        attention = tower.head.attention
        values = attention.out_proj(_value_projection(attention, tokens))
        return values + tower.head.mlp(tower.head.layernorm(values))


class _OpenClip:
    """Access to the parts of open_clip's CLIP with open_clip's own vision transformer."""

    @staticmethod
    def embed_dim(model: Any) -> int:
        return model.visual.proj.shape[1]

    @staticmethod
    def patch(model: Any) -> int:
        return model.visual.conv1.kernel_size[0]

    @staticmethod
    def normalization(model: Any) -> Normalization:
        mean, std = (getattr(model.visual, name, None) for name in ("image_mean", "image_std"))
        return Normalization(tuple(mean), tuple(std)) if mean and std else CLIP

    @staticmethod
    def patches(model: Any, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, C): the last attention's values, projected to the texts' space."""
        tower = model.visual
        grid = tower.conv1(x)  # (B, width, h, w)
        tokens = grid.flatten(2).mT
        first = tower.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        tokens = torch.cat([first, tokens], 1)
        tokens = tower.ln_pre(tokens + _positions(tower.positional_embedding, grid))
        batch_first = getattr(tower.transformer, "batch_first", False)
        tokens = tokens if batch_first else tokens.transpose(0, 1)
        for block in tower.transformer.resblocks[:-1]:
            tokens = block(tokens)
        tokens = tokens if batch_first else tokens.transpose(0, 1)
        last = tower.transformer.resblocks[-1]
        values = _value_projection(last.attn, last.ln_1(tokens[:, 1:]))
        return tower.ln_post(last.ls_1(last.attn.out_proj(values))) @ tower.proj

    @staticmethod
    def texts(model: Any, tokenizer: Callable[..., Any], texts: list[str]) -> Tensor:
        """K texts -> (K, C)."""
        return model.encode_text(tokenizer(texts).to(next(model.parameters()).device))


def _value_projection(attention: Any, tokens: Tensor) -> Tensor:
    """Compute the values of ``nn.MultiheadAttention``, before its output projection."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    width = attention.embed_dim
    return F.linear(tokens, weight[2 * width :], None if bias is None else bias[2 * width :])


def _positions(embedding: Tensor, grid: Tensor) -> Tensor:
    """Interpolate position embeddings of a square grid, (1 + N, C), to (1 + h·w, C).

    Args:
        embedding: embeddings of the class token and of N patches.
        grid: tensor (…, h, w) whose grid is the target.
    """
    height, width = grid.shape[2:]
    side = round((len(embedding) - 1) ** 0.5)
    if (height, width) == (side, side):
        return embedding
    square = embedding[1:].T.unflatten(1, (side, side))[None].float()
    resized = F.interpolate(
        square, size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )
    return torch.cat([embedding[:1], resized[0].flatten(1).T.to(embedding.dtype)])


def _tower(model: Any) -> Any:
    """Choose the class with access to a model's parts, by the model's structure.

    Raises:
        ValueError: the structure is not supported.
    """
    vision = getattr(model, "vision_model", None)
    if vision is not None and hasattr(model, "get_text_features"):
        if hasattr(model, "visual_projection") and hasattr(vision, "post_layernorm"):
            return _Clip
        if hasattr(getattr(vision, "head", None), "attention"):
            return _Siglip
    visual = getattr(model, "visual", None)
    known = ("conv1", "class_embedding", "transformer", "proj")
    pooled = getattr(visual, "attn_pool", None) is not None
    if not pooled and all(getattr(visual, part, None) is not None for part in known):
        return _OpenClip
    raise ValueError(
        f"model is a {type(model).__name__}, of which no dense features in the space of its texts "
        "are known; give transformers' CLIPModel, SiglipModel or Siglip2Model, or open_clip's CLIP "
        "with a vision transformer"
    )


def _load_named(
    name: str, tokenizer: Callable[..., Any] | None
) -> tuple[nn.Module, Callable[..., Any], Normalization | None]:
    source, _, rest = name.partition(":")
    if source not in ("hf", "open_clip") or not rest:
        raise ValueError(f'model="{name}" must be "hf:ID", "hf:FOLDER" or "open_clip:NAME/TAG"')
    if source == "open_clip":
        model = load_open_clip(rest, pretrained=True, whole=True)
        library = import_library("open_clip", extra="open_clip")
        return model, tokenizer or library.get_tokenizer(rest.partition("/")[0]), None
    model, settings = load_transformers(rest, pretrained=True, whole=True)
    _tower(model)  # models of other kinds have no tokenizer to load
    tokenizer = tokenizer or _load_tokenizer(rest)
    return model, tokenizer, Normalization(settings.mean, settings.std)


def _load_tokenizer(source: str) -> Callable[..., Any]:
    library = import_library("transformers", extra="transformers")
    try:
        with quiet():
            made = library.AutoTokenizer.from_pretrained(
                str(Path(source).expanduser()),
                trust_remote_code=False,  # without it, asked on the terminal
            )
            alike = made("cat")["input_ids"] == made("dog")["input_ids"]
    except Exception as error:  # libraries of tokenizers raise errors of any kind
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"hf:{source}: its tokenizer cannot be loaded: {reason}") from None
    if alike:  # transformers makes an empty tokenizer if there are no files of one
        raise ValueError(
            f"hf:{source}: its tokenizer tells no texts apart; put its files (tokenizer.json, or "
            "vocab.json and merges.txt) beside the weights, or give tokenizer="
        )
    return made

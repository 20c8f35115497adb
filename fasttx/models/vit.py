"""The vision transformer: an image as a sequence of patches.

Dosovitskiy et al. 2021, "An image is worth 16x16 words: transformers for image recognition at scale".
"""

import copy
import dataclasses

import torch
from torch import Tensor

from fasttx import autocast, checks, functional
from fasttx.nn import LayerNorm, LinearCrossEntropy, TransformerEncoder, TransformerEncoderLayer

from ._config import Config
from ._layers import Linear, draw_weights, require_layer, require_sizes
from ._model import Model

POOLS = ("class", "mean")


@dataclasses.dataclass(frozen=True)
class ViTConfig(Config):
    """A vision transformer's sizes.

    image_size and patch_size: the side of a square, or (height, width), in pixels. classes: 0: no head. feed_forward:
    4 * width where None. pool: what is classified, "class": a token of its own, or "mean": the mean of all patches.
    init_std: as BertConfig's.
    """

    image_size: int | tuple[int, int]
    patch_size: int | tuple[int, int]
    width: int
    layers: int
    heads: int
    classes: int = 0
    channels: int = 1
    feed_forward: int | None = None
    dropout: float = 0.0
    pool: str = "class"
    eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size"):
            object.__setattr__(self, name, _sides(name, getattr(self, name)))
        super().__post_init__()
        require_layer(self)
        require_sizes(self, "layers", "channels")
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {self.pool!r}")
        self.grid_of(*self.image_size)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """How many patches an image has, down and across. Raises ValueError where they do not cover it."""
        down, across = self.patch_size
        if height < down or width < across or height % down or width % across:
            raise ValueError(f"an image of {height} x {width} is no whole number of patches of {down} x {across}")
        return height // down, width // across


class ViT(Model):
    """A linear projection of flattened patches, learned positions, a pre-norm encoder, and a head.

    Images of another size than the config's get positions interpolated between those that were learned.
    """

    Config = ViTConfig
    config: ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        down, across = config.grid_of(*config.image_size)
        pixels = config.channels * config.patch_size[0] * config.patch_size[1]
        self.patch_projection = Linear(pixels, config.width)
        self.position_weight = torch.nn.Parameter(torch.empty(down * across, config.width))
        # Its position is a part of it.
        token = torch.nn.Parameter(torch.empty(1, config.width)) if config.pool == "class" else None
        self.register_parameter("class_token", token)
        self.dropout = torch.nn.Dropout(config.dropout)
        layer = TransformerEncoderLayer(
            config.width, config.heads, config.feed_forward or 4 * config.width, config.dropout, "gelu",
            layer_norm_eps=config.eps, batch_first=True, norm_first=True,
        )  # fmt: skip
        norm = LayerNorm(config.width, eps=config.eps)
        self.encoder = TransformerEncoder(layer, config.layers, norm, enable_nested_tensor=False)
        self.head = LinearCrossEntropy(config.width, config.classes) if config.classes else None
        draw_weights(self, config.init_std)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) in the model's dtype -> the logits (B, classes).

        Raises TypeError for images that are not floating, ValueError for other channels, an empty batch, sides that are
        no multiples of the patch's, and a model without a head.
        """
        self._require_head()
        return self.head.logits(self.pooled(self.features(images)))

    def features(self, images: Tensor) -> Tensor:
        """The hidden states (B, tokens, width): the class token's first, where there is one, then each patch's by rows.

        Raises as forward.
        """
        grid = self._require_images(images)
        x = self.patch_projection(self._patches(images, grid)) + self._positions(grid)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(len(x), 1, -1), x), 1)
        return self.encoder(self.dropout(x))

    def pooled(self, features: Tensor) -> Tensor:
        """What is classified: (B, tokens, width) -> (B, width)."""
        return features.mean(1) if self.class_token is None else features[:, 0]

    def loss(self, images: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The mean cross-entropy; labels (B,) classes, or -100 to ignore an image. Raises as forward."""
        self._require_head()
        return functional.linear_cross_entropy(
            self.pooled(self.features(images)), self.head.weight, labels, self.head.bias,
            label_smoothing=label_smoothing,
        )  # fmt: skip

    def resize(self, image_size: int | tuple[int, int]) -> "ViT":
        """A copy of the model for images of another size, with positions interpolated for good."""
        config = dataclasses.replace(self.config, image_size=image_size)
        positions = self._positions(config.grid_of(*config.image_size)).detach().clone()
        resized = copy.deepcopy(self)
        resized.config = config
        resized.position_weight = torch.nn.Parameter(positions, self.position_weight.requires_grad)
        return resized

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """The patches' positions (patches, width), interpolated bicubically to another grid than the config's."""
        learned = self.config.grid_of(*self.config.image_size)
        if grid == learned:
            return self.position_weight
        plane = self.position_weight.T.reshape(1, -1, *learned)
        resized = torch.nn.functional.interpolate(plane, grid, mode="bicubic", align_corners=False)
        return resized.flatten(2)[0].T.contiguous()

    def _patches(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, C, H, W) -> (B, patches, C * patch height * patch width), as the kernel of a convolution is flattened."""
        height, width = self.config.patch_size
        batch, channels = images.shape[:2]
        split = images.reshape(batch, channels, grid[0], height, grid[1], width)
        return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid[0] * grid[1], channels * height * width)

    def _require_head(self) -> None:
        if self.head is None:
            raise ValueError("this ViT has no head: its config's classes are 0")

    def _require_images(self, images: object) -> tuple[int, int]:
        """The images' grid; raises for what are none."""
        checks.require_tensor("images", images)
        if not images.is_floating_point():
            raise TypeError(f"images must be floating, got {images.dtype}: integers from 0 to 255 are images / 255")
        dtype = self.patch_projection.weight.dtype
        if images.dtype != dtype and not autocast.acts_on(images):
            raise TypeError(f"images must be {dtype}, as the model, got {images.dtype}")
        if images.dim() != 4 or images.shape[1] != self.config.channels:
            raise ValueError(
                f"images must be (images, {self.config.channels} channels, height, width), got {checks.shape(images)}"
            )
        if len(images) == 0:
            raise ValueError(f"images are an empty batch: {checks.shape(images)}")
        return self.config.grid_of(*images.shape[2:])


def _sides(name: str, size: object) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(sides) != 2:
        raise TypeError(f"{name} must be an int or (height, width), got {size!r}")
    for side in sides:
        checks.require_size(name, side)
    return sides

"""The encoder: a Vision Transformer without a class token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastjepa import ops
from fastjepa.nn.block import Block
from fastjepa.nn.init import LAYER_NORM, init_weights, rescale_residuals
from fastjepa.nn.patch_embed import PatchEmbed
from fastjepa.nn.position import interpolate_positions, sincos_positions
from fastjepa.nn.stack import Stack
from fastjepa.ragged import Ragged, masks_to_ragged


class VisionTransformer(Stack):
    """Encoder with the parameter names, shapes and keywords of the official I-JEPA `VisionTransformer`.

    Shapes:
        images: [B, C, H, W] floating, H and W multiples of patch_size. Sizes other than img_size interpolate the
            position embeddings.
        masks: None; or the official form, one or a list of integer [B, K] patch indices; or a `Ragged` of patch indices
            with per_image contexts an image, in which nothing has to be cut.
        keep: int [U], rows of the tokens that would come out, packed ([B * N, D] without masks); no row twice where
            gradients are wanted.

    Returns:
        Without masks [B, N, D]. With a list [len(masks) * B, K, D], mask-major. With a `Ragged` a `Ragged` [T, D] of
        the same offsets. Only the patches that a mask keeps are embedded. With `keep` those tokens alone, [U, D]: all
        are attended to, but the last block's projection and MLP and the norm are theirs.

    Raises:
        ValueError: images or masks that do not fit.

    Source: Dosovitskiy et al. 2020 (arXiv 2010.11929); Assran et al. 2023 (arXiv 2301.08243).

    >>> encoder = vit_tiny(img_size=[32], depth=1)
    >>> encoder(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 4, 192])
    >>> encoder(torch.zeros(2, 3, 32, 32), [torch.tensor([[0, 1, 3], [1, 2, 3]])]).shape
    torch.Size([2, 3, 192])
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = (224,),
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
        init_std: float = 0.02,
        predictor_embed_dim: int | None = None,
        predictor_depth: int | None = None,
    ):
        super().__init__()
        del predictor_embed_dim, predictor_depth  # official keywords that the encoder takes and never used
        self.num_features = self.embed_dim = embed_dim
        self.num_heads = num_heads
        sizes = (img_size,) if isinstance(img_size, int) else tuple(img_size)
        self.patch_embed = PatchEmbed((sizes[0], sizes[-1]), patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.patch_embed.grid_size), requires_grad=False)
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]  # later layers drop more
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, attn_drop_rate, rate, norm_layer)
            for rate in rates
        )
        self.norm = norm_layer(embed_dim)
        init_weights(self, init_std)
        rescale_residuals(self.blocks)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in images [B, C, H, W].

        Raises:
            ValueError: images that the encoder does not take.
        """
        channels = self.patch_embed.proj.in_channels
        if images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(f"images must be [B, {channels}, H, W], got {list(images.shape)}")
        return self.patch_embed.grid(*images.shape[-2:])

    def forward(
        self, images: Tensor, masks: Tensor | Sequence[Tensor] | Ragged | None = None, keep: Tensor | None = None
    ) -> Tensor | Ragged:
        """Encode all patches, or those that the masks keep."""
        positions = interpolate_positions(self.pos_embed, self.patch_embed.grid_size, self.grid_of(images))
        patches = self.patch_embed.patches(images)  # [B, N, C * p * p]
        batch, count = patches.shape[:2]
        if masks is None:
            x = (self.patch_embed.embed(patches) + positions).flatten(0, 1)
            offsets = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * count
            x = self.run(self.blocks, self.norm, self.as_stream(x, x.dtype), offsets, count, keep)
            return x.view(batch, count, -1) if keep is None else x
        index = masks if isinstance(masks, Ragged) else masks_to_ragged(masks, batch)
        x = self.patch_embed.embed(ops.gather_tokens(patches, index).values)
        x = x + positions[0].index_select(0, index.values)
        x = self.run(self.blocks, self.norm, self.as_stream(x, x.dtype), index.offsets, index.max_length, keep)
        if keep is not None:
            return x
        return index.with_values(x) if isinstance(masks, Ragged) else x.view(index.num_sequences, -1, x.shape[-1])


def _factory(name: str, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0):
    def build(patch_size: int = 16, **kwargs) -> VisionTransformer:
        sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
        return VisionTransformer(patch_size=patch_size, **(sizes | kwargs))

    build.__name__ = build.__qualname__ = name
    build.__doc__ = (
        f"`VisionTransformer` of width {embed_dim}, {depth} layers, {num_heads} heads; keywords are passed on."
    )
    return build


vit_tiny = _factory("vit_tiny", 192, 12, 3)
vit_small = _factory("vit_small", 384, 12, 6)
vit_base = _factory("vit_base", 768, 12, 12)
vit_large = _factory("vit_large", 1024, 24, 16)
vit_huge = _factory("vit_huge", 1280, 32, 16)
vit_giant = _factory("vit_giant", 1408, 40, 16, 48 / 11)

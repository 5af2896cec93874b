"""The encoder of masked autoencoders: a plain ViT that sees the visible patches of images, or of clips, alone.

Parameter names are those of the official MAE release; for clips, of its spatiotemporal one (separable positions).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.nn.vit import NORM_EPS, Block, PatchEmbed, SpaceTimePatchEmbed, run_blocks
from zoo.ops.masking import Masking, random_masking
from zoo.ops.patches import patchify, patchify_video, unpatchify, unpatchify_video
from zoo.ops.pos_embed import sincos_2d


class MaskedEncoder(nn.Module):
    """Patch embedding, class token, positions, blocks and norm; a decoder is a subclass's business, and so are the
    initial values of class token and linear layers.

    Images have a fixed sine-cosine table `pos_embed`, class token first (MAE, arXiv 2111.06377). Clips have learned
    tables `pos_embed_spatial`, `pos_embed_temporal`, which are added, and `pos_embed_class` (arXiv 2205.09113).

    Args:
        img_size: side of the square images, in pixels.
        grad_checkpointing: recompute activations in the backward pass.
        num_frames: of clips; None: the input is images.
        tubelet_size: frames of a space-time patch.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_frames: int | None = None,
        tubelet_size: int = 2,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim, self.grad_checkpointing = embed_dim, grad_checkpointing
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.patch_embed: PatchEmbed | SpaceTimePatchEmbed
        if num_frames is None:
            self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        else:
            self.patch_embed = SpaceTimePatchEmbed(img_size, patch_size, in_chans, embed_dim, num_frames, tubelet_size)
        self.add_positions("pos_embed", embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)

    @property
    def patch_size(self) -> int:
        return self.patch_embed.patch_size

    @property
    def num_patches(self) -> int:
        return self.patch_embed.num_patches

    @property
    def num_frames(self) -> int | None:
        """Frames of a clip; None where the input is images."""
        return self.patch_embed.num_frames if isinstance(self.patch_embed, SpaceTimePatchEmbed) else None

    @property
    def patch_values(self) -> int:
        """P, the numbers of a patch."""
        return self.patch_embed.proj.weight[0].numel()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def add_positions(self, name: str, dim: int, num_prefix: int = 1) -> None:
        """Makes the parameters of a position table of width `dim`, called `name`; see :meth:`positions`.

        A fixed table is a parameter too, because the published files hold it so.
        """
        grid = self.patch_embed.grid
        if len(grid) == 2:
            table = sincos_2d(dim, grid, num_prefix)
            self.register_parameter(name, nn.Parameter(table, requires_grad=False))
            return
        for part, length in (("spatial", grid[1] * grid[2]), ("temporal", grid[0]), ("class", num_prefix)):
            if length:
                table = nn.init.trunc_normal_(torch.empty(1, length, dim), std=0.02)
                self.register_parameter(f"{name}_{part}", nn.Parameter(table))

    def positions(self, name: str = "pos_embed") -> Tensor:
        """A table (1, num_prefix + L, D) of :meth:`add_positions`, prefix first."""
        own = self._parameters
        if (table := own.get(name)) is not None:
            return table
        space, time, prefix = (own.get(f"{name}_{part}") for part in ("spatial", "temporal", "class"))
        assert space is not None
        assert time is not None
        joint = (time[:, :, None] + space[:, None]).flatten(1, 2)
        return joint if prefix is None else torch.cat([prefix, joint], dim=1)

    def to_patches(self, inputs: Tensor) -> Tensor:
        """Images (B, C, S, S), or clips (B, C, T, S, S), to patches (B, L, P)."""
        if isinstance(self.patch_embed, SpaceTimePatchEmbed):
            return patchify_video(inputs, self.patch_size, self.patch_embed.tubelet_size)
        return patchify(inputs, self.patch_size)

    def from_patches(self, patches: Tensor) -> Tensor:
        """The inverse of :meth:`to_patches`."""
        embed = self.patch_embed
        if isinstance(embed, SpaceTimePatchEmbed):
            return unpatchify_video(patches, embed.patch_size, embed.tubelet_size, embed.grid)
        return unpatchify(patches, embed.patch_size)

    def _mask(self, inputs: Tensor, mask_ratio: float, noise: Tensor | None) -> tuple[Tensor, Masking]:
        """The patches (B, L, P) of `inputs` and which of them stay."""
        self.patch_embed.check(inputs)
        if noise is None:
            noise = torch.rand(len(inputs), self.num_patches, device=inputs.device)
        elif noise.shape != (len(inputs), self.num_patches):
            raise ZooError(f"mask noise must be {(len(inputs), self.num_patches)}, not {tuple(noise.shape)}")
        return self.to_patches(inputs), random_masking(noise, mask_ratio)

    def _embed(self, patches: Tensor, positions: Tensor, first: Tensor) -> Tensor:
        """Patches (B, K, P) with their positions (B or 1, K, D), and that of the class token (1, 1, D), to tokens
        (B, 1 + K, D)."""
        x = self.patch_embed.embed_patches(patches) + positions
        return torch.cat([(self.cls_token + first).expand(x.shape[0], -1, -1), x], dim=1)

    def _encode(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Patches (B, K, P) with their rows of the position table (B or 1, K, D) to latent tokens (B, 1 + K, D)."""
        x = self._embed(patches, positions, self.positions()[:, :1])
        return self.norm(run_blocks(self.blocks, x, self.grad_checkpointing))

    def forward_features(self, inputs: Tensor) -> Tensor:
        """Encoder tokens (B, 1 + L, D) of whole images or clips, class token first, in the grid's order, normalised."""
        self.patch_embed.check(inputs)
        return self._encode(self.to_patches(inputs), self.positions()[:, 1:])

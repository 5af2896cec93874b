"""The transformer of improved and pixel MeanFlow (Geng et al. 2025, arXiv 2512.02012; Lu et al. 2026, arXiv
2601.22158): conditions enter as tokens before the patches, there is no adaLN, and one trunk carries two heads, of the
average velocity u and of the instantaneous velocity v.

The sequence is [8 class | 4 omega | 2 t_min | 2 t_max | 4 time] and the patches. Every condition token is a learned
vector plus the embedding of its condition. Blocks are pre-norm with RMSNorm, query-key norm, rotary positions and
SwiGLU, no linear layer of theirs has a bias, and their branches are scaled by gates per channel that start at zero, as
do the last layers: a new network is the zero function and each of its blocks the identity.

Parameter names are those of the official releases. The adaLN family is :mod:`zoo.nn.dit`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from zoo.errors import ZooError
from zoo.nn import vit
from zoo.nn.dit import BottleneckPatchEmbed, LabelEmbedder, RMSNorm, TimestepEmbedder, flax_to_torch
from zoo.nn.vit import init_as_linear
from zoo.ops.attention import attention
from zoo.ops.patches import unpatchify
from zoo.ops.pos_embed import apply_rope, rope_1d, rope_2d

# The condition tokens in their order, and how many there are of each.
PREFIX = {"class": 8, "omega": 4, "t_min": 2, "t_max": 2, "time": 4}
NUM_PREFIX = sum(PREFIX.values())
# Deviation of a block's weights times the root of their inputs: a variance of about 0.1 / inputs.
BLOCK_STD = 0.32

# ------------------------------------------------------------------------------------------------------------- blocks


class Attention(nn.Module):
    """Multi-head self-attention with query-key RMSNorm and rotary positions; four linear layers without bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ZooError(f"a width of {dim} cannot be shared by {num_heads} heads")
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = RMSNorm(dim // num_heads), RMSNorm(dim // num_heads)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Tokens (B, N, D) to (B, N, D); cosine and sine (N, D / heads) of each place."""
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin)
        return self.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), hidden width int(8/3 * D), rounded up to a multiple of `multiple`."""

    def __init__(self, dim: int, multiple: int = 1) -> None:
        super().__init__()
        hidden = -(-(dim * 8 // 3) // multiple) * multiple
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """x + attn_scale * attention(norm(x)), then x + mlp_scale * mlp(norm(x)); the gates (D,) start at zero."""

    def __init__(self, dim: int, num_heads: int, multiple: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.attn, self.mlp = Attention(dim, num_heads), SwiGLU(dim, multiple)
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Tokens (B, N, D) to (B, N, D)."""
        x = x + self.attn_scale * self.attn(self.norm1(x), cos, sin)
        return x + self.mlp_scale * self.mlp(self.norm2(x))


class FinalLayer(nn.Module):
    """Tokens (B, N, D) to patches (B, N, p*p*C), from zero."""

    def __init__(self, dim: int, patch_size: int, out_chans: int) -> None:
        super().__init__()
        self.norm, self.linear = RMSNorm(dim), nn.Linear(dim, patch_size**2 * out_chans)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


# ------------------------------------------------------------------------------------------------------------ network


class TokenDiT(nn.Module):
    """A transformer of average and instantaneous velocities whose conditions are tokens.

    Args:
        img_size: side of the square input in pixels (of the latent, for a latent model).
        patch_size: side of a patch.
        in_chans: channels of the input.
        embed_dim, num_heads: sizes of the transformer.
        depth: blocks from the input to an output, of which
        head_depth: belong to each head, after those that both share.
        num_classes: labels; the table has one more row, the last, for "no label".
        velocity_head: whether there is the head of v, which training wants and sampling does not.
        bottleneck: rank of the patch embedding; None for a full one.
        rope: positions turn along the "sequence" with its condition tokens (iMF), or on the "grid" of the patches
            alone (pMF).
        pos_embed: add a learned table to the whole sequence (pMF).
        mlp_multiple: the hidden width of the SwiGLU is rounded up to a multiple of it (8 in pMF-H).
        grad_checkpointing: recompute activations in the backward pass.

    Raises:
        ZooError: heads deeper than the network, no classes, or sizes that do not fit each other.
    """

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 2,
        in_chans: int = 4,
        embed_dim: int = 768,
        depth: int = 12,
        head_depth: int = 8,
        num_heads: int = 12,
        num_classes: int = 1000,
        velocity_head: bool = True,
        bottleneck: int | None = None,
        rope: Literal["sequence", "grid"] = "sequence",
        pos_embed: bool = False,
        mlp_multiple: int = 1,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= head_depth <= depth:
            raise ZooError(f"a head of {head_depth} blocks does not fit into a depth of {depth}")
        if num_classes < 1:
            raise ZooError("a transformer with class tokens wants num_classes of 1 or more")
        if rope not in ("sequence", "grid"):
            raise ZooError(f"rotary positions turn along the sequence or on the grid, not {rope!r}")
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.embed_dim, self.num_classes, self.velocity_head = embed_dim, num_classes, velocity_head
        self.grad_checkpointing = grad_checkpointing

        self.x_embedder: vit.PatchEmbed = (
            vit.PatchEmbed(img_size, patch_size, in_chans, embed_dim)
            if bottleneck is None
            else BottleneckPatchEmbed(img_size, patch_size, in_chans, embed_dim, bottleneck, bias=True)
        )
        self.h_embedder, self.omega_embedder = TimestepEmbedder(embed_dim), TimestepEmbedder(embed_dim)
        self.cfg_t_start_embedder, self.cfg_t_end_embedder = TimestepEmbedder(embed_dim), TimestepEmbedder(embed_dim)
        self.y_embedder = LabelEmbedder(num_classes, embed_dim)
        for name, count in PREFIX.items():
            self.register_parameter(f"{name}_tokens", nn.Parameter(torch.empty(1, count, embed_dim)))
        patches = self.x_embedder.num_patches
        self.pos_embed = nn.Parameter(torch.empty(1, NUM_PREFIX + patches, embed_dim)) if pos_embed else None

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(Block(embed_dim, num_heads, mlp_multiple) for _ in range(count))

        self.shared_blocks, self.u_heads = blocks(depth - head_depth), blocks(head_depth)
        self.u_final_layer = FinalLayer(embed_dim, patch_size, in_chans)
        if velocity_head:
            self.v_heads, self.v_final_layer = blocks(head_depth), FinalLayer(embed_dim, patch_size, in_chans)
        head_dim = embed_dim // num_heads
        turns = (
            rope_1d(head_dim, NUM_PREFIX + patches)
            if rope == "sequence"
            else rope_2d(head_dim, self.x_embedder.grid, NUM_PREFIX)
        )
        for name, table in zip(("rope_cos", "rope_sin"), turns, strict=True):
            self.register_buffer(name, table, persistent=False)
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self._initialize()

    def _initialize(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = (1.0 if "embedder" in name else BLOCK_STD) / module.in_features**0.5
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, nn.Conv2d):
                init_as_linear(module)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for weight in (self.y_embedder.embedding_table.weight, *(self._tokens(name) for name in PREFIX)):
            nn.init.normal_(weight, std=self.embed_dim**-0.5)
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.zeros_(self.u_final_layer.linear.weight)
        if self.velocity_head:
            nn.init.zeros_(self.v_final_layer.linear.weight)

    def _tokens(self, name: str) -> Tensor:
        return self.get_parameter(f"{name}_tokens")

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, S, S) of what a sample starts from."""
        return self.in_chans, self.img_size, self.img_size

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def trunk(self, z: Tensor, h: Tensor, omega: Tensor, t_min: Tensor, t_max: Tensor, labels: Tensor) -> Tensor:
        """What the heads share: the sequence (B, 20 + L, D) after the common blocks, of the arguments of
        :meth:`forward`."""
        embedded = {
            "class": self.y_embedder(labels),
            "omega": self.omega_embedder(1 - 1 / omega),
            "t_min": self.cfg_t_start_embedder(t_min),
            "t_max": self.cfg_t_end_embedder(t_max),
            "time": self.h_embedder(h),
        }
        patches = self.x_embedder(z)
        prefix = [(self._tokens(name) + embedded[name][:, None]).to(patches.dtype) for name in PREFIX]
        x = torch.cat([*prefix, patches], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return self._through(self.shared_blocks, x)

    def head(self, name: str, tokens: Tensor) -> Tensor:
        """The output (B, C, S, S) of the head "u" or "v" from what :meth:`trunk` gives.

        Raises:
            ZooError: the network does not have it.
        """
        if name != "u" and (name != "v" or not self.velocity_head):
            raise ZooError(f"this network has no head {name!r}; it has {'u and v' if self.velocity_head else 'u only'}")
        blocks, last = (self.u_heads, self.u_final_layer) if name == "u" else (self.v_heads, self.v_final_layer)
        tokens = self._through(blocks, tokens)
        return unpatchify(last(tokens[:, NUM_PREFIX:]), self.patch_size)

    def _through(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, self.rope_cos, self.rope_sin, use_reentrant=False)
            else:
                x = block(x, self.rope_cos, self.rope_sin)
        return x

    def velocity_from(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The velocity that a head's output stands for at z (B, C, S, S), t (B,): itself. Networks that predict
        something else say here what it means."""
        return output

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        h: Tensor,
        omega: Tensor,
        t_min: Tensor,
        t_max: Tensor,
        labels: Tensor,
        heads: str = "uv",
    ) -> tuple[Tensor, ...]:
        """Velocities (B, C, S, S) at z_t (B, C, S, S), one for each letter of `heads`.

        Args:
            t: (B,), of which only :meth:`velocity_from` knows: the transformer sees
            h: (B,), t - r.
            omega, t_min, t_max: (B,), guidance scale of 1 or more and the interval of times in which it acts.
            labels: (B,), `num_classes` for none.
        """
        tokens = self.trunk(z, h, omega, t_min, t_max, labels)
        return tuple(self.velocity_from(self.head(name, tokens), z, t) for name in heads)


# ------------------------------------------------------------------------------------------------------------ weights

_AFFINE = r"\.(?:weight|bias)"
_OFFICIAL = re.compile(
    rf"(?:{'|'.join(PREFIX)})_tokens|pos_embed|x_embedder\.proj[12]?{_AFFINE}"
    rf"|(?:h|omega|cfg_t_start|cfg_t_end)_embedder\.mlp\.[02]{_AFFINE}|y_embedder\.embedding_table\.weight"
    r"|(?:shared_blocks|[uv]_heads)\.\d+\."
    r"(?:attn_scale|mlp_scale|norm[12]\.weight|attn\.(?:[qkv]|out)_proj\.weight|attn\.[qk]_norm\.weight|mlp\.w[123]\.weight)"
    rf"|[uv]_final_layer\.(?:norm\.weight|linear{_AFFINE})"
)


def convert_token_dit(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict of iMF or pMF in the names of :class:`TokenDiT`, from flax or PyTorch, with or without
    the leading ``net``.

    The last layer of the v-head, which iMF's inference files keep without the blocks before it, is left out there;
    so is the table of rotations of pMF's PyTorch files.

    Raises:
        ZooError: a key of another layout.
    """
    state = {re.sub(r"^net[./]", "", key): value for key, value in state_dict.items()}
    if any("/" in key for key in state_dict):
        state = _from_flax(state)
    converted = {}
    for key, value in state.items():
        name = re.sub(r"\._flax_(?:linear|embedding)", "", key)
        if name == "rope_freqs":
            continue
        if not _OFFICIAL.fullmatch(name):
            raise ZooError(f"not a checkpoint of this transformer: unknown key {key!r}")
        if name.endswith("_tokens") and value.ndim == 2:
            value = value[None]
        elif name == "y_embedder.embedding_table.weight" and value.ndim == 3:
            value = value[0]
        converted[name] = value
    if not any(name.startswith("v_heads.") for name in converted):
        converted = {name: value for name, value in converted.items() if not name.startswith("v_final_layer.")}
    return converted


def _from_flax(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flax names and layouts in those of PyTorch: lists are ``blocks_3`` there, and a norm's weight is a `kernel`."""
    bare = re.compile(r"(?:.*/)?(?:[a-z_]+_tokens|pos_embed|attn_scale|mlp_scale)")  # parameters of no layer
    named = {re.sub(r"^(shared_blocks|[uv]_heads)_(\d+)/", r"\1/\2/", key): value for key, value in state.items()}
    free = {key.replace("/", "."): value for key, value in named.items() if bare.fullmatch(key)}
    layers = {key: value for key, value in named.items() if not bare.fullmatch(key)}
    return {**free, **flax_to_torch(layers)}

"""The diffusion transformer, trunk of the generation field: DiT (Peebles and Xie 2023, arXiv 2212.09748), SiT (Ma et
al. 2024, arXiv 2401.08740) and the blocks that later work put in (RMSNorm, SwiGLU, rotary positions, query-key norm,
in-context class tokens).

A network takes noised images or latents x (B, C, S, S), one or several scalar conditions (B,) such as the time, and
labels (B,), and gives (B, C_out, S, S). It does not know where the noise is: that is the path's business
(:mod:`zoo.ops.flow`). Times enter as they are: in [0, 1] for flows, 0 ... T-1 for DiT's diffusion steps.

Parameter names are those of the official releases. adaLN-zero: every gate, and the last layer, start at zero, so that
a new network is the zero function and each of its blocks the identity.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, rms_norm, silu
from torch.utils.checkpoint import checkpoint

from zoo.errors import ZooError
from zoo.nn import vit
from zoo.nn.protocol import intermediate_indices
from zoo.nn.vit import NORM_EPS, init_as_linear
from zoo.ops.attention import attention
from zoo.ops.patches import unpatchify
from zoo.ops.pos_embed import apply_rope, rope_2d, sincos_2d

TIME_FREQUENCIES, MAX_PERIOD = 256, 10_000.0


@dataclass(frozen=True)
class BlockStyle:
    """What a block is made of. The defaults are DiT's and SiT's; :data:`MODERN` is that of LightningDiT and JiT.

    Args:
        norm: "layer" is LayerNorm without affine, "rms" RMSNorm with a weight.
        mlp: "gelu_tanh" (official DiT and SiT), "gelu" (exact) or "swiglu" (hidden width 2/3 of mlp_ratio * D).
        rope: rotate queries and keys by their place in the grid.
        qk_norm: RMSNorm on the queries and keys of each head.
        shift: adaLN shifts as well as scales ("wo_shift" of LightningDiT leaves the shift out).
        swiglu_multiple: the hidden width of a swiglu is rounded up to a multiple of this.
    """

    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu_tanh", "gelu", "swiglu"] = "gelu_tanh"
    rope: bool = False
    qk_norm: bool = False
    shift: bool = True
    swiglu_multiple: int = 1

    def __post_init__(self) -> None:
        if self.norm not in ("layer", "rms") or self.mlp not in ("gelu_tanh", "gelu", "swiglu"):
            raise ZooError(f"a block has norm layer or rms and mlp gelu_tanh, gelu or swiglu, not {self}")


MODERN = BlockStyle(norm="rms", mlp="swiglu", rope=True, qk_norm=True)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; statistics in float32 at least."""

    def __init__(self, dim: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return rms_norm(wide, wide.shape[-1:], self.weight.to(wide.dtype), self.eps).to(x.dtype)


def _norm(kind: str, dim: int) -> nn.Module:
    return RMSNorm(dim) if kind == "rms" else nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)


# --------------------------------------------------------------------------------------------------------- conditions


def sinusoids(t: Tensor, dim: int = TIME_FREQUENCIES, max_period: float = MAX_PERIOD) -> Tensor:
    """[cos(t f_k) | sin(t f_k)] (B, dim) of scalars (B,), f_k = max_period^(-k / (dim/2)), in float32 at least."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    half = dim // 2
    rates = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=t.dtype) / half)
    angles = t[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedder(nn.Module):
    """A scalar condition (B,) to (B, D): sinusoids, then a two-layer SiLU MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoids(t).to(self.mlp.get_parameter("0.weight").dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,) to (B, D). With `null_class` the table has one more row, the last, which means "no label"."""

    def __init__(self, num_classes: int, dim: int, null_class: bool = True) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_class, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


# ------------------------------------------------------------------------------------------------------------- blocks


class Attention(vit.Attention):
    """Multi-head self-attention with optional query-key norm and rotary positions; dropout of the attention weights and
    of what comes out."""

    def __init__(
        self, dim: int, num_heads: int, qk_norm: bool = False, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__(dim, num_heads)
        self.attn_drop, self.proj_drop = attn_drop, proj_drop
        self.q_norm: nn.Module = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Tokens (B, N, D) to (B, N, D); `rope` is the cosine and sine (N, D / heads) of each place."""
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        # Under autocast v is in half precision, and so is the product; the sums of q and k were wider.
        q, k = q.to(v.dtype), k.to(v.dtype)
        out = attention(q, k, v, dropout=self.attn_drop if self.training else 0.0)
        return dropout(self.proj(out.transpose(1, 2).reshape(batch, length, dim)), self.proj_drop, self.training)


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with (a, b) = w12(x); hidden width int(2/3 * hidden), rounded up to a `multiple`; `drop` of the
    hidden are dropped."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, multiple: int = 1) -> None:
        super().__init__()
        hidden = math.ceil(int(hidden * 2 / 3) / multiple) * multiple
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(dropout(silu(a) * b, self.drop, self.training))


def _mlp(kind: str, dim: int, hidden: int, drop: float, multiple: int) -> nn.Module:
    if kind == "swiglu":
        return SwiGLU(dim, hidden, drop, multiple)
    gelu: Any = partial(nn.GELU, approximate="tanh" if kind == "gelu_tanh" else "none")
    return Mlp(dim, hidden, act_layer=gelu, drop=(drop, 0.0))


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """x (B, N, D) * (1 + scale) + shift, with scale and shift (B, D)."""
    factor = (1 + scale).unsqueeze(1)
    return x * factor if shift is None else torch.addcmul(shift.unsqueeze(1), x, factor)


class DiTBlock(nn.Module):
    """x + gate * attention(modulate(norm(x))), then x + gate * mlp(modulate(norm(x))); the six vectors come from the
    condition."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        style: BlockStyle = BlockStyle(),
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.shift = style.shift
        self.norm1 = _norm(style.norm, dim)
        self.attn = Attention(dim, num_heads, style.qk_norm, attn_drop, proj_drop)
        self.norm2 = _norm(style.norm, dim)
        self.mlp = _mlp(style.mlp, dim, int(dim * mlp_ratio), proj_drop, style.swiglu_multiple)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (6 if style.shift else 4) * dim))

    def forward(self, x: Tensor, c: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Tokens (B, N, D) under the condition c (B, D)."""
        parts = self.adaLN_modulation(c).chunk(6 if self.shift else 4, dim=1)
        first, second = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        x = torch.addcmul(x, first[-1].unsqueeze(1), self.attn(self._modulated(self.norm1(x), first), rope))
        return torch.addcmul(x, second[-1].unsqueeze(1), self.mlp(self._modulated(self.norm2(x), second)))

    def _modulated(self, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        return modulate(x, parts[0] if self.shift else None, parts[-2])


class FinalLayer(nn.Module):
    """Tokens (B, N, D) to patches (B, N, p*p*C) under the condition, from zero."""

    def __init__(self, dim: int, patch_size: int, out_chans: int, style: BlockStyle = BlockStyle()) -> None:
        super().__init__()
        self.shift = style.shift
        self.norm_final = _norm(style.norm, dim)
        self.linear = nn.Linear(dim, patch_size**2 * out_chans)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (2 if style.shift else 1) * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        parts = self.adaLN_modulation(c).chunk(2 if self.shift else 1, dim=1)
        return self.linear(modulate(self.norm_final(x), parts[0] if self.shift else None, parts[-1]))


class BottleneckPatchEmbed(vit.PatchEmbed):
    """A patch embedding of low rank: p x p convolution to `bottleneck` channels, then 1 x 1 with bias. The first has a
    bias in pMF, none in JiT."""

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bottleneck: int, bias: bool = False
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim)
        del self.proj
        self.proj1 = nn.Conv2d(in_chans, bottleneck, patch_size, stride=patch_size, bias=bias)
        self.proj2 = nn.Conv2d(bottleneck, embed_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        self.check(images)
        return self.proj2(self.proj1(images)).flatten(2).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------ network


class DiT(nn.Module):
    """A diffusion transformer.

    Args:
        img_size: side of the square input in pixels (of the latent, for a latent model).
        patch_size: side of a patch.
        in_chans: channels of the input.
        out_chans: channels of the output; by default those of the input (DiT with a learnt variance: twice as many).
        embed_dim, depth, num_heads, mlp_ratio: sizes of the transformer.
        num_classes: labels; 0 for an unconditional network.
        null_class: whether the label table has a last row for "no label".
        times: the names of the scalar conditions; `name` is embedded by ``{name}_embedder``.
        style: what blocks are made of.
        pos_embed: the sine-cosine table is "stored" in the state dict (as official DiT and SiT files have it), "fixed"
            (not stored), or there is "none".
        bottleneck: rank of the patch embedding; None for a full one.
        context_tokens: class tokens, prepended to the patches before block `context_start` and dropped at the end.
        attn_drop, proj_drop: dropout of attention weights, and of the attention's output and the MLP's hidden units; in
            the middle half of the blocks only (JiT, Table 9).
        grad_checkpointing: recompute activations in the backward pass.
    """

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 2,
        in_chans: int = 4,
        out_chans: int | None = None,
        embed_dim: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        null_class: bool = True,
        times: Sequence[str] = ("t",),
        style: BlockStyle = BlockStyle(),
        pos_embed: Literal["stored", "fixed", "none"] = "stored",
        bottleneck: int | None = None,
        context_tokens: int = 0,
        context_start: int = 0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        style = BlockStyle(**style) if isinstance(style, Mapping) else style  # as a checkpoint holds it
        if context_tokens and not (num_classes and 0 <= context_start < depth):
            raise ZooError("context tokens want labels (num_classes) and a context_start below depth")
        if not times or any(not name.isidentifier() for name in times):
            raise ZooError(f"a diffusion transformer wants the names of its scalar conditions, not {times!r}")
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.out_chans, self.embed_dim, self.num_classes = out_chans or in_chans, embed_dim, num_classes
        self.null_class, self.times = null_class and num_classes > 0, tuple(times)
        self.context_tokens, self.context_start = context_tokens, context_start
        self.grad_checkpointing = grad_checkpointing

        self.x_embedder: vit.PatchEmbed = (
            vit.PatchEmbed(img_size, patch_size, in_chans, embed_dim)
            if bottleneck is None
            else BottleneckPatchEmbed(img_size, patch_size, in_chans, embed_dim, bottleneck)
        )
        for name in self.times:
            setattr(self, f"{name}_embedder", TimestepEmbedder(embed_dim))
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes, embed_dim, null_class)
        grid = self.x_embedder.grid
        table = sincos_2d(embed_dim, grid) if pos_embed != "none" else None
        self.pos_embed: Tensor | None
        self.register_buffer("pos_embed", table, persistent=pos_embed == "stored")
        if context_tokens:
            self.in_context_posemb = nn.Parameter(torch.empty(1, context_tokens, embed_dim))
        if not (0 <= attn_drop < 1 and 0 <= proj_drop < 1):
            raise ZooError(f"dropout is a share in [0, 1), not attn_drop {attn_drop} or proj_drop {proj_drop}")
        middle = range(depth // 4, depth // 4 * 3)
        self.blocks = nn.ModuleList(
            DiTBlock(embed_dim, num_heads, mlp_ratio, style, *((attn_drop, proj_drop) if k in middle else ()))
            for k in range(depth)
        )
        self.final_layer = FinalLayer(embed_dim, patch_size, self.out_chans, style)
        cos, sin = rope_2d(embed_dim // num_heads, grid, context_tokens) if style.rope else (None, None)
        self.rope_cos: Tensor | None
        self.rope_sin: Tensor | None
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                init_as_linear(module)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        small = [embedder.mlp[place].weight for embedder in self.time_embedders for place in (0, 2)]
        small += [self.y_embedder.embedding_table.weight] if self.num_classes else []
        small += [self.in_context_posemb] if self.context_tokens else []
        for weight in small:
            nn.init.normal_(weight, std=0.02)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, S, S) of what a sample starts from."""
        return self.in_chans, self.img_size, self.img_size

    def example_inputs(self, count: int) -> dict[str, Any]:
        """Arguments of forward for so many samples, for an export."""
        generator = torch.Generator().manual_seed(0)
        times = [torch.rand(count, generator=generator) for _ in self.times]
        found = {
            "x": torch.randn(count, *self.noise_shape, generator=generator),
            "times": times[0] if len(times) == 1 else times,
        }
        return {**found, "labels": torch.arange(count) % self.num_classes} if self.num_classes else found

    @property
    def time_embedders(self) -> list[Any]:
        """In the order of `times`."""
        return [getattr(self, f"{name}_embedder") for name in self.times]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def condition(self, times: Tensor | Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The condition (B, D): the sum of all embeddings.

        Raises:
            ZooError: the number of scalar conditions is not that of `times`, or labels are missing or not wanted.
        """
        values = [times] if isinstance(times, Tensor) else list(times)
        if len(values) != len(self.times):
            raise ZooError(f"this network takes the conditions {', '.join(self.times)}; {len(values)} were given")
        if (labels is None) == bool(self.num_classes):
            raise ZooError("this network wants labels" if self.num_classes else "this network takes no labels")
        c = sum(embedder(value) for embedder, value in zip(self.time_embedders, values, strict=True))
        return c if labels is None else c + self.y_embedder(labels)

    def forward(self, x: Tensor, times: Tensor | Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """x (B, C, S, S), scalar conditions (B,) in the order of `times`, labels (B,) to (B, C_out, S, S)."""
        c = self.condition(times, labels)
        for x in self._states(x, c, labels):  # noqa: B007, B020 (the last one is wanted)
            pass
        return self._end(x, c)

    def forward_intermediates(
        self,
        x: Tensor,
        times: Tensor | Sequence[Tensor],
        labels: Tensor | None = None,
        indices: int | Sequence[int] | None = None,
        stop_early: bool = False,
        intermediates_only: bool = False,
    ) -> Any:
        """The output (B, C_out, S, S) as of :meth:`forward`, and the outputs (B, N, D) of blocks, in their order.

        Context tokens come first in them.

        Args:
            x, times, labels: as of :meth:`forward`.
            indices: of which blocks, negative ones from the end; the last n for a number, all for None.
            stop_early: compute no more than is asked for; only with `intermediates_only`.
            intermediates_only: the list of blocks' outputs alone, without the network's before it.

        Raises:
            ZooError: a block that is not there, or `stop_early` where the network's output is wanted too.
        """
        if stop_early and not intermediates_only:
            raise ZooError("stop_early leaves the network's output out: set intermediates_only too")
        wanted = intermediate_indices(indices, len(self.blocks), "blocks")
        c = self.condition(times, labels)
        found = []
        for index, x in enumerate(self._states(x, c, labels)):  # noqa: B020 (the last one is wanted)
            if index in wanted:
                found.append(x)
            if stop_early and index == wanted[-1]:
                break
        return found if intermediates_only else (self._end(x, c), found)

    def _states(self, x: Tensor, c: Tensor, labels: Tensor | None) -> Iterator[Tensor]:
        """The tokens after each block."""
        x = self.x_embedder(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        for index, block in enumerate(self.blocks):
            if self.context_tokens and index == self.context_start:
                context = self.y_embedder(labels).unsqueeze(1) + self.in_context_posemb
                x = torch.cat([context.to(x.dtype), x], dim=1)
            rope = self._rope(bool(self.context_tokens) and index < self.context_start)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, rope, use_reentrant=False)
            else:
                x = block(x, c, rope)
            yield x

    def _end(self, x: Tensor, c: Tensor) -> Tensor:
        return unpatchify(self.final_layer(x[:, self.context_tokens :], c), self.patch_size)

    def _rope(self, without_context: bool) -> tuple[Tensor, Tensor] | None:
        if self.rope_cos is None or self.rope_sin is None:
            return None
        first = self.context_tokens if without_context else 0
        return self.rope_cos[first:], self.rope_sin[first:]


def time_condition(state: Mapping[str, Tensor], t: float) -> Tensor:
    """The condition c (D,) that a DiT's state dict gives at one time t, with "no label" where it takes labels.

    Raises:
        KeyError: there is no embedding of time.
    """
    first, second = (f"t_embedder.mlp.{n}" for n in (0, 2))
    c = sinusoids(torch.tensor([float(t)])).to(state[f"{first}.weight"])
    c = linear(c, state[f"{first}.weight"], state[f"{first}.bias"])
    c = linear(silu(c), state[f"{second}.weight"], state[f"{second}.bias"])[0]
    table = state.get("y_embedder.embedding_table.weight")
    return c if table is None else c + table[-1]


def fold_condition(state: Mapping[str, Tensor], c: Tensor, depth: int) -> dict[str, Tensor]:
    """The first `depth` blocks of a DiT's state dict under one condition c (D,), as those of an ordinary ViT: adaLN's
    scales and shifts become those of LayerNorm, and its gates enter the projections behind them.

    For blocks with LayerNorm and shifts, whose adaLN is SiLU and one linear layer, or two with SiLU between.
    """
    found: dict[str, Tensor] = {}
    for name in (f"blocks.{n}" for n in range(depth)):
        parts = c
        for layer in ("1", "3"):
            if (key := f"{name}.adaLN_modulation.{layer}") + ".weight" in state:
                parts = linear(silu(parts), state[f"{key}.weight"], state[f"{key}.bias"])
        shift1, scale1, gate1, shift2, scale2, gate2 = parts.chunk(6)
        for norm, first, last, shift, scale, gate in (
            ("norm1", "attn.qkv", "attn.proj", shift1, scale1, gate1),
            ("norm2", "mlp.fc1", "mlp.fc2", shift2, scale2, gate2),
        ):
            found |= {f"{name}.{norm}.weight": 1 + scale, f"{name}.{norm}.bias": shift}
            found |= {f"{name}.{first}.{leaf}": state[f"{name}.{first}.{leaf}"] for leaf in ("weight", "bias")}
            found[f"{name}.{last}.weight"] = gate[:, None] * state[f"{name}.{last}.weight"]
            found[f"{name}.{last}.bias"] = gate * state[f"{name}.{last}.bias"]
    return found


# -------------------------------------------------------------------------------------------------- sizes and weights

SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "embed_dim": 384, "num_heads": 6},
    "B": {"depth": 12, "embed_dim": 768, "num_heads": 12},
    "M": {"depth": 16, "embed_dim": 1024, "num_heads": 16},
    "L": {"depth": 24, "embed_dim": 1024, "num_heads": 16},
    "XL": {"depth": 28, "embed_dim": 1152, "num_heads": 16},
}

_AFFINE = r"\.(?:weight|bias)"
_OFFICIAL = (
    rf"pos_embed|x_embedder\.proj{_AFFINE}|[TIMES]_embedder\.mlp\.[02]{_AFFINE}|y_embedder\.embedding_table\.weight"
    rf"|blocks\.\d+\.(?:attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2|adaLN_modulation\.1){_AFFINE}"
    rf"|final_layer\.(?:linear|adaLN_modulation\.1){_AFFINE}"
)


def convert_dit(state_dict: Mapping[str, Tensor], times: Sequence[str] = ("t",)) -> dict[str, Tensor]:
    """A published state dict of DiT, SiT or a descendant in the names of :class:`DiT`, which are the official ones.

    Args:
        times: the scalar conditions that the layout may have, a letter each.

    Raises:
        ZooError: a key of another layout.
    """
    known = re.compile(_OFFICIAL.replace("TIMES", "".join(times)))
    if foreign := [key for key in state_dict if not known.fullmatch(key)]:
        raise ZooError(f"not a checkpoint of this transformer: {len(foreign)} unknown keys, such as {foreign[0]!r}")
    return dict(state_dict)


_FLAX_LEAVES = {"kernel": "weight", "bias": "bias", "embedding": "weight", "scale": "weight"}


def flax_to_torch(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flax parameters by path ("blocks/layers_0/mlp/fc1/_flax_linear/kernel") in the names and layouts of torch.

    Kernels (in, out) and (H, W, in, out) become (out, in) and (out, in, H, W). The wrappers `_flax_linear`,
    `_flax_conv` and `_flax_embedding` go, and ``layers_3`` of a sequence becomes ``3``.

    Raises:
        ZooError: the last part of a path is none of kernel, bias, embedding, scale.
    """
    converted = {}
    for path, value in state_dict.items():
        *parts, leaf = path.split("/")
        if leaf not in _FLAX_LEAVES:
            raise ZooError(f"not a flax parameter: {path!r} ends in none of {', '.join(_FLAX_LEAVES)}")
        names = [re.sub(r"^layers_(\d+)$", r"\1", part) for part in parts if not part.startswith("_flax_")]
        if leaf == "kernel" and value.ndim > 1:  # that of a norm is a vector
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.transpose(0, 1)
        converted[".".join([*names, _FLAX_LEAVES[leaf]])] = value
    return converted

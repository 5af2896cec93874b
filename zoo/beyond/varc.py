"""ARC Is a Vision Problem!

Keya Hu, Ali Cy, Linlu Qiu, Xiaoman Delores Ding, Runqian Wang, Yeyin Eva Zhu, Jacob Andreas, Kaiming He. CVPR 2026,
arXiv 2511.14761.

An ARC task shows a few pairs of coloured grids and asks for the output of a new input. VARC takes it as translation of
images: grids lie on a canvas at a random scale and place, a plain ViT on 2 x 2 patches (or a U-Net) classifies every
pixel, and a learned token tells it the task. It is trained from scratch on ARC's training tasks ("offline"), and then
on each new task by itself ("test-time training"): on the demonstrations of 51 pseudo-tasks, the task with its grids
turned, flipped and recoloured. Hundreds of views of the test input are decoded and vote; the two most voted grids are
the answers.

Conventions: canvases (B, S, S) of colours 0..11 (10 background, 11 border of an output); mask (B, S, S) true on the
input grid; logits (B, 12, S, S). Tasks, canvases, pseudo-tasks and the decoding of a canvas stand in
:mod:`zoo.data.arc`, the vote and the score in :mod:`zoo.metrics.arc`, the
benchmark's protocol in :mod:`zoo.training.arc`.

Deviations from the official code, none of which changes a value but the last two:
- A pixel has one of 12 colours: embedding colours and then patches is one table a place in the patch (12 x D), looked
  up, instead of a convolution over D channels.
- A patch off the input grid is no key of any attention, and one off the output is not scored. In training, patches that
  are neither are left out of the sequence altogether; inference computes all.
- The rotary tables are one buffer, not two a layer; a checkpoint's are compared with it and dropped.
- The last of the 101 passes of test-time training has learning rate 0 (and no weight decay): it is left out.
- Offline training drops an incomplete last batch; views are drawn from (seed, epoch, index), not along one stream.
- Test-time training draws its new task tokens, order and views from (seed, task, run).
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear

from zoo.data.arc import BACKGROUND, NUM_COLORS, ARCTask, PseudoTask, Views, pseudo_tasks
from zoo.errors import MissingPackage, ZooError
from zoo.nn.vit import PatchEmbed
from zoo.ops.attention import attention
from zoo.ops.patches import patchify, unpatchify
from zoo.ops.pos_embed import apply_rope, rope_2d
from zoo.training import Optim, lr_at, make_optimizer, param_groups, seed_position
from zoo.training.arc import ARCProtocol, CanvasPrediction, predict_views, uncached_autocast
from zoo.weights.pretrained import fill, read_source

__all__ = [
    "VARCTestTimeTraining",
    "VARCTraining",
    "VARCUNet",
    "VARCUNetTestTimeTraining",
    "VARCUNetTraining",
    "VARCViT",
    "convert_official",
    "pixel_loss",
    "train_on_task",
    "varc_unet_big",
    "varc_unet_medium",
    "varc_unet_small",
    "varc_vit_6m",
    "varc_vit_18m",
    "varc_vit_66m",
]

# ------------------------------------------------------------------------------------------------------- 1. equations


def pixel_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy (Eq. 1) of logits (B, K, ...) for targets (B, ...): one mean over all scored pixels of the batch,
    those of outputs and their borders; background is not scored."""
    return cross_entropy(logits, target, ignore_index=BACKGROUND)


# --------------------------------------------------------------------------------------------------------- 2. network


class Attention(nn.Module):
    """Multi-head self-attention with rotary embedding; `dropout` on the weights and on what is returned."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if dim % num_heads:
            raise ZooError(f"embed_dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor | None) -> Tensor:
        """Tokens (B, N, D) to (B, N, D); `rope` (1 or B, 1, N, D / heads) each, `keys` (B, 1, 1, N) true where a token
        is attended to."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = apply_rope(q, *rope).to(v.dtype), apply_rope(k, *rope).to(v.dtype)
        x = attention(q, k, v, keys, self.dropout if self.training else 0.0)
        return self.drop(self.proj(x.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Post-norm transformer block: x = norm(x + attention(x)), then x = norm(x + mlp(x))."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, dropout)
        self.drop = nn.Dropout(dropout)  # the official code drops the attention's output twice
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_dim, drop=dropout)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor | None) -> Tensor:
        x = self.norm1(x + self.drop(self.attn(x, rope, keys)))
        return self.norm2(x + self.mlp(x))


class _Conditioned(nn.Module):
    """What both networks share: a table of task tokens, and the loss."""

    task_embed: nn.Embedding
    img_size: int

    def example_inputs(self, count: int) -> dict[str, Tensor]:
        """Arguments of forward for so many canvases, for an export."""
        generator = torch.Generator().manual_seed(0)
        canvas = torch.randint(NUM_COLORS, (count, self.img_size, self.img_size), generator=generator)
        return {"canvas": canvas, "task": torch.arange(count) % self.task_embed.num_embeddings}

    def reset_tasks(self, num_tasks: int) -> None:
        """Fresh tokens for `num_tasks` tasks; a table of that many is drawn anew in place."""
        if self.task_embed.num_embeddings != num_tasks:
            old = self.task_embed.weight
            self.task_embed = nn.Embedding(num_tasks, old.shape[1], device=old.device, dtype=old.dtype)
        nn.init.trunc_normal_(self.task_embed.weight, std=0.02)

    def check(self, canvas: Tensor) -> None:
        """Raises a ZooError where canvases (B, H, W) are not of this size."""
        side = self.img_size
        if canvas.shape[1:] != (side, side):
            raise ZooError(f"the model takes canvases of {side} x {side}, not {tuple(canvas.shape[1:])}")

    def loss(self, canvas: Tensor, task: Tensor, mask: Tensor | None, target: Tensor) -> Tensor:
        """:func:`pixel_loss` of canvases (B, S, S) of tasks (B,) for targets (B, S, S)."""
        return pixel_loss(self(canvas, task, mask), target)


class VARCViT(_Conditioned):
    """The Vision Transformer (section 3.3).

    Args:
        num_tasks: rows of the table of task tokens.
        img_size: side S of the canvas.
        mlp_dim: hidden width of the MLPs, 512 at every size.
        dropout: of tokens, attention weights, attention outputs (twice) and both layers of the MLPs.
        num_task_tokens: tokens a task has.
    """

    def __init__(
        self,
        num_tasks: int = 400,
        img_size: int = 64,
        patch_size: int = 2,
        embed_dim: int = 512,
        depth: int = 10,
        num_heads: int = 8,
        mlp_dim: int = 512,
        dropout: float = 0.1,
        num_colors: int = NUM_COLORS,
        num_task_tokens: int = 1,
    ) -> None:
        super().__init__()
        self.img_size, self.embed_dim = img_size, embed_dim
        self.num_colors, self.num_task_tokens = num_colors, num_task_tokens
        self.color_embed = nn.Embedding(num_colors, embed_dim)
        self.task_embed = nn.Embedding(num_tasks, embed_dim * num_task_tokens)
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim, embed_dim)
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches, embed_dim))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_dim, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_colors * patch_size**2)
        cos, sin = rope_2d(embed_dim // num_heads, self.patch_embed.grid, num_prefix=num_task_tokens)
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        for table in (self.pos_embed, self.task_embed.weight, self.color_embed.weight):
            nn.init.trunc_normal_(table, std=0.02)
        nn.init.zeros_(self.head.bias)

    def _patches(self, canvas: Tensor) -> Tensor:
        """Canvases (B, S, S) as patches (B, L, p*p)."""
        self.check(canvas)
        return patchify(canvas.unsqueeze(1), self.patch_embed.patch_size)

    def _embed(self, patches: Tensor) -> Tensor:
        """Patches (B, N, p*p) of colours to tokens (B, N, D): the convolution of the embedded colours, by tables."""
        weight = self.patch_embed.proj.weight.flatten(2)  # (D, D, p*p)
        tables = torch.einsum("cd,edi->ice", self.color_embed.weight, weight).flatten(0, 1)  # (p*p*K, D)
        place = torch.arange(patches.shape[-1], device=patches.device) * self.num_colors
        hot = torch.zeros(*patches.shape[:-1], len(tables), dtype=tables.dtype, device=patches.device)
        return linear(hot.scatter_(-1, patches + place, 1.0), tables.T, self.patch_embed.proj.bias)

    def _encode(self, patches: Tensor, task: Tensor, keys: Tensor | None, taken: Tensor | None = None) -> Tensor:
        """Patches (B, N, p*p), with the keys (B, N) among them, to the head's outputs (B, N, p*p*K); `taken` (B, N) are
        their places in the grid, all of it where left out."""
        prefix = self.num_task_tokens
        position: Tensor = self.pos_embed
        cos, sin = self.rope_cos[None], self.rope_sin[None]
        if taken is not None:
            position = embedding(taken, position[0])
            with_task = torch.cat([torch.arange(prefix, device=taken.device).expand(len(taken), -1), taken + prefix], 1)
            cos, sin = (table[0][with_task] for table in (cos, sin))
        tokens = self._embed(patches) + position
        tasks = self.task_embed(task).unflatten(-1, (prefix, -1))
        x = self.drop(torch.cat([tasks.to(tokens.dtype), tokens], dim=1))
        if keys is not None:
            keys = torch.cat([keys.new_ones(len(keys), prefix), keys], dim=1)[:, None, None]
        for block in self.blocks:
            x = block(x, (cos[:, None], sin[:, None]), keys)
        return self.head(self.norm(x[:, prefix:]))

    def forward(self, canvas: Tensor, task: Tensor, mask: Tensor | None = None) -> Tensor:
        """Canvases (B, S, S) of tasks (B,) to logits (B, K, S, S). Patches without a pixel of `mask` (B, S, S) are not
        attended to."""
        keys = None if mask is None else self._patches(mask.bool()).any(dim=-1)
        out = self._encode(self._patches(canvas), task, keys)
        return unpatchify(out, self.patch_embed.patch_size)

    def loss(self, canvas: Tensor, task: Tensor, mask: Tensor | None, target: Tensor) -> Tensor:
        """The loss of :meth:`forward`'s logits, computed for the patches that decide it."""
        if mask is None:
            return super().loss(canvas, task, mask, target)
        patches, wanted = self._patches(canvas), self._patches(target)
        keys = self._patches(mask.bool()).any(dim=-1)
        kept = keys | (wanted != BACKGROUND).any(dim=-1)
        # Every sample keeps as many as the fullest one, in steps of 16 so that few different lengths occur.
        length = min(kept.shape[1], -(-int(kept.sum(dim=1).max()) // 16) * 16)
        taken = (~kept).byte().argsort(dim=1, stable=True)[:, :length]
        whole = taken.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
        out = self._encode(patches.gather(1, whole), task, keys.gather(1, taken), taken)
        logits = out.unflatten(-1, (-1, self.num_colors)).permute(0, 3, 1, 2)
        return pixel_loss(logits, wanted.gather(1, whole))


class VARCUNet(_Conditioned):
    """The U-Net (Table 7): diffusers' UNet2DConditionModel at timestep 0, the task token its only context.

    Args:
        num_tasks: rows of the table of task tokens.
        img_size: side S of the canvas, a multiple of 4.
        embed_dim: channels of the two lower resolutions and of the token; half of it at full resolution.
        depth: residual blocks a resolution on the way down (one more on the way up).
        mid_block: blocks with attention between the ways.

    Raises:
        ZooError: diffusers is not installed.
    """

    def __init__(
        self,
        num_tasks: int = 400,
        img_size: int = 64,
        embed_dim: int = 320,
        depth: int = 2,
        num_heads: int = 8,
        mid_block: bool = True,
        num_colors: int = NUM_COLORS,
        num_task_tokens: int = 1,
    ) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DConditionModel
        except ImportError as error:
            raise MissingPackage("the U-Net of VARC wants diffusers: pip install 'paperzoo[beyond]'") from error
        if img_size % 4 or embed_dim % 20:
            raise ZooError(f"the U-Net wants img_size a multiple of 4 and embed_dim of 20: {img_size}, {embed_dim}")
        self.img_size, self.num_task_tokens = img_size, num_task_tokens
        self.color_embed = nn.Embedding(num_colors, 4)
        self.task_embed = nn.Embedding(num_tasks, embed_dim * num_task_tokens)
        self.encoder: Any = UNet2DConditionModel(
            sample_size=img_size,
            in_channels=4,
            out_channels=num_colors,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            mid_block_type="UNetMidBlock2DCrossAttn" if mid_block else None,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(embed_dim // 2, embed_dim, embed_dim),
            layers_per_block=depth,
            cross_attention_dim=embed_dim,
            attention_head_dim=num_heads,  # the number of heads: diffusers keeps a name it once got wrong
            norm_num_groups=embed_dim // 10,
        )
        for table in (self.task_embed.weight, self.color_embed.weight):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, canvas: Tensor, task: Tensor, mask: Tensor | None = None) -> Tensor:
        """Canvases (B, S, S) of tasks (B,) to logits (B, K, S, S); `mask` is not used."""
        self.check(canvas)
        context = self.task_embed(task).unflatten(-1, (self.num_task_tokens, -1))
        return self.encoder(self.color_embed(canvas).permute(0, 3, 1, 2), 0, context).sample


# ------------------------------------------------------------------------------------------------ 3. offline training

SCHEDULE = Optim(lr=3e-4, betas=(0.9, 0.999), weight_decay=0.0, interval="epoch", warmup_epochs=10)


class VARCTraining(CanvasPrediction):
    """Offline training (section 3.4) of the ViT; evaluated as :class:`~zoo.training.arc.CanvasPrediction`.

    Args:
        compile: compile the training loss with torch.compile.
        optim: optimiser and schedule.
        network: of :class:`VARCViT`; a recipe takes `img_size` and `num_tasks` from the data module.
    """

    def __init__(self, compile: bool = False, optim: Optim = SCHEDULE, **network: Any) -> None:
        super().__init__(self.make_network(**network), optim)
        self.save_hyperparameters()
        self._loss = torch.compile(self.network.loss) if compile else self.network.loss

    def make_network(self, **network: Any) -> _Conditioned:
        return VARCViT(**network)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self._loss(batch["image"], batch["task"], batch["mask"], batch["target"])


class VARCUNetTraining(VARCTraining):
    """:class:`VARCTraining` of the U-Net; `network` is of :class:`VARCUNet`."""

    def make_network(self, **network: Any) -> _Conditioned:
        return VARCUNet(**network)


# ------------------------------------------------------------------------------------------------ 4. test-time training


def train_on_task(
    network: _Conditioned,
    pseudos: Sequence[PseudoTask],
    views: Views,
    rng: random.Random,
    epochs: int,
    batch_size: int,
    optim: Optim,
    clip: float | None = 1.0,
    loss: Callable[..., Tensor] | None = None,
) -> list[float]:
    """Trains `network` on the demonstrations of pseudo-tasks, whose places are their numbers; mean loss by epoch.

    Args:
        views: how views are drawn.
        rng: draws orders and views. Dropout is the global generator's.
        epochs: passes over all demonstrations, each at a new view in a new order; the schedule of `optim` spans them.
        batch_size: samples a step; an epoch's last batch may be smaller.
        clip: largest norm of the gradients.
        loss: `network.loss` (the default), or that compiled.

    Mixed precision is that around the call; float16 has its gradients scaled.
    """
    samples = [(pair, number) for number, pseudo in enumerate(pseudos) for pair in pseudo.task.train]
    device = next(network.parameters()).device
    kind = device.type
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    scaler = torch.amp.GradScaler(kind, enabled=half)
    peak = optim.peak_lr(batch_size)
    optimizer = make_optimizer(param_groups(network, optim), optim, peak)
    losses = []
    network.train()
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(optim, epoch, epochs, peak) * group["lr_scale"]
        rng.shuffle(samples)
        total = torch.zeros((), device=device)
        for first in range(0, len(samples), batch_size):
            some = samples[first : first + batch_size]
            pairs, numbers = zip(*some, strict=True)
            batch = views.place(pairs, [views.draw(pair, rng) for pair in pairs], device)
            task = torch.tensor(numbers, device=device)
            with uncached_autocast(kind):
                value = (loss or network.loss)(batch["image"], task, batch["mask"], batch["target"])
            with torch.autocast(kind, enabled=False):
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(value).backward()
                scaler.unscale_(optimizer)
                if clip is not None:
                    nn.utils.clip_grad_norm_(network.parameters(), clip)
                scaler.step(optimizer)
                scaler.update()
            total += value.detach() * len(some)
        losses.append(float(total) / len(samples))
        if not np.isfinite(losses[-1]):
            raise ZooError(f"test-time training of {pseudos[0].task.name}: the loss is not finite in epoch {epoch}")
    return losses


class VARCTestTimeTraining(ARCProtocol):
    """Trains the ViT on every task by itself, predicts, votes, scores: :class:`~zoo.training.arc.ARCProtocol`.

    Starts each time from `init_from` with fresh task tokens, and trains for `trainer.max_epochs` epochs at
    `trainer.precision` with `trainer.gradient_clip_val`. Tasks are dealt to the devices; no result depends on how.

    Args:
        init_from: the offline training: a checkpoint of :class:`VARCTraining`, a published file, or the name of
            published weights; null trains every task from scratch (Fig. 9).
        permutations: of colours for each turned or flipped variant; 5 * (1 + permutations) + 1 pseudo-tasks.
        batch_size: samples a training step.
        views: random views of each pseudo-task at inference; without translation and at a fixed scale all are the same.
        view_batch: views computed together.
        runs: independent trainings of every task; 0 lets `votes_with` vote alone.
        scale: a fixed one instead of random ones (Fig. 7 c to e).
        translate: place grids at random (false: Fig. 7 c, d).
        blind: hide the tests' answers from everything but the score. The official code lets their size limit the views
            and their colours enter the permutations; Kaggle's hidden tests are blind of themselves.
        work_dir: where predictions are kept.
        votes_with: further folders that hold attempt_*/*_predictions.json, to vote with.
        compile: compile the training loss with torch.compile.
        optim: optimiser and schedule.
        network: of :class:`VARCViT`; a recipe takes `img_size` from the data module.
    """

    not_exported = "a network for each task; VARCTraining exports the one they start from"

    def __init__(
        self,
        init_from: str | None = None,
        permutations: int = 9,
        batch_size: int = 8,
        views: int = 10,
        view_batch: int = 64,
        runs: int = 2,
        scale: int | None = None,
        translate: bool = True,
        blind: bool = False,
        work_dir: str = "runs/varc_ttt",
        votes_with: list[str] | None = None,
        compile: bool = False,
        optim: Optim = SCHEDULE,
        **network: Any,
    ) -> None:
        super().__init__(optim, runs, work_dir, votes_with)
        self.save_hyperparameters()
        for name, value, low in (
            ("permutations", permutations, 0),
            ("batch_size", batch_size, 1),
            ("views", views, 1),
            ("view_batch", view_batch, 1),
            ("runs", runs, 0 if votes_with else 1),
        ):
            if value < low:
                raise ZooError(f"model.{name} must be at least {low}, got {value}")
        self.permutations, self.batch_size, self.attempts, self.view_batch = permutations, batch_size, views, view_batch
        self.blind, self.init_from = blind, init_from
        self.network = self.make_network(num_tasks=1 + 5 * (1 + permutations), **network)
        self.views = Views(self.network.img_size, scale, translate)
        self._loss = torch.compile(self.network.loss) if compile else self.network.loss
        self._start: dict[str, Tensor] | None = None

    def make_network(self, **network: Any) -> _Conditioned:
        return VARCViT(**network)

    def setup(self, stage: str) -> None:
        """Fetch the offline training, once; its task tokens are left out."""
        if stage != "fit" and self._start is None:
            if self.init_from is not None and self.runs:
                load_offline(self.network, self.init_from)
            self._start = {key: value.clone() for key, value in self.network.state_dict().items()}
        super().setup(stage)

    def settings(self) -> dict[str, Any]:
        trainer = self.trainer
        left_out = ("init_from", "work_dir", "votes_with", "runs", "view_batch", "compile")
        settings = {key: value for key, value in self.hparams.items() if key not in left_out}
        settings["optim"] = dict(vars(self.optim))
        digest = hashlib.sha256()
        for key, value in sorted((self._start or {}).items()):
            if key != "task_embed.weight" and self.init_from is not None:
                digest.update(key.encode() + value.detach().float().cpu().numpy().tobytes())
        settings |= {"weights": digest.hexdigest(), "epochs": trainer.max_epochs, "precision": str(trainer.precision)}
        settings |= {"clip": trainer.gradient_clip_val, "seed": int(os.environ.get("PL_GLOBAL_SEED", 0))}
        data = trainer.datamodule  # type: ignore[attr-defined]
        return settings | {"dataset": data.dataset, "split": getattr(data, "split", None), "options": data.options}

    def solve(self, task: ARCTask, run: int) -> list[list[np.ndarray]]:
        """Train on the demonstrations of the task's pseudo-tasks, and predict its tests."""
        if self.blind:
            task = task._replace(test=tuple(pair._replace(output=None) for pair in task.test))
        pseudos = pseudo_tasks(task, self.permutations)
        start = int(hashlib.sha256(f"{task.name} {run}".encode()).hexdigest()[:8], 16)
        devices = [self.device.index or 0] if self.device.type == "cuda" else []
        with torch.inference_mode(False), torch.random.fork_rng(devices=devices), torch.enable_grad():
            seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
            seed_position(seed, 4, start)
            rng = random.Random(f"{seed} {task.name} {run}")
            epochs, clip = self.trainer.max_epochs, self.trainer.gradient_clip_val
            assert self._start is not None
            assert epochs is not None
            self.network.load_state_dict(self._start)
            self.network.reset_tasks(len(pseudos))
            how = (self.network, pseudos, self.views, rng)
            train_on_task(*how, epochs, self.batch_size, self.optim, clip, self._loss)
            return predict_views(*how, self.attempts, self.view_batch)


class VARCUNetTestTimeTraining(VARCTestTimeTraining):
    """:class:`VARCTestTimeTraining` of the U-Net; `network` is of :class:`VARCUNet`."""

    def make_network(self, **network: Any) -> _Conditioned:
        return VARCUNet(**network)


# ---------------------------------------------------------------------------------------------------------- 5. models


def varc_vit_6m(**overrides: Any) -> VARCViT:
    """ViT of width 384 and 5 blocks (Table 6)."""
    return VARCViT(**{"embed_dim": 384, "depth": 5, "num_heads": 8, **overrides})


def varc_vit_18m(**overrides: Any) -> VARCViT:
    """ViT of width 512 and 10 blocks (Table 6), the paper's default."""
    return VARCViT(**{"embed_dim": 512, "depth": 10, "num_heads": 8, **overrides})


def varc_vit_66m(**overrides: Any) -> VARCViT:
    """ViT of width 768 and 20 blocks (Table 6)."""
    return VARCViT(**{"embed_dim": 768, "depth": 20, "num_heads": 12, **overrides})


def varc_unet_small(**overrides: Any) -> VARCUNet:
    """U-Net of 80, 160 and 160 channels (Table 7, "7M")."""
    return VARCUNet(**{"embed_dim": 160, "depth": 1, "num_heads": 4, "mid_block": False, **overrides})


def varc_unet_medium(**overrides: Any) -> VARCUNet:
    """U-Net of 120, 240 and 240 channels (Table 7, "17M")."""
    return VARCUNet(**{"embed_dim": 240, "depth": 1, "num_heads": 6, "mid_block": False, **overrides})


def varc_unet_big(**overrides: Any) -> VARCUNet:
    """U-Net of 160, 320 and 320 channels, two blocks a resolution and a middle block (Table 7, "55M")."""
    return VARCUNet(**{"embed_dim": 320, "depth": 2, "num_heads": 8, "mid_block": True, **overrides})


# ------------------------------------------------------------------------------------------------ 6. official weights

_OURS = {
    "positional_embed": "pos_embed",
    "task_token_embed.weight": "task_embed.weight",
    "color_embed.weight": "color_embed.weight",
    **{
        f"{part}.{leaf}": f"{part}.{leaf}"
        for part in ("patch_embed.proj", "norm", "head")
        for leaf in ("weight", "bias")
    },
}
_LAYER = re.compile(
    r"encoder\.layers\.(\d+)\.(self_attn\.qkv|self_attn\.proj|norm1|linear1|linear2|norm2)\.(weight|bias)"
)
_LAYER_PARTS = {"self_attn.qkv": "attn.qkv", "self_attn.proj": "attn.proj", "linear1": "mlp.fc1", "linear2": "mlp.fc2"}
_ROTARY = re.compile(r"encoder\.layers\.\d+\.self_attn\.rotary\.freqs_(cos|sin)")
_UNET = re.compile(r"encoder\.(?:conv_in|conv_norm_out|conv_out|time_embedding|(?:down|up)_blocks\.\d+|mid_block)\..+")


def convert_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict in our names: the ViT's or the U-Net's, with or without torch.compile's prefix.

    The ViT's rotary tables are compared with ours and left out.

    Raises:
        ZooError: a key of neither network, or rotary tables of another kind.
    """
    converted: dict[str, Tensor] = {}
    for official, value in state_dict.items():
        key = official.removeprefix("_orig_mod.")
        if key in _OURS:
            converted[_OURS[key]] = value
        elif match := _LAYER.fullmatch(key):
            layer, part, leaf = match.groups()
            converted[f"blocks.{layer}.{_LAYER_PARTS.get(part, part)}.{leaf}"] = value
        elif match := _ROTARY.fullmatch(key):
            _check_rotary(match[1], value, official)
        elif _UNET.fullmatch(key):
            converted[key] = value
        else:
            raise ZooError(f"not a VARC checkpoint: unknown key {official!r}")
    return converted


def _check_rotary(which: str, table: Tensor, key: str) -> None:
    side = round(table.shape[0] ** 0.5)
    if side * side != table.shape[0] or table.shape[1] % 4:
        raise ZooError(f"{key}: a table of shape {tuple(table.shape)} belongs to no square grid")
    if table.is_meta:
        return
    ours = rope_2d(table.shape[1], (side, side))[("cos", "sin").index(which)].to(table.device)
    if not torch.allclose(table.float(), ours, atol=1e-3):
        raise ZooError(f"{key}: another rotary embedding than the axial one with base 10000")


def load_offline(network: nn.Module, source: str | Path) -> None:
    """Fill `network` from an offline training; its task tokens are left out, and those of `network` stay as they are.

    Args:
        source: a checkpoint of :class:`VARCTraining` (.ckpt), a published file, or the name of published weights.

    Raises:
        ZooError: the file is missing, or its network is not of this shape.
    """
    state = read_source(source)
    if "task_embed.weight" not in state:  # a published file, not ours
        state = convert_official(state)
    own = {key: value for key, value in state.items() if key != "task_embed.weight"}
    fill(network, own, source, lambda key: key != "task_embed.weight")

"""Speed of FLIP: our training step beside open_clip's with patch dropout, at equal sizes.

Both mask half of the patches, encode texts of 32 tokens from a vocabulary of 30,523, contrast the same pairs and update
by AdamW. The official code is JAX for TPUs (jax 0.3) and cannot run beside PyTorch here; open_clip is the PyTorch code
that its README points to. open_clip's text encoder attends backwards only and pools the end token, its image encoder
takes the exact GELU; operations and parameters are the same to the percent that `work` records.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from benchmarks.speed.shared import pairs

RECIPE, MASK_RATIO, LR, WEIGHT_DECAY = "flip/pretrain_laion400m", 0.5, 1e-3, 0.2
PACKAGES = ("open_clip_torch",)
LOADING_BATCH = 64
NAMES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
NAMES += ("text_embed_dim", "text_depth", "text_num_heads", "proj_dim", "vocab_size", "context_length")
MODELS: dict[str, dict[str, int]] = {
    name: dict(zip(NAMES, sizes, strict=True))
    for name, sizes in {
        "flip_base_patch16": (224, 16, 768, 12, 12, 512, 12, 8, 512, 30523, 32),
        "flip_large_patch16": (224, 16, 1024, 24, 16, 768, 12, 12, 768, 30523, 32),
        "flip_huge_patch14": (224, 14, 1280, 32, 16, 1024, 24, 16, 1024, 30523, 32),
        "tiny": (32, 8, 32, 2, 2, 32, 2, 2, 16, 100, 8),  # for the harness's own test
    }.items()
}
DEFAULT_MODEL = "flip_base_patch16"


def _options(size: dict[str, int]) -> dict[str, Any]:
    """The recipe's, for a network of this size."""
    own = {f"model.{name}": value for name, value in size.items() if name != "img_size"}
    return {**own, "data.image_size": size["img_size"], "model.mask_ratio": MASK_RATIO, "model.optim.lr": LR}


def _texts(size: dict[str, int], setting: Setting) -> Tensor:
    """Seeded word pieces (B, L); the last is the highest number, which is where open_clip pools."""
    last, shape = size["vocab_size"] - 1, (setting.batch, size["context_length"])
    text = torch.randint(0, last, shape, generator=torch.Generator().manual_seed(1))
    text[:, -1] = last
    return text.to(setting.device)


def _open_clip_network(size: dict[str, int]) -> nn.Module:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    of_vision = {"layers": "depth", "width": "embed_dim", "patch_size": "patch_size", "image_size": "img_size"}
    of_text = {"width": "text_embed_dim", "heads": "text_num_heads", "layers": "text_depth"}
    of_text |= {"context_length": "context_length", "vocab_size": "vocab_size"}
    head, (vision, text) = (
        size["embed_dim"] // size["num_heads"],
        ({theirs: size[ours] for theirs, ours in names.items()} for names in (of_vision, of_text)),
    )
    cfg = CLIPVisionCfg(head_width=head, patch_dropout=MASK_RATIO, **vision)  # type: ignore[arg-type]
    return CLIP(size["proj_dim"], cfg, CLIPTextCfg(**text)).train()  # type: ignore[arg-type]


def _open_clip_loss(network: nn.Module, images: Tensor, text: Tensor) -> Tensor:
    from open_clip.loss import ClipLoss

    return ClipLoss()(*network(images, text)[:3])


def open_clip(size: dict[str, int], setting: Setting, fused: bool) -> Trainer:
    network = _open_clip_network(size).to(setting.device)
    # The two groups of its training script.
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    plain = {n for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n}
    groups = [
        {"params": [p for n, p in named if (n in plain) == spared], "weight_decay": 0.0 if spared else WEIGHT_DECAY}
        for spared in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=fused or None)
    text, name = _texts(size, setting), "open_clip, fused AdamW" if fused else "open_clip"
    how = "the fused AdamW instead" if fused else "torch.optim.AdamW as in its script"
    about = f"open_clip.model.CLIP with patch_dropout {MASK_RATIO} and ClipLoss; {how}"
    version = package_version("open_clip_torch") or ""
    return Trainer(name, version, lambda images: _open_clip_loss(network, images, text), optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first; a peer that is not installed is left out."""
    size = MODELS[setting.model]
    text = _texts(size, setting)
    ours = harness.from_recipe(RECIPE, _options(size), lambda images: {"image": images, "text": text}, setting)
    here = (False, True) if package_version("open_clip_torch") else ()
    return [ours, *(open_clip(size, setting, fused) for fused in here)]


def images(setting: Setting) -> Tensor:
    """Noise (B,3,H,W)."""
    side = MODELS[setting.model]["img_size"]
    return harness.noise(setting, setting.batch, 3, side, side)


def work(setting: Setting) -> Work:
    """Tokens that pass the encoders (half of the patches and cls; all of the text); operations of both codes."""
    size = MODELS[setting.model]
    ours = harness.recipe_task(RECIPE, _options(size), "meta").network
    tokens = {"image_tokens": int(ours.num_patches * (1 - MASK_RATIO)) + 1, "text_tokens": size["context_length"]}
    with torch.device("meta"):
        batch = torch.empty(setting.batch, 3, size["img_size"], size["img_size"])
        text = torch.zeros(setting.batch, size["context_length"], dtype=torch.long)
        contenders: dict[str, Any] = {"zoo": (ours, lambda: ours.loss(batch, text, MASK_RATIO))}
        if package_version("open_clip_torch"):
            theirs = _open_clip_network(size)
            contenders["open_clip"] = (theirs, lambda: _open_clip_loss(theirs, batch, text))
        costs = harness.costs(contenders)
    detail: dict[str, Any] = {**tokens, "mask_ratio": MASK_RATIO, **costs}
    return Work(setting.batch, setting.batch * sum(tokens.values()), costs["flops"]["zoo"], detail)


@contextlib.contextmanager
def loaders(setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from shards to a batch, in this process (no workers), ours first."""
    side, batch = MODELS[setting.model]["img_size"], LOADING_BATCH
    with pairs.shards(setting, 4 * batch) as (folder, words, name):
        options = {"data.tokenizer": str(words), "data.image_size": side, "data.train_transform.kernel": "pillow"}
        options |= {"data.epoch_samples": None, "data.eval_dataset": None}
        how = "shards, JPEG decoding, bicubic crop on uint8 tensors, word pieces"
        found = [harness.data_from_recipe(RECIPE, options, folder, batch, how=how)]
        if package_version("webdataset") and package_version("open_clip_torch"):
            found.append(pairs.webdataset_loader(folder, side, batch))
        yield found, Work(batch, detail={"data": name, "crop": side})

"""Speed of FLIP: our training step beside open_clip's with patch dropout, at equal sizes.

Both mask half of the patches, encode texts of 32 tokens from a vocabulary of 30,523, contrast the same pairs and update
by AdamW. The official code is JAX for TPUs (jax 0.3) and cannot run beside PyTorch here; open_clip is the PyTorch code
that its README points to. open_clip's text encoder attends backwards only and pools the end token, its image encoder
takes the exact GELU; operations and parameters are the same to the percent that `work` records.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import package_version
from benchmarks.speed.harness import Loader, Setting, Trainer, Work, count_flops, forever, photos
from zoo.multimodal.flip import FLIP

MASK_RATIO = 0.5
LR, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 0.2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACKAGES = ("open_clip_torch",)
LOADING_BATCH = 64


@dataclass(frozen=True)
class Size:
    """The sizes of both encoders, in our names."""

    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    text_embed_dim: int
    text_depth: int
    text_num_heads: int
    proj_dim: int
    vocab_size: int = 30523
    context_length: int = 32

    @property
    def patches(self) -> int:
        return (self.img_size // self.patch_size) ** 2


MODELS = {
    "flip_base_patch16": Size(224, 16, 768, 12, 12, 512, 12, 8, 512),
    "flip_large_patch16": Size(224, 16, 1024, 24, 16, 768, 12, 12, 768),
    "flip_huge_patch14": Size(224, 14, 1280, 32, 16, 1024, 24, 16, 1024),
    "tiny": Size(32, 8, 32, 2, 2, 32, 2, 2, 16, 100, 8),  # for the harness's own test
}
DEFAULT_MODEL = "flip_base_patch16"


def _texts(size: Size, batch: int, device: str) -> Tensor:
    """Seeded word pieces (B, L); the last is the highest number, which is where open_clip pools."""
    text = torch.randint(
        0, size.vocab_size - 1, (batch, size.context_length), generator=torch.Generator().manual_seed(1)
    )
    text[:, -1] = size.vocab_size - 1
    return text.to(device)


def _ours_network(size: Size) -> FLIP:
    from dataclasses import asdict

    return FLIP(**asdict(size))


def ours(size: Size, setting: Setting) -> Trainer:
    import zoo
    from zoo.training import optim

    network = _ours_network(size).to(setting.device)
    declared = optim.Optim(name="adamw", lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    optimizer = optim.make_optimizer(optim.param_groups(network, declared), declared, LR, fused=True)
    text = _texts(size, setting.batch, setting.device)
    return Trainer(
        "zoo",
        zoo.__version__,
        lambda images: network.loss(images, text, MASK_RATIO),
        optimizer,
        "zoo.multimodal.flip: the loss and the fused AdamW of its task",
    )


def _open_clip_network(size: Size) -> nn.Module:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(
        layers=size.depth,
        width=size.embed_dim,
        head_width=size.embed_dim // size.num_heads,
        patch_size=size.patch_size,
        image_size=size.img_size,
        patch_dropout=MASK_RATIO,
    )
    text = CLIPTextCfg(
        context_length=size.context_length,
        vocab_size=size.vocab_size,
        width=size.text_embed_dim,
        heads=size.text_num_heads,
        layers=size.text_depth,
    )
    return CLIP(size.proj_dim, vision, text).train()


def _open_clip_loss(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    from open_clip.loss import ClipLoss

    contrast = ClipLoss()
    return lambda images, text: contrast(*network(images, text)[:3])


def open_clip(size: Size, setting: Setting, fused: bool) -> Trainer:
    network = _open_clip_network(size).to(setting.device)
    # The two groups of its training script.
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    plain = {n for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n}
    groups = [
        {"params": [p for n, p in named if n in plain], "weight_decay": 0.0},
        {"params": [p for n, p in named if n not in plain], "weight_decay": WEIGHT_DECAY},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=fused or None)
    loss, text = _open_clip_loss(network), _texts(size, setting.batch, setting.device)
    about = "the fused AdamW instead" if fused else "torch.optim.AdamW as in its script"
    return Trainer(
        "open_clip, fused AdamW" if fused else "open_clip",
        package_version("open_clip_torch") or "",
        lambda images: loss(images, text),
        optimizer,
        f"open_clip.model.CLIP with patch_dropout {MASK_RATIO} and ClipLoss; {about}",
    )


def trainers(setting: Setting) -> list[Trainer]:
    """Everyone who is here, ours first; a peer that is not installed is left out."""
    size = MODELS[setting.model]
    builders: list[Callable[[], Trainer]] = [lambda: ours(size, setting)]
    if package_version("open_clip_torch"):
        builders += [lambda: open_clip(size, setting, fused=False), lambda: open_clip(size, setting, fused=True)]
    return [build() for build in builders]


def images(setting: Setting) -> Tensor:
    """Seeded noise images (B,3,H,W): the time of a step does not depend on what is in them."""
    side = MODELS[setting.model].img_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(setting.batch, 3, side, side, generator=generator).to(setting.device)


def work(setting: Setting) -> Work:
    """Tokens that pass the encoders (half of the patches and cls; all of the text); operations of both codes."""
    size = MODELS[setting.model]
    tokens = {"image_tokens": int(size.patches * (1 - MASK_RATIO)) + 1, "text_tokens": size.context_length}
    flops: dict[str, int] = {}
    parameters: dict[str, int] = {}
    with torch.device("meta"):
        batch = torch.empty(setting.batch, 3, size.img_size, size.img_size)
        text = torch.zeros(setting.batch, size.context_length, dtype=torch.long)
        network = _ours_network(size)
        flops["zoo"] = count_flops(lambda: network.loss(batch, text, MASK_RATIO))
        parameters["zoo"] = sum(p.numel() for p in network.parameters())
        if package_version("open_clip_torch"):
            peer = _open_clip_network(size)
            loss = _open_clip_loss(peer)
            flops["open_clip"] = count_flops(lambda: loss(batch, text))
            parameters["open_clip"] = sum(p.numel() for p in peer.parameters())
    detail: dict[str, Any] = {**tokens, "mask_ratio": MASK_RATIO, "flops": flops, "parameters": parameters}
    return Work(setting.batch, setting.batch * sum(tokens.values()), flops["zoo"], detail)


# ----------------------------------------------------------------------------------------------------------------- data


def _write_shards(photographs: Path, out: Path, count: int) -> None:
    """The photos and a caption each (its class's folder) as webdataset shards."""
    import io
    import tarfile

    files = sorted(path for path in photographs.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:count]
    for shard in range(2):
        with tarfile.open(out / f"{shard:05d}.tar", "w") as tar:
            for number, path in enumerate(files[shard::2]):
                words = f"a photo of {path.parent.name.replace('_', ' ')}".encode()
                for kind, content in (("jpg", path.read_bytes()), ("txt", words)):
                    member = tarfile.TarInfo(f"{shard:05d}{number:04d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _zoo_loader(folder: Path, side: int) -> Loader:
    import zoo
    from zoo.data import ImageTextDataModule
    from zoo.data.transforms import MAEPretrain

    module = ImageTextDataModule(
        dataset=str(folder / "shards"),
        batch_size=LOADING_BATCH,
        image_size=side,
        train_transform=MAEPretrain(side, scale=(0.5, 1.0)),
        tokenizer=str(folder / "words.txt"),
        num_workers=0,
        seed=0,
    )
    return Loader(
        "zoo",
        zoo.__version__,
        forever(module.train_dataloader(), lambda b: b["image"]),
        "ImageTextDataModule with MAEPretrain: shards, JPEG decoding, bicubic crop on uint8 tensors, word pieces",
    )


def _webdataset_loader(folder: Path, side: int) -> Loader:
    import webdataset as wds
    from open_clip import get_tokenizer
    from torch.utils.data import DataLoader
    from torchvision import transforms

    steps = [
        transforms.RandomResizedCrop(side, scale=(0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    tokenize = get_tokenizer("ViT-B-32", context_length=32)
    stages = [
        wds.SimpleShardList([str(path) for path in sorted((folder / "shards").glob("*.tar"))[:1]]),
        wds.tarfile_to_samples(),
        wds.shuffle(5000, initial=1000),
        wds.decode("pilrgb"),
        wds.rename(image="jpg", text="txt"),
        wds.map_dict(image=transforms.Compose(steps), text=lambda text: tokenize(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(LOADING_BATCH, partial=False),
    ]
    return Loader(
        "open_clip",
        package_version("open_clip_torch") or "",
        forever(DataLoader(wds.DataPipeline(*stages), batch_size=None), lambda b: b[0]),
        f"webdataset {package_version('webdataset')} in the stages of its script, PIL transforms, its BPE tokenizer",
    )


@contextlib.contextmanager
def loaders(setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from shards to a batch, in this process (no workers), ours first."""
    import tempfile

    from zoo.data.text import write_vocabulary

    side = MODELS[setting.model].img_size
    with photos(setting, 4 * LOADING_BATCH) as (photographs, name), tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "shards").mkdir()
        _write_shards(photographs, folder / "shards", 4 * LOADING_BATCH)
        write_vocabulary(["a photo of"], folder / "words.txt")
        makers = [_zoo_loader]
        if package_version("webdataset") and package_version("open_clip_torch"):
            makers.append(_webdataset_loader)
        detail = {"data": f"{name} in shards", "crop": side}
        yield [make(folder, side) for make in makers], Work(LOADING_BATCH, detail=detail)

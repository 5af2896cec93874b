"""Speed of SlowFast: our training step beside those of PySlowFast and PyTorchVideo.

    python benchmarks/speed/run.py slowfast --official SLOWFAST_CHECKOUT

How the peers are found is told in benchmarks/speed/shared/video.py. All are trained by SGD with Nesterov momentum, the
official one in its two groups. What a peer does not say is its default: both leave activations in the order
(B, C, T, H, W).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work
from benchmarks.speed.shared import video

RECIPE = "slowfast/train_kinetics400"
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
WEIGHT_DECAY = 1e-4
PACKAGES = ("pytorchvideo", "fvcore", "av")


@dataclass(frozen=True)
class Size:
    """A network by its official configuration, and the clips it is timed on."""

    config: str
    frames: int
    alpha: int = 1
    crop: int = 64

    @property
    def fusion_kernel(self) -> int:
        return 5 if self.alpha == 8 else 7

    @property
    def options(self) -> dict[str, Any]:
        """The recipe's, for this network."""
        both = {"model.alpha": self.alpha, "model.fusion_kernel": self.fusion_kernel}
        own = {"model.arch": "slow"} if self.alpha == 1 else both
        return {**own, "model.num_frames": self.frames, "model.crop_size": self.crop}


MODELS = {
    "slowfast_r50_4x16": Size("SLOWFAST_4x16_R50", 32, 8),
    "slowfast_r50_4x16_128": Size("SLOWFAST_4x16_R50", 32, 8, 128),
    "slowfast_r50_8x8": Size("SLOWFAST_8x8_R50", 32, 4),
    "slow_r50_8x8": Size("SLOW_8x8_R50", 8),
    "slow_r50_4x16": Size("SLOW_4x16_R50", 4),
    "tiny": Size("SLOW_4x16_R50", 4, crop=32),  # for the harness's own test
}
DEFAULT_MODEL = "slowfast_r50_4x16"


def official(size: Size, setting: Setting) -> Trainer:
    assert setting.official is not None
    network, _ = video.pyslowfast(setting.official, f"Kinetics/{size.config}", DATA__TRAIN_CROP_SIZE=size.crop)
    network.to(setting.device)
    norms = [p for m in network.modules() if isinstance(m, nn.BatchNorm3d) for p in m.parameters()]
    of_norms = {id(p) for p in norms}
    others = [p for p in network.parameters() if id(p) not in of_norms]
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": WEIGHT_DECAY}]
    about = f"configs/Kinetics/{size.config}.yaml, training crop {size.crop}; torch.optim.SGD in its two groups"
    revision, optimizer = harness.revision(setting.official), torch.optim.SGD(groups, **SGD)
    return video.trainer("PySlowFast", revision, lambda x: network(video.pathways(x, size.alpha)), optimizer, about)


def pytorchvideo(size: Size, setting: Setting) -> list[Trainer]:
    """PyTorchVideo's, where it is found."""
    found = video.pytorchvideo(setting, "models.slowfast", "models.resnet")
    if found is None:
        return []
    package, (slowfast, resnet) = found
    side = size.crop // 32
    if size.alpha > 1:
        network = slowfast.create_slowfast(
            slowfast_channel_reduction_ratio=(8,),
            slowfast_conv_channel_fusion_ratio=2,
            slowfast_fusion_conv_kernel_size=(size.fusion_kernel, 1, 1),
            slowfast_fusion_conv_stride=(size.alpha, 1, 1),
            head_pool_kernel_sizes=((size.frames // size.alpha, side, side), (size.frames, side, side)),
        )
    else:
        pool = (size.frames, side, side)
        network = resnet.create_resnet(stem_conv_kernel_size=(1, 7, 7), head_pool_kernel_size=pool, model_depth=50)
    network.to(setting.device)

    def forward(clips: Tensor) -> Tensor:
        parts = video.pathways(clips, size.alpha)
        return network(parts if size.alpha > 1 else parts[0])

    optimizer = torch.optim.SGD(network.parameters(), weight_decay=WEIGHT_DECAY, **SGD)
    version = package_version(package) or "" if isinstance(package, str) else harness.revision(package)
    about = "create_slowfast or create_resnet as its hub calls them; torch.optim.SGD defaults"
    return [video.trainer("PyTorchVideo", version, forward, optimizer, about)]


def trainers(setting: Setting) -> list[Trainer]:
    """Ours first, then PySlowFast's where a checkout is given, and PyTorchVideo's where it is found."""
    size = MODELS[setting.model]
    ours = harness.from_recipe(RECIPE, size.options, lambda x: {"video": x, "label": video.labels(x)}, setting)
    theirs = [official(size, setting)] if setting.official is not None else []
    return [ours, *theirs, *pytorchvideo(size, setting)]


def images(setting: Setting) -> Tensor:
    """Noise clips (B, 3, T, S, S)."""
    size = MODELS[setting.model]
    return harness.noise(setting, setting.batch, 3, size.frames, size.crop, size.crop)


def work(setting: Setting) -> Work:
    """Clips, and the measured FLOPs of our network."""
    size = MODELS[setting.model]
    network = harness.recipe_task(RECIPE, size.options, "meta").network
    batch = torch.empty(setting.batch, 3, size.frames, size.crop, size.crop, device="meta")
    flops = harness.count_flops(lambda: network(batch).sum())
    detail = {"frames": size.frames, "crop": size.crop, "parameters": sum(p.numel() for p in network.parameters())}
    return Work(setting.batch, 0, flops, detail)


def loaders(setting: Setting) -> contextlib.AbstractContextManager[tuple[list[Loader], Work]]:
    """The pipelines from mp4 files to a batch of clips."""
    return video.loaders(RECIPE, setting, 32 if setting.model == "tiny" else video.CROP)

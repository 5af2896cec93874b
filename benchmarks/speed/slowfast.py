"""Speed of SlowFast: our training step beside those of PySlowFast and PyTorchVideo.

    python benchmarks/speed/run.py slowfast --official SLOWFAST_CHECKOUT

PySlowFast comes from the checkout, PyTorchVideo from a checkout named ``pytorchvideo`` beside it, or installed.
PySlowFast's models import as they are: what they ask of others without using it here (detectron2's RoIAlign, its own
package's list of all models) gets stand-ins. All are trained by SGD with Nesterov momentum, the official one in its two
groups. What a peer does not say is its default: both leave activations in the order (B, C, T, H, W).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from benchmarks.environment import ROOT, package_version
from benchmarks.speed.harness import Loader, Setting, Trainer, Work, count_flops, forever, revision

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4
PACKAGES = ("pytorchvideo", "fvcore", "av")
CLASSES = 400


@dataclass(frozen=True)
class Size:
    """A network by its name here, its official configuration, and the clips it is timed on."""

    zoo: str
    config: str
    frames: int
    alpha: int = 1
    crop: int = 64

    @property
    def network(self) -> dict[str, int]:
        """Options of our network."""
        both = {"alpha": self.alpha, "fusion_kernel": 5 if self.alpha == 8 else 7} if self.alpha > 1 else {}
        return {"num_frames": self.frames, "crop_size": self.crop, **both}


MODELS = {
    "slowfast_r50_4x16": Size("slowfast_r50_4x16", "SLOWFAST_4x16_R50", 32, 8),
    "slowfast_r50_4x16_128": Size("slowfast_r50_4x16", "SLOWFAST_4x16_R50", 32, 8, 128),
    "slowfast_r50_8x8": Size("slowfast_r50_8x8", "SLOWFAST_8x8_R50", 32, 4),
    "slow_r50_8x8": Size("slow_r50_8x8", "SLOW_8x8_R50", 8),
    "slow_r50_4x16": Size("slow_r50_4x16", "SLOW_4x16_R50", 4),
    "tiny": Size("slow_r50_4x16", "SLOW_4x16_R50", 4, crop=32),  # for the harness's own test
}
DEFAULT_MODEL = "slowfast_r50_4x16"


def _trainer(name: str, version: str, network: Any, optimizer: torch.optim.Optimizer, about: str) -> Trainer:
    def loss(video: Tensor) -> Tensor:
        return cross_entropy(network(video), torch.arange(len(video), device=video.device))

    return Trainer(name, version, loss, optimizer, about)


def ours(size: Size, setting: Setting) -> Trainer:
    import zoo
    from zoo.training import optim
    from zoo.video.slowfast import SlowFastClassification

    declared = optim.Optim(name="sgd", lr=LR, nesterov=True, weight_decay=WEIGHT_DECAY, no_decay="norm")
    task = SlowFastClassification("slow" if size.alpha == 1 else "slowfast", **size.network, optim=declared)
    task.to(setting.device)
    optimizer = optim.make_optimizer(optim.param_groups(task.network, declared), declared, LR, fused=True)
    return _trainer("zoo", zoo.__version__, task, optimizer, "zoo.video.slowfast: its task with its own optimiser")


# ---------------------------------------------------------------------------------------------------------- the peers


def _stand_in(name: str, **content: Any) -> None:
    """A module under `name` where there is none."""
    if name not in sys.modules:
        module: Any = types.ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module


@contextlib.contextmanager
def _importable(*folders: Path) -> Iterator[None]:
    sys.path[:0] = map(str, folders)
    try:
        yield
    finally:
        for folder in folders:
            sys.path.remove(str(folder))


def official_network(checkout: Path, config: str, **changes: Any) -> tuple[nn.Module, Any]:
    """The network that PySlowFast builds from one of its configurations, and the configuration.

    Args:
        checkout: of facebookresearch/SlowFast; PyTorchVideo is looked for beside it.
        config: the file under configs, without its suffix ("Kinetics/SLOW_8x8_R50").
        changes: of the configuration, with "__" for the dot.
    """
    with _importable(checkout, checkout.parent / "pytorchvideo"):
        _stand_in("detectron2")
        _stand_in("detectron2.layers", ROIAlign=nn.Identity)
        package: Any = types.ModuleType("slowfast.models")
        package.__path__ = [str(checkout / "slowfast" / "models")]
        sys.modules.setdefault("slowfast.models", package)
        defaults = importlib.import_module("slowfast.config.defaults")
        builder = importlib.import_module("slowfast.models.video_model_builder")
    cfg = defaults.get_cfg()
    cfg.merge_from_file(str(checkout / "configs" / f"{config}.yaml"))
    cfg.NUM_GPUS = 0
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return getattr(builder, cfg.MODEL.MODEL_NAME)(cfg), cfg


def _pathways(video: Tensor, alpha: int) -> list[Tensor]:
    """What both peers' data loaders hand over: a list of the pathways' inputs."""
    if alpha == 1:
        return [video]
    index = torch.linspace(0, video.shape[2] - 1, video.shape[2] // alpha).long()
    return [video.index_select(2, index.to(video.device)), video]


def official(size: Size, setting: Setting) -> Trainer:
    assert setting.official is not None
    network, _ = official_network(setting.official, f"Kinetics/{size.config}", DATA__TRAIN_CROP_SIZE=size.crop)
    network.to(setting.device)
    norms = [p for m in network.modules() if isinstance(m, nn.BatchNorm3d) for p in m.parameters()]
    of_norms = {id(p) for p in norms}
    others = [p for p in network.parameters() if id(p) not in of_norms]
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": WEIGHT_DECAY}]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, nesterov=True)
    return _trainer(
        "PySlowFast",
        revision(setting.official),
        lambda video: network(_pathways(video, size.alpha)),
        optimizer,
        f"configs/Kinetics/{size.config}.yaml, training crop {size.crop}; torch.optim.SGD in its two groups",
    )


def pytorchvideo(size: Size, setting: Setting) -> Trainer | None:
    beside = setting.official.parent / "pytorchvideo" if setting.official is not None else None
    with _importable(*([beside] if beside is not None and beside.is_dir() else [])):
        try:
            slowfast = importlib.import_module("pytorchvideo.models.slowfast")
            resnet = importlib.import_module("pytorchvideo.models.resnet")
        except ImportError:
            return None
    side = size.crop // 32
    if size.alpha > 1:
        network = slowfast.create_slowfast(
            slowfast_channel_reduction_ratio=(8,),
            slowfast_conv_channel_fusion_ratio=2,
            slowfast_fusion_conv_kernel_size=(size.network["fusion_kernel"], 1, 1),
            slowfast_fusion_conv_stride=(size.alpha, 1, 1),
            head_pool_kernel_sizes=((size.frames // size.alpha, side, side), (size.frames, side, side)),
        )
    else:
        network = resnet.create_resnet(
            stem_conv_kernel_size=(1, 7, 7), head_pool_kernel_size=(size.frames, side, side), model_depth=50
        )
    network.to(setting.device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    version = package_version("pytorchvideo") or (revision(beside) if beside else "")

    def forward(video: Tensor) -> Tensor:
        pathways = _pathways(video, size.alpha)
        return network(pathways if size.alpha > 1 else pathways[0])

    about = "create_slowfast or create_resnet as its hub calls them; torch.optim.SGD defaults"
    return _trainer("PyTorchVideo", version, forward, optimizer, about)


def trainers(setting: Setting) -> list[Trainer]:
    """Ours first, then PySlowFast's where a checkout is given, and PyTorchVideo's where it is found."""
    size = MODELS[setting.model]
    found = [ours(size, setting)]
    if setting.official is not None:
        found.append(official(size, setting))
    peer = pytorchvideo(size, setting)
    return found + ([peer] if peer is not None else [])


def images(setting: Setting) -> Tensor:
    """Seeded noise clips (B, 3, T, S, S): the time of a step does not depend on what is in them."""
    size = MODELS[setting.model]
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, 3, size.frames, size.crop, size.crop)
    return torch.randn(shape, generator=generator).to(setting.device)


def work(setting: Setting) -> Work:
    """Clips, and the measured FLOPs of our network."""
    import zoo

    size = MODELS[setting.model]
    with torch.device("meta"):
        network = zoo.create_model(size.zoo, crop_size=size.crop)
        batch = torch.empty(setting.batch, 3, size.frames, size.crop, size.crop)
        flops = count_flops(lambda: network(batch).sum())
    detail = {"frames": size.frames, "crop": size.crop, "parameters": sum(p.numel() for p in network.parameters())}
    return Work(setting.batch, 0, flops, detail)


# ----------------------------------------------------------------------------------------------------------- the data

CLIP_FRAMES, CLIP_RATE, CLIP_CROP, CLIP_BATCH = 32, 2, 224, 4


@contextlib.contextmanager
def videos(setting: Setting) -> Iterator[tuple[Path, str]]:
    """A folder of mp4 files and what they are: the given one, else real ones beside the checkout, else drawn ones."""
    real = ROOT.parent / "shared" / "data" / "videos" / "asl"
    if setting.data is not None or real.is_dir():
        folder = setting.data or real
        yield folder, "20 clips of sign language, 320 x 240, H.264" if folder == real else str(folder.name)
        return
    import av

    from zoo.data.clips import render_clips

    with tempfile.TemporaryDirectory() as made:
        for k in range(CLIP_BATCH):
            frames = render_clips(0, "train", [k], range(80), 240, ("video",))["video"][0].contiguous()
            with av.open(f"{made}/{k}.mp4", "w") as container:
                stream = container.add_stream("libx264", rate=30)
                stream.width, stream.height, stream.pix_fmt = 240, 240, "yuv420p"
                for frame in frames.numpy():
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
        yield Path(made), "drawn clips, 240 x 240, H.264"


def _zoo_loader(folder: Path, side: int, batch: int) -> Loader:
    import zoo
    from zoo.data.video import VideoDataModule

    module = VideoDataModule(
        str(folder),
        batch_size=batch,
        num_frames=CLIP_FRAMES,
        sampling_rate=CLIP_RATE,
        image_size=side,
        num_workers=0,
        seed=0,
    )
    about = "VideoDataModule with VideoTrain: PyAV, only the wanted frames converted, resized on float as the papers do"
    return Loader("zoo", zoo.__version__, forever(module.train_dataloader(), lambda b: b["video"]), about)


class _EncodedVideos(Dataset):
    """PyTorchVideo's files and functional transforms, put together as its Kinetics example does."""

    def __init__(self, folder: Path, side: int) -> None:
        self.paths, self.side = sorted(folder.glob("*.mp4")), side
        self.video = importlib.import_module("pytorchvideo.data.encoded_video").EncodedVideo
        self.functional = importlib.import_module("pytorchvideo.transforms.functional")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        video = self.video.from_path(str(self.paths[index]), decode_audio=False, decoder="pyav")
        length = CLIP_FRAMES * CLIP_RATE / 30
        start = float(torch.rand(())) * max(0.0, float(video.duration) - length)
        clip = video.get_clip(start, start + length)["video"]
        video.close()
        clip = self.functional.uniform_temporal_subsample(clip, CLIP_FRAMES) / 255
        clip = (clip - 0.45) / 0.225
        size = round(self.side * (256 + 64 * float(torch.rand(()))) / 224)
        clip = self.functional.short_side_scale(clip, size)
        top, left = (int(torch.randint(0, extent - self.side + 1, ())) for extent in clip.shape[2:])
        clip = clip[..., top : top + self.side, left : left + self.side]
        return clip.flip(-1) if torch.rand(()) < 0.5 else clip


def _pytorchvideo_loader(folder: Path, side: int, batch: int, checkout: Path | None) -> Loader | None:
    with _importable(*([checkout] if checkout is not None and checkout.is_dir() else [])):
        try:
            data = _EncodedVideos(folder, side)
        except ImportError:
            return None
    loader = DataLoader(data, batch_size=batch, shuffle=True, drop_last=True)
    version = package_version("pytorchvideo") or (revision(checkout) if checkout else "")
    about = "EncodedVideo with its PyAV decoder, its functional transforms"
    return Loader("PyTorchVideo", version, forever(loader, lambda b: b), about)


@contextlib.contextmanager
def loaders(setting: Setting) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from mp4 files to a batch of clips, in this process (no workers), ours first.

    PySlowFast's own is not there: it reads videos by parts of torchvision that are gone.
    """
    beside = setting.official.parent / "pytorchvideo" if setting.official is not None else None
    side = min(CLIP_CROP, MODELS[setting.model].crop) if setting.model == "tiny" else CLIP_CROP
    with videos(setting) as (folder, name):
        found = [_zoo_loader(folder, side, CLIP_BATCH)]
        peer = _pytorchvideo_loader(folder, side, CLIP_BATCH, beside)
        detail = {"data": name, "crop": side, "frames": CLIP_FRAMES, "from": "mp4"}
        yield found + ([peer] if peer is not None else []), Work(CLIP_BATCH, detail=detail)

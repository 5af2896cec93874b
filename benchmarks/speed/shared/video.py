"""The peers of video papers: PySlowFast from a checkout, PyTorchVideo from a checkout named ``pytorchvideo`` beside it,
or installed; and clips from files.

PySlowFast's models import as they are: what they ask of others without using it here (detectron2's RoIAlign, its own
package's list of all models) gets stand-ins.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from benchmarks.environment import ROOT
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting, Trainer, Work

FRAMES, RATE, CROP, BATCH = 32, 2, 224, 4  # of the clips that are loaded


def labels(video: Tensor) -> Tensor:
    """A class each."""
    return torch.arange(len(video), device=video.device)


def trainer(name: str, version: str, network: Any, optimizer: torch.optim.Optimizer, about: str) -> Trainer:
    """A peer that learns a class for each clip (B, 3, T, S, S)."""
    return Trainer(name, version, lambda video: cross_entropy(network(video), labels(video)), optimizer, about)


def pathways(video: Tensor, alpha: int) -> list[Tensor]:
    """What both peers' data loaders hand over: a list of the pathways' inputs."""
    if alpha == 1:
        return [video]
    index = torch.linspace(0, video.shape[2] - 1, video.shape[2] // alpha).long()
    return [video.index_select(2, index.to(video.device)), video]


def pyslowfast(checkout: Path, config: str, **changes: Any) -> tuple[nn.Module, Any]:
    """The network that PySlowFast builds from one of its configurations, and the configuration.

    Args:
        checkout: of facebookresearch/SlowFast; PyTorchVideo is looked for beside it.
        config: the file under configs, without its suffix ("Kinetics/SLOW_8x8_R50").
        changes: of the configuration, with "__" for the dot.
    """
    models = {"__path__": [str(checkout / "slowfast" / "models")]}
    stand_ins = {"detectron2": {}, "detectron2.layers": {"ROIAlign": nn.Identity}, "slowfast.models": models}
    beside = checkout.parent / "pytorchvideo"
    with contextlib.ExitStack() as stack:
        if beside.is_dir():
            stack.enter_context(harness.importing(beside))
        stack.enter_context(harness.importing(checkout, "slowfast.config.defaults", stand_ins=stand_ins))
        defaults = importlib.import_module("slowfast.config.defaults")
        builder = importlib.import_module("slowfast.models.video_model_builder")
    cfg = defaults.get_cfg()
    cfg.merge_from_file(str(checkout / "configs" / f"{config}.yaml"))
    cfg.NUM_GPUS = 0
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return getattr(builder, cfg.MODEL.MODEL_NAME)(cfg), cfg


def pytorchvideo(setting: Setting, *names: str) -> tuple[str | Path, list[ModuleType]] | None:
    """Modules of PyTorchVideo, and the checkout or package that they are of; None where there is none."""
    beside = setting.official.parent / "pytorchvideo" if setting.official is not None else None
    if beside is not None and beside.is_dir():
        with harness.importing(beside):
            return beside, [importlib.import_module(f"pytorchvideo.{name}") for name in names]
    try:
        return "pytorchvideo", [importlib.import_module(f"pytorchvideo.{name}") for name in names]
    except ImportError:
        return None


@contextlib.contextmanager
def files(setting: Setting) -> Iterator[tuple[Path, str]]:
    """A folder of mp4 files and what they are: the given one, else real ones beside the checkout, else drawn ones."""
    real = ROOT.parent / "shared" / "data" / "videos" / "asl"
    if setting.data is not None or real.is_dir():
        folder = setting.data or real
        yield folder, "20 clips of sign language, 320 x 240, H.264" if folder == real else str(folder.name)
        return
    import av

    from zoo.data.clips import render_clips

    with tempfile.TemporaryDirectory() as made:
        for k in range(BATCH):
            frames = render_clips(0, "train", [k], range(80), 240, ("video",))["video"][0].contiguous()
            with av.open(f"{made}/{k}.mp4", "w") as container:
                stream = container.add_stream("libx264", rate=30)
                stream.width, stream.height, stream.pix_fmt = 240, 240, "yuv420p"
                for frame in frames.numpy():
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
        yield Path(made), "drawn clips, 240 x 240, H.264"


class _EncodedVideos(Dataset):
    """PyTorchVideo's files and functional transforms, put together as its Kinetics example does."""

    def __init__(self, folder: Path, side: int, video: Any, functional: Any) -> None:
        self.paths, self.side = sorted(folder.glob("*.mp4")), side
        self.video, self.functional = video, functional

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        video = self.video(io.BytesIO(path.read_bytes()), path.name, decode_audio=False)
        length = FRAMES * RATE / 30
        start = float(torch.rand(())) * max(0.0, float(video.duration) - length)
        clip = video.get_clip(start, start + length)["video"]
        video.close()
        clip = self.functional.uniform_temporal_subsample(clip, FRAMES) / 255
        clip = (clip - 0.45) / 0.225
        size = round(self.side * (256 + 64 * float(torch.rand(()))) / 224)
        clip = self.functional.short_side_scale(clip, size)
        top, left = (int(torch.randint(0, extent - self.side + 1, ())) for extent in clip.shape[2:])
        clip = clip[..., top : top + self.side, left : left + self.side]
        return clip.flip(-1) if torch.rand(()) < 0.5 else clip


@contextlib.contextmanager
def loaders(recipe: str, setting: Setting, side: int = CROP) -> Iterator[tuple[list[Loader], Work]]:
    """The pipelines from mp4 files to a batch of clips, in this process (no workers), a recipe's first.

    PySlowFast's own is not there: it reads videos by parts of torchvision that are gone.
    """
    options = {"data.num_frames": FRAMES, "data.sampling_rate": RATE, "data.image_size": side, "model.num_classes": 1}
    how = "PyAV, only the wanted frames converted, resized on float as the papers do"
    with files(setting) as (folder, name):
        found = [harness.data_from_recipe(recipe, options, folder, BATCH, lambda b: b["video"], how)]
        if (peer := pytorchvideo(setting, "data.encoded_video_pyav", "transforms.functional")) is not None:
            package, (encoded, functional) = peer
            data = _EncodedVideos(folder, side, encoded.EncodedVideoPyAV, functional)
            about = "EncodedVideoPyAV, its functional transforms"
            found.append(harness.peer_loader("PyTorchVideo", package, data, BATCH, about, lambda clips: clips))
        yield found, Work(BATCH, detail={"data": name, "crop": side, "frames": FRAMES, "from": "mp4"})

"""Networks whose features say how alike two pictures look: LPIPS (Zhang et al. 2018, arXiv 1801.03924) on VGG-16, and
ConvNeXt V2 (Woo et al. 2023, arXiv 2301.00808), by torchvision and timm. Frozen, and differentiable in the pictures.

Their weights are published files: in the cache, downloaded there, or named by path. A task that trains against such
features holds them in a :class:`FrozenNetwork`, outside of its parameters and checkpoints.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.paths import cache_dir

Network = TypeVar("Network", bound=nn.Module)
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
# The file behind timm's convnextv2_base.fcmae_ft_in22k_in1k and the hub's facebook/convnextv2-base-22k-224.
CONVNEXT_URL = "https://dl.fbaipublicfiles.com/convnext/convnextv2/im22k/convnextv2_base_22k_224_ema.pt"
VGG_ENDS = (4, 9, 16, 23, 30)  # behind relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
VGG_CHANNELS = (64, 128, 256, 512, 512)
# The published constants: ImageNet's, rounded, for pictures in [-1, 1].
LPIPS_MEAN, LPIPS_STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class FrozenNetwork:
    """A network that a task measures with and does not own: moved to the device of what it is given, and no part of the
    task's parameters, checkpoints and averages. It is in float32; autocast applies to it.

    Args:
        load: makes the network. Called at the first :meth:`net`, or by :meth:`check`, so that missing weights are told
            before a run and not in it.
    """

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self.load = load
        self._net: nn.Module | None = None

    def check(self) -> None:
        """Loads the network; a ZooError of one line where its weights cannot be had."""
        self.net(torch.device("cpu"))

    def net(self, device: torch.device) -> nn.Module:
        """The network on `device`, in evaluation mode, without gradients of its own."""
        if self._net is None:
            self._net = self.load().requires_grad_(False).eval()
        return self._net.to(device)


# --------------------------------------------------------------------------------------------------------------- LPIPS


class LPIPS(nn.Module):
    """LPIPS 0.1: the weighted squared difference of unit-length VGG-16 features, averaged over places and summed over
    five depths. Without weights it is random: see :func:`load_lpips`."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import vgg16

        device = torch.get_default_device()
        with torch.device("meta"):  # the classifier's 120 M parameters are not made
            layers = list(vgg16(weights=None).features)[: VGG_ENDS[-1]]
        self.features = nn.Sequential(*layers).to_empty(device=device)
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
            elif isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
        self.weights = nn.ParameterList(nn.Parameter(torch.rand(width)) for width in VGG_CHANNELS)
        self.register_buffer("mean", torch.tensor(LPIPS_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(LPIPS_STD)[:, None, None])

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distances (B,) of pictures (B, 3, H, W) and (B, 3, H, W) about in [-1, 1], of sides of 16 or more."""
        x = (torch.cat([images, others]) - self.mean) / self.std
        distance: Tensor | float = 0.0
        depths = iter(self.weights)
        for n, layer in enumerate(self.features, start=1):
            x = layer(x)
            if n in VGG_ENDS:
                wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
                unit = wide / (wide.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()
                first, second = unit.chunk(2)
                distance = distance + torch.einsum("bchw,c->bhw", (first - second).square(), next(depths)).mean((1, 2))
        assert isinstance(distance, Tensor)
        return distance


def load_lpips(vgg: str | None = None) -> LPIPS:
    """LPIPS with its published weights, which torchmetrics carries, on VGG-16's of ImageNet.

    Args:
        vgg: a file of VGG-16 in torchvision's layout; None: :data:`VGG_URL` (528 MB), from the cache or downloaded.

    Raises:
        ZooError: weights that cannot be had, or of another network.
    """
    from zoo.weights.files import read_state_dict

    spec = importlib.util.find_spec("torchmetrics")
    head = Path((spec.origin if spec else None) or ".").parent / "functional" / "image" / "lpips_models" / "vgg.pth"
    path = _weights(vgg, VGG_URL, "LPIPS")
    body = {key: value for key, value in read_state_dict(path).items() if key.startswith("features.")}
    depths = read_state_dict(head)
    state = {**body, **{f"weights.{k}": depths[f"lin{k}.model.1.weight"].flatten() for k in range(len(VGG_ENDS))}}
    constants = {"mean": LPIPS_MEAN, "std": LPIPS_STD}
    state |= {name: torch.tensor(value)[:, None, None] for name, value in constants.items()}
    with torch.device("meta"):
        net = LPIPS()
    return _filled(net, state, path)


# ---------------------------------------------------------------------------------------------------------- ConvNeXt V2


class GlobalResponseNorm(nn.Module):
    """Global response normalisation of (B, H, W, C), whose norm is sqrt(sum x^2 + eps): where it is 0, it still has a
    gradient, which timm's has not."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        norm = (wide.square().sum(dim=(1, 2), keepdim=True) + self.eps).sqrt()
        share = norm / (norm.mean(dim=-1, keepdim=True) + self.eps)
        return (x + self.weight * (wide * share) + self.bias).to(x.dtype)


class ConvNeXtV2Features(nn.Module):
    """ConvNeXt V2 without its head. Without weights it is random: see :func:`load_convnextv2`.

    Args:
        depths, dims: blocks and channels of the stages; those of ConvNeXt V2-Base.
    """

    def __init__(self, depths: Sequence[int] = (3, 3, 27, 3), dims: Sequence[int] = (128, 256, 512, 1024)) -> None:
        super().__init__()
        from timm import create_model

        sizes: dict[str, Any] = {"depths": tuple(depths), "dims": tuple(dims)}
        self.network: Any = create_model("convnextv2_base", pretrained=False, num_classes=0, **sizes)
        for name, module in list(self.network.named_modules()):
            owner, _, place = name.rpartition(".")
            if place == "grn":
                setattr(self.network.get_submodule(owner), place, GlobalResponseNorm(len(module.weight)))

    def maps(self, images: Tensor) -> list[Tensor]:
        """What each stage gives for pictures (B, 3, H, W): (B, dims[k], H / (4 * 2^k), W / (4 * 2^k))."""
        x, found = self.network.stem(images), []
        for stage in self.network.stages:
            x = stage(x)
            found.append(x)
        return found

    def pooled(self, last: Tensor) -> Tensor:
        """The features (B, dims[-1]) of the last stage's map: its mean, layer-normalised."""
        return self.network.forward_head(last, pre_logits=True)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, dims[-1]) of pictures (B, 3, H, W)."""
        return self.pooled(self.maps(images)[-1])


def load_convnextv2(weights: str | None = None) -> ConvNeXtV2Features:
    """ConvNeXt V2-Base, pre-trained as a masked autoencoder and fine-tuned on ImageNet-22K and -1K, at 224 pixels.

    Args:
        weights: a file in the official layout, timm's or that of transformers; None: :data:`CONVNEXT_URL` (355 MB),
            from the cache or downloaded.

    Raises:
        ZooError: weights that cannot be had, or of another network.
    """
    from zoo.weights.files import read_state_dict

    path = _weights(weights, CONVNEXT_URL, "ConvNeXt V2")
    with torch.device("meta"):
        net = ConvNeXtV2Features()
    return _filled(net, convert_convnextv2(read_state_dict(path)), path)


# Of the official code and of transformers, to timm's names.
_RENAMES = (
    (r"^(convnextv2\.encoder|convnextv2)\.", ""),
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"\.downsampling_layer\.", ".downsample."),
    (r"^stages\.(\d+)\.(?:layers\.)?(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"\.grn\.(gamma|weight)$", ".mlp.grn.weight"),
    (r"\.grn\.(beta|bias)$", ".mlp.grn.bias"),
    (r"\.mlp\.mlp\.", ".mlp."),
    (r"\.layernorm\.", ".norm."),
    (r"^(?:norm|layernorm)\.", "head.norm."),
)


def convert_convnextv2(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ConvNeXt V2 in the official layout, timm's or that of transformers, in our names and without its
    head (``head``, ``head.fc``, ``classifier``)."""
    converted = {}
    for key, value in state_dict.items():
        if re.match(r"(head|head\.fc|classifier)\.(weight|bias)$", key):
            continue
        name = key
        for pattern, new in _RENAMES:
            name = re.sub(pattern, new, name)
        converted[f"network.{name}"] = value.flatten() if ".grn." in name else value
    return converted


# --------------------------------------------------------------------------------------------------------------- files


def _weights(given: str | None, url: str, what: str) -> Path:
    """The file of weights; a ZooError of one line where there is none."""
    if given is not None:
        if not Path(given).expanduser().is_file():
            raise ZooError(f"no weights of {what} {given!r}")
        return Path(given).expanduser()
    from zoo.weights import download

    target = cache_dir() / "weights" / "perceptual" / url.rpartition("/")[2]
    try:
        return download.fetch([url], target).path
    except ZooError as error:
        raise ZooError(
            f"no weights of {what}: put {target.name} in {target.parent}, or name a file ({str(error).splitlines()[0]})"
        ) from error


def _filled(net: Network, state: Mapping[str, Tensor], path: Path) -> Network:
    own = {key: value.shape for key, value in net.state_dict().items()}
    theirs = {key: value.shape for key, value in state.items()}
    if odd := sorted(own.items() ^ theirs.items()):
        raise ZooError(f"{path}: not the weights of {type(net).__name__}: {odd[0][0]} differs, {len(odd)} such in all")
    net.load_state_dict(dict(state), assign=True)
    return net.requires_grad_(False).eval()

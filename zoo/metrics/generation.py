"""How well a set of generated pictures matches real ones: Fréchet and kernel distances, Inception score, precision and
recall, as functions of features and as one torchmetrics metric.

The functions compute in float64 what torch-fidelity does (0.4; it takes the mean in float32), and need no network.
Which features, how pictures are resized for them, how they become bytes and what they are compared with changes every
number: :meth:`GenerationMetrics.protocol` says it, and only features of the 2015 Inception network may be called FID,
IS and KID. Others go by their extractor's name ("frechet_random").
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.utilities import dim_zero_cat

from zoo import files
from zoo.errors import MissingPackage, ZooError, unknown
from zoo.metrics.gathered import Gathered
from zoo.paths import cache_dir

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d"  # its beginning, which the file's name carries
METRICS = ("fid", "is", "kid", "precision_recall")
Resize = Literal["tf1", "antialias"]
Rounding = Literal["adm", "round", "floor"]

# ------------------------------------------------------------------------------------------------------------ pictures


def to_uint8(images: Tensor, rounding: Rounding = "adm") -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] as bytes, by the rounding of a protocol.

    "adm": 127.5 x + 128, cut off (DiT, SiT, MeanFlow); "round": 255 (x + 1) / 2 to the nearest (MAR, JiT); "floor": the
    same, cut off (MeanFlow on CIFAR-10).
    """
    if rounding == "adm":
        return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
    if rounding not in ("round", "floor"):
        raise unknown("rounding", rounding, ("adm", "round", "floor"))
    values = (images * 0.5 + 0.5).clamp(0, 1) * 255
    return (values.round() if rounding == "round" else values.floor()).to(torch.uint8)


def tf1_resize(images: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Bilinear resize (B, C, H, W) to (B, C, *size) as TensorFlow 1 does it: pixel k lies at k times in / out, without
    the half pixel that other libraries add, and the border is repeated. The Inception network of FID expects it. With
    `align_corners` the corners stay where they are."""
    lows, highs, shares = [], [], []
    for old, new in zip(images.shape[-2:], size, strict=True):
        place = torch.arange(new, dtype=images.dtype, device=images.device)
        step = (old - 1) / max(1, new - 1) if align_corners else old / new
        place = place * torch.tensor(step, dtype=torch.float32, device=images.device)  # the graph's precision
        low = place.long().clamp(max=old - 1)
        lows.append(low)
        highs.append((low + 1).clamp(max=old - 1))
        shares.append(place - low)
    above, below = images[..., lows[0], :], images[..., highs[0], :]
    left, right = (torch.stack([above, below])[..., at] for at in (lows[1], highs[1]))
    across = left + (right - left) * shares[1]
    return across[0] + (across[1] - across[0]) * shares[0][:, None]


# --------------------------------------------------------------------------------------------- functions of features


@dataclass(frozen=True)
class Statistics:
    """What a set of pictures is compared with: the mean (D,) and covariance (D, D) of its features, float64, and, for
    distances that want them, the features (N, D) themselves. `facts` of the extractor, where they are known."""

    mean: Tensor
    covariance: Tensor
    features: Tensor | None = None
    name: str = ""
    facts: dict[str, Any] | None = None

    @staticmethod
    def of(features: Tensor, name: str = "") -> Statistics:
        """Of features (N, D), N >= 2; the covariance divides by N - 1."""
        if features.ndim != 2 or len(features) < 2:
            raise ZooError(f"statistics want features of 2 samples or more, not of shape {tuple(features.shape)}")
        x = features.double()
        return Statistics(x.mean(dim=0), torch.cov(x.T).reshape(x.shape[1], x.shape[1]), features, name)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Statistics:
        """From an npz file: ``mu`` and ``sigma`` (torch-fidelity, ADM), or ``ref_mu`` and ``ref_sigma`` (MeanFlow);
        ``features`` if it has them. The pictures of ADM's files (``arr_0``) are :func:`read_pictures`'s.

        Raises:
            ZooError: no such file, no npz, or not these arrays.
        """
        with _npz(path) as file:
            names = next((n for n in (("mu", "sigma"), ("ref_mu", "ref_sigma")) if set(n) <= set(file.files)), None)
            if names is None:
                raise ZooError(f"{path}: no mu and sigma (or ref_mu and ref_sigma); it has {', '.join(file.files)}")
            mean, covariance = (torch.from_numpy(np.asarray(file[name], np.float64)) for name in names)
            features = torch.from_numpy(file["features"]) if "features" in file.files else None
            facts = json.loads(str(file["facts"])) if "facts" in file.files else None
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ZooError(f"{path}: a mean of shape {tuple(mean.shape)} beside a covariance {tuple(covariance.shape)}")
        return Statistics(mean, covariance, features, Path(path).name, facts)

    def write(self, path: str | os.PathLike[str], features: bool = False) -> None:
        """As npz with ``mu`` and ``sigma``, which torch-fidelity reads too; with `features` for KID, precision and
        recall. What the extractor was goes along, and :class:`GenerationMetrics` refuses another one."""
        if Path(path).suffix != ".npz":
            raise ZooError(f"statistics are written as .npz, not {str(path)!r}")
        arrays: dict[str, Any] = {"mu": self.mean.cpu().numpy(), "sigma": self.covariance.cpu().numpy()}
        if self.facts is not None:
            arrays["facts"] = np.array(json.dumps(self.facts))
        if features:
            if self.features is None:
                raise ZooError(f"these statistics ({self.name or 'unnamed'}) hold no features to write")
            arrays["features"] = self.features.cpu().numpy()
        with files.replacing(Path(path)) as part, part.open("wb") as file:
            np.savez(file, **arrays)


def has_pictures(path: str | os.PathLike[str]) -> bool:
    """Whether an npz file holds pictures for :func:`read_pictures`."""
    with _npz(path) as file:
        return "arr_0" in file.files


def read_pictures(path: str | os.PathLike[str]) -> Tensor:
    """The pictures ``arr_0`` (N, H, W, 3) uint8 of one of ADM's npz files, as (N, 3, H, W)."""
    with _npz(path) as file:
        if "arr_0" not in file.files:
            raise ZooError(f"{path}: no pictures (arr_0); it has {', '.join(file.files)}")
        pictures = torch.from_numpy(file["arr_0"])
    if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != torch.uint8:
        raise ZooError(f"{path}: arr_0 is {pictures.dtype} {tuple(pictures.shape)}, not uint8 (N, H, W, 3)")
    return pictures.permute(0, 3, 1, 2)


@contextlib.contextmanager
def _npz(path: str | os.PathLike[str]) -> Any:
    try:
        with np.load(path, allow_pickle=False) as file:
            if not hasattr(file, "files"):
                raise ZooError(f"{path}: one array, not an npz file")
            yield file
    except FileNotFoundError as error:
        raise ZooError(f"no file {str(path)!r}") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ZooError(f"{path}: not a whole npz file ({str(error).splitlines()[0]})") from error


def frechet_distance(first: Statistics, second: Statistics) -> Tensor:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians (Heusel et al. 2017, arXiv 1706.08500), float64.

    The trace of the root is the sum of the roots of the eigenvalues of S1 S2.
    """
    if first.mean.shape != second.mean.shape:
        raise ZooError(
            f"features of {len(first.mean)} and of {len(second.mean)} numbers cannot be compared: the statistics are"
            " of another extractor"
        )
    a, b = (s.covariance.double().cpu() for s in (first, second))  # not every accelerator has eigenvalues in float64
    roots = torch.linalg.eigvals(a @ b).sqrt().real.sum()
    shift = (first.mean.double().cpu() - second.mean.double().cpu()).square().sum()
    return shift + a.trace() + b.trace() - 2 * roots


def inception_score(logits: Tensor, splits: int = 10, seed: int | None = 2020) -> tuple[Tensor, Tensor]:
    """exp E KL(p(y|x) | p(y)) of logits (N, K) (Salimans et al. 2016, arXiv 1606.03498): mean and deviation (ddof 0)
    over `splits` parts, after a permutation by NumPy's legacy generator; `seed` None keeps the order, which ruins the
    score of samples that stand in the order of their classes."""
    count = len(logits)
    if not 1 <= splits <= count:
        raise ZooError(f"the Inception score of {count} samples cannot be taken over {splits} splits")
    if seed is not None:
        order = np.random.RandomState(seed).permutation(count)
        logits = logits[torch.from_numpy(order).to(logits.device)]
    log_p = logits.double().log_softmax(dim=1)
    scores = []
    for n in range(splits):
        part = log_p[n * count // splits : (n + 1) * count // splits]
        marginal = part.exp().mean(dim=0, keepdim=True)
        scores.append((part.exp() * (part - marginal.log())).sum(dim=1).mean().exp())
    each = torch.stack(scores)
    return each.mean(), each.std(correction=0)


def kernel_distance(
    generated: Tensor, real: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[Tensor, Tensor]:
    """Unbiased squared MMD of features (N, D) and (M, D) under the kernel (x y / D + 1)^3 (Bińkowski et al. 2018, arXiv
    1801.01401): mean and deviation (ddof 0) over subsets drawn without replacement, generated first, by NumPy's legacy
    generator."""
    if min(len(generated), len(real)) < subset_size or subset_size < 2:
        raise ZooError(
            f"subsets of {subset_size} samples cannot be drawn from {len(generated)} generated and {len(real)} real"
            " ones: lower kid_subset_size (2 at least)"
        )
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = (
            f[torch.from_numpy(draw.choice(len(f), subset_size, replace=False)).to(f.device)].double()
            for f in (generated, real)
        )
        xx, yy, xy = (((a @ b.T) / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        values.append(within / (subset_size * (subset_size - 1)) - 2 * xy.mean())
    each = torch.stack(values)
    return each.mean(), each.std(correction=0)


def precision_recall(generated: Tensor, real: Tensor, k: int = 3, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Shares of the generated features (N, D) that lie within the k-nearest-neighbour balls of the real ones (M, D),
    and of the real ones within those of the generated (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""
    if min(len(generated), len(real)) <= k or k < 1:
        raise ZooError(f"precision and recall with k {k} want more than {max(k, 1)} samples on both sides")

    def covered(points: Tensor, centres: Tensor) -> Tensor:
        # The nearest of a centre is itself.
        radius = torch.cat([torch.cdist(c, centres).kthvalue(k + 1).values for c in centres.split(chunk)])
        return torch.cat([(torch.cdist(p, centres) <= radius).any(dim=1) for p in points.split(chunk)]).double().mean()

    x, y = generated.double(), real.double()
    return covered(x, y), covered(y, x)


# ---------------------------------------------------------------------------------------------------------- extractors


class Extractor(nn.Module):
    """Features of pictures, never trained: uint8 (B, 3, H, W) to features (B, D) and logits (B, K) or None.

    Attributes:
        name: by which its numbers go.
        is_inception: whether they may be called FID, IS and KID.
        facts: what of it belongs to the protocol.
    """

    name = "features"
    is_inception = False
    facts: dict[str, Any]

    def train(self, mode: bool = True) -> Extractor:
        return super().train(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


class InceptionFeatures(Extractor):
    """The Inception network of FID (2015, TensorFlow's graph, by way of torch-fidelity): pool_3 (2048) and the 1008
    logits without bias.

    Args:
        weights: the file; None: ``ZOO_INCEPTION``, the cache, or the download of :data:`INCEPTION_URL` (91 MB).
        resize: to 299 pixels: "tf1" as the graph does (:func:`tf1_resize`), or "antialias", the default of
            torchmetrics and so of papers that report it. The two give different numbers.

    Raises:
        ZooError: torch-fidelity is missing, or the weights cannot be had.
    """

    name = "inception"
    is_inception = True

    def __init__(self, weights: str | None = None, resize: Resize = "tf1") -> None:
        super().__init__()
        if resize not in ("tf1", "antialias"):
            raise unknown("resize", resize, ("tf1", "antialias"))
        path = _inception_weights(weights)
        from torchmetrics.image.fid import FrechetInceptionDistance

        from zoo.weights.pretrained import read_state_dict

        # The file is untrusted: its tensors alone go on to the library, which would unpickle anything.
        with tempfile.TemporaryDirectory() as folder:
            clean = Path(folder) / "inception.pth"
            torch.save(read_state_dict(path), clean)
            try:
                metric = FrechetInceptionDistance(
                    feature=2048, antialias=resize == "antialias", feature_extractor_weights_path=str(clean)
                )
            except RuntimeError as error:
                raise ZooError(f"{path}: not the weights of FID's Inception network") from error
        self.net: Any = metric.inception.requires_grad_(False).eval()
        self.facts = {"features": "inception-2015-12-05 pool_3", "resize": resize}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            features = self.net(images)
            return features, features @ self.net.fc.weight.T


def _inception_weights(weights: str | None) -> Path:
    """The file of the Inception weights; a ZooError of one line where there is none."""
    from importlib.util import find_spec

    if find_spec("torch_fidelity") is None:
        raise MissingPackage("FID wants the package torch-fidelity: pip install 'paperzoo[generation]'")
    given = weights or os.environ.get("ZOO_INCEPTION")
    if given:
        if not Path(given).expanduser().is_file():
            raise ZooError(f"no Inception weights {given!r}")
        return Path(given).expanduser()
    from zoo.weights import download

    target = cache_dir() / "weights" / "inception" / INCEPTION_URL.rpartition("/")[2]
    try:
        path = download.fetch([INCEPTION_URL], target).path
    except ZooError as error:
        raise ZooError(
            f"no Inception weights, and so no FID: put {target.name} in {target.parent} or name it by ZOO_INCEPTION,"
            f" or take other features, which are not called FID (extractor: random) ({str(error).splitlines()[0]})"
        ) from error
    with path.open("rb") as file:
        if not hashlib.file_digest(file, "sha256").hexdigest().startswith(INCEPTION_SHA256):
            download.forget(target)
            raise ZooError(f"{INCEPTION_URL} gave another file: its sha256 does not begin with {INCEPTION_SHA256}")
    return path


class RandomFeatures(Extractor):
    """Features of a convolutional network with random weights, for machines without Inception: a coarse distance that
    sees colour, texture and layout, not objects.

    Pictures become 32 x 32; three convolutions with stride and ReLU; means and deviations over the four quarters.
    Weights are orthogonal, from NumPy's generator, and the same everywhere.

    Args:
        width: of the convolutions; there are 8 x `width` features.
        seed: of the weights.
    """

    name = "random"

    def __init__(self, width: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.facts = {"features": f"random convolutions, width {width}, seed {seed}"}
        draw = np.random.RandomState(seed)
        self.layers = nn.ModuleList()
        for inputs, stride in ((3, 1), (width, 2), (width, 2)):
            layer = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
            weight = draw.standard_normal((width, inputs * 9)).astype(np.float32)
            q, r = np.linalg.qr(weight.T if width <= inputs * 9 else weight)
            q = q * np.sign(np.diag(r))
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy((q.T if width <= inputs * 9 else q).reshape(layer.weight.shape)))
            self.layers.append(layer)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(images.device.type, enabled=False):
            x = images.float() / 127.5 - 1
            x = nn.functional.interpolate(x, size=(32, 32), mode="bilinear", antialias=True)
            for layer in self.layers:
                x = layer(x).relu() * 1.5
            quarters = x.unflatten(3, (2, -1)).unflatten(2, (2, -1)).permute(0, 1, 2, 4, 3, 5).flatten(4)
            parts = [quarters.mean(dim=-1), quarters.std(dim=-1)]
            return torch.cat([part.flatten(1) for part in parts], dim=1), None


class ClassifierFeatures(Extractor):
    """Features and logits of a classifier with timm's protocol (`forward_features`, `forward_head`), trained elsewhere.

    Args:
        network: the classifier.
        name: by which its numbers go.
        mean, std: by which it wants pictures in [0, 1] normalised.
    """

    def __init__(self, network: nn.Module, name: str, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not name or "inception" in name.lower() or name.lower() in ("fid", "is", "kid"):
            raise ZooError(f"features of a classifier of one's own cannot be named {name!r}")
        self.network, self.name = network.requires_grad_(False).eval(), name
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.facts = {"features": name}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (images.float() / 255 - self.get_buffer("mean")) / self.get_buffer("std")
        tokens = self.network.forward_features(x)  # type: ignore[operator]
        features = self.network.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
        return features.flatten(1), self.network.forward_head(tokens)  # type: ignore[operator]


EXTRACTORS = {"inception": InceptionFeatures, "random": RandomFeatures}


def make_extractor(extractor: str | Extractor, **options: Any) -> Extractor:
    """An extractor by name ("inception" with `weights` and `resize`, "random" with `width` and `seed`), or as it is."""
    if isinstance(extractor, Extractor):
        return extractor
    if extractor not in EXTRACTORS:
        raise unknown("extractor", extractor, EXTRACTORS)
    kind: Any = EXTRACTORS[extractor]
    try:
        return kind(**options)
    except TypeError as error:
        raise ZooError(f"extractor {extractor}: {str(error).partition('()')[2].strip() or error}") from error


# -------------------------------------------------------------------------------------------------------------- metric


class GenerationMetrics(Gathered):
    """Distances of generated pictures from real ones; exact, and the same for any number of processes and batches.

    `update` takes pictures with the index of each; `compute` puts those of all processes in the order of their indices,
    counts each index once, and returns, of the metrics asked for, {"fid", "is", "is_std", "kid", "kid_std",
    "precision", "recall"}; of other features than Inception's, {"frechet_NAME", "score_NAME", "kernel_NAME", ...}.

    Args:
        extractor: see :func:`make_extractor`.
        metrics: of :data:`METRICS`. All but "is" want a reference; "kid" and "precision_recall" one with features.
        reference: what the pictures are compared with; it can be set later.
        is_splits: parts of the Inception score.
        kid_subsets, kid_subset_size: of the kernel distance.
        neighbours: k of precision and recall.
        seed: of NumPy's generator in IS and KID.
    """

    sample = "generated picture"
    features: list[Tensor]
    logits: list[Tensor]
    indices: list[Tensor]

    def __init__(
        self,
        extractor: str | Extractor = "inception",
        metrics: Sequence[str] = ("fid",),
        reference: Statistics | None = None,
        is_splits: int = 10,
        kid_subsets: int = 100,
        kid_subset_size: int = 1000,
        neighbours: int = 3,
        seed: int = 2020,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name in metrics:
            if name not in METRICS:
                raise unknown("metric of generation", name, METRICS)
        self.extractor, self.metrics, self.reference = make_extractor(extractor), tuple(metrics), reference
        self.is_splits, self.kid_subsets, self.kid_subset_size = is_splits, kid_subsets, kid_subset_size
        self.neighbours, self.seed = neighbours, seed
        for state in ("features", "logits", "indices"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """Whether a higher value is better; None where the metrics asked for differ in it."""
        better = {name in ("is", "precision_recall") for name in self.metrics}
        return better.pop() if len(better) == 1 else None

    @torch.no_grad()
    def update(self, images: Tensor, index: Tensor) -> None:
        """Adds generated pictures, uint8 (B, 3, H, W), with their indices (B,)."""
        if images.dtype != torch.uint8:
            raise ZooError(f"pictures are compared as bytes (to_uint8), not as {images.dtype}")
        self._count()
        features, logits = self.extractor(images)
        self.features.append(features)
        self.indices.append(index.to(features.device))
        if "is" in self.metrics:
            if logits is None:
                raise ZooError(f"features of {self.extractor.name!r} come without logits: no score (is) without them")
            self.logits.append(logits)

    def compute(self) -> dict[str, Tensor]:
        self._require()
        index = dim_zero_cat(self.indices)
        order = index.argsort(stable=True)
        fresh = torch.ones_like(index, dtype=torch.bool)
        fresh[1:] = index[order][1:] != index[order][:-1]
        order = order[fresh]
        features = dim_zero_cat(self.features)[order]
        found: dict[str, Tensor] = {}
        for name in self.metrics:
            if name == "is":
                mean, std = inception_score(dim_zero_cat(self.logits)[order], self.is_splits, self.seed)
                found |= {"is": mean, "is_std": std}
                continue
            reference = self._reference(name)
            if name == "fid":
                found["fid"] = frechet_distance(Statistics.of(features), reference)
                continue
            assert reference.features is not None
            real = reference.features.to(features.device)
            if name == "kid":
                mean, std = kernel_distance(features, real, self.kid_subsets, self.kid_subset_size, self.seed)
                found |= {"kid": mean, "kid_std": std}
            else:
                precision, recall = precision_recall(features, real, self.neighbours)
                found |= {"precision": precision, "recall": recall}
        return {self.label(name): value for name, value in found.items()}

    def label(self, name: str) -> str:
        """What a number goes by: FID, IS and KID are those of Inception features alone."""
        if self.extractor.is_inception:
            return name
        plain = {"fid": "frechet", "is": "score", "is_std": "score_std", "kid": "kernel", "kid_std": "kernel_std"}
        return f"{plain.get(name, name)}_{self.extractor.name}"

    def _reference(self, name: str) -> Statistics:
        if self.reference is None:
            raise ZooError(f"{name} wants the statistics of real pictures (reference)")
        if self.reference.facts not in (None, self.extractor.facts):
            raise ZooError(
                f"the reference {self.reference.name} was made with {self.reference.facts}, and the features of samples"
                f" are {self.extractor.facts}: they cannot be compared"
            )
        if name != "fid" and self.reference.features is None:
            raise ZooError(
                f"{name} wants the features of real pictures, and the reference {self.reference.name or ''} holds their"
                " statistics only"
            )
        return self.reference

    def protocol(self) -> dict[str, Any]:
        """What must agree for two numbers to be compared, but for the samples themselves."""
        facts: dict[str, Any] = dict(self.extractor.facts)
        facts["reference"] = self.reference.name if self.reference else None
        if "is" in self.metrics:
            facts |= {"is_splits": self.is_splits, "seed": self.seed}
        if "kid" in self.metrics:
            facts |= {"kid_subsets": self.kid_subsets, "kid_subset_size": self.kid_subset_size, "seed": self.seed}
        if "precision_recall" in self.metrics:
            facts["neighbours"] = self.neighbours
        return facts

"""Torch7 files of pre-activation ResNets in the three published layouts: networks that compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from tests.formats.test_torch7 import write
from tests.formats.torch7_resnets import official_tree, run_tree
from zoo import catalog
from zoo.data.transforms import resize
from zoo.errors import ZooError
from zoo.recognition import preact_resnet as pr
from zoo.weights.pretrained import read_state_dict


@pytest.mark.parametrize(
    ("layout", "kind"),
    [("cifar", "A"), ("cifar", "B"), ("cifar", "C"), ("imagenet", "A"), ("imagenet", "C"), ("resnet-pre-act", "B")],
)
def test_torch7_networks_compute_the_same(layout: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    widths = (4, 8, 16, 32) if layout == "imagenet" else (4, 8, 16)
    tree = official_tree(layout, 2, kind, widths, 5)
    options: dict[str, Any] = {"widths": widths, "num_classes": 5, "shortcut_type": kind}
    size = {"imagenet": (18,), "cifar": (14, "basic"), "resnet-pre-act": (20, "bottleneck")}[layout]
    create: Any = pr.preact_resnet_imagenet if layout == "imagenet" else pr.preact_resnet_cifar
    network = create(*size, **options)
    state = read_state_dict(write(tmp_path / "net.t7", tree, cuda=True))
    converted = pr.convert_official(state)
    assert len([key for key in converted if not key.endswith("num_batches_tracked")]) == len(state)
    network.load_state_dict(converted, strict=True)
    images = torch.randn(2, 3, 32, 32)
    expected = run_tree(tree, images)
    torch.testing.assert_close(network.eval()(images), expected, rtol=1e-4, atol=1e-4)
    assert pr.convert_official(network.state_dict()).keys() == network.state_dict().keys()


def test_published_weights_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way from a .t7 file at an address to a network: the card's entry at a tiny size, from a local file."""
    from zoo.weights import pretrained

    torch.manual_seed(0)
    tree = official_tree("imagenet", 2, "B", (4, 8, 16, 32), 1000)
    path = write(tmp_path / "resnet-200.t7", tree, cuda=True)
    card, entry = catalog.weight("preact_resnet200.fb_in1k")
    small = {"depths": (2, 2, 2, 2), "block": "basic", "widths": (4, 8, 16, 32), "stem_width": 4}
    entry = entry.model_copy(update={"urls": [path.as_uri()], "overrides": small})
    monkeypatch.setattr(catalog, "weight", lambda name: (card, entry))
    network = zoo.create_model("preact_resnet200.fb_in1k", pretrained=True).eval()
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(network(images), run_tree(tree, images), rtol=1e-4, atol=1e-4)
    assert (pretrained.fetch_weights(entry.name)).name == "converted.safetensors"
    photo = torch.randint(0, 256, (3, 300, 401), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    seen, facts = resize(photo, (256, 342), kernel="torch7")[:, 16:240, 59:283] / 255, entry.preprocess
    expected = (seen - torch.tensor(facts.mean)[:, None, None]) / torch.tensor(facts.std)[:, None, None]
    torch.testing.assert_close(zoo.create_preprocess("preact_resnet200.fb_in1k")(photo), expected)


@pytest.mark.parametrize(
    "key",
    ["9.weight", "4.0.weight", "8.0.0.0.0.weight", "4.1.0.0.1.weight", "4.1.3.0.0.weight", "4.1.0.0.2.gamma", "x"],
)
def test_foreign_keys_are_refused(key: str) -> None:
    with pytest.raises(ZooError, match=f"unknown key '{key}'"):
        pr.convert_official({"12.weight": torch.ones(2, 2), "12.bias": torch.ones(2), key: torch.ones(2)})
    with pytest.raises(ZooError, match="unknown keys, such as 'x'"):
        pr.convert_official({"conv1.weight": torch.ones(1), "x": torch.ones(1)})

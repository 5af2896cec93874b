"""`zoo finetune`: from runs and from weights, on folders of pictures, videos and objects; the recipe that it writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torchvision.io import write_png

import zoo
from tests.command.runs_of_all import folder_with
from tests.data.test_detection_data import content, write_set
from zoo.command import finetune
from zoo.command.cli import main
from zoo.command.finetune import from_card
from zoo.data import ImageDataModule
from zoo.errors import ZooError
from zoo.training import Freeze
from zoo.weights.runs import find_checkpoint, open_run

FEW = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
FEW += ["--data.num_workers=0", "--trainer.logger=false", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    kinds = ("preact_resnet", "mae", "moco", "mask_rcnn", "slowfast", "meanflow")
    for place in folder_with(tmp_path_factory, *(f"{kind}/pocket" for kind in kinds)):
        source = ImageDataModule("shapes", image_size=32).source("test")
        for n in range(24):
            row = source[n]
            where = place / "pets" / ("cat" if row["label"] < 5 else "dog") / f"{n:02d}.png"
            where.parent.mkdir(parents=True, exist_ok=True)
            write_png(row["image"], str(where))
        for n, name in enumerate(("fall", "rise", "fall", "rise")):
            folder = place / "films" / name / str(n)
            folder.mkdir(parents=True)
            for k in range(6):
                write_png(torch.randint(0, 255, (3, 40, 50), dtype=torch.uint8), str(folder / f"{k}.png"))
        write_set(place / "objects", content(4), "mine.json", "images")
        yield place


def _state(name: str) -> dict[str, torch.Tensor]:
    return open_run(name).network.state_dict()


def test_a_classifier_learns_other_classes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is said, the recipe, the weights it starts from, and that its recipe is one again."""
    assert (
        main(["finetune", "runs:preact_resnet", "pets", "--epochs", "1", "--batch", "2", "--name", "pets", *FEW]) == 0
    )
    out = capsys.readouterr().out
    assert "22 pictures of 2 classes, every tenth held out (2)" in out
    assert "learning rate 0.005: 0.01 for 4" in out  # a tenth of 0.1, which was for batches of 4
    assert "runs:finetune/pets" in out
    run = open_run("runs:finetune/pets")
    assert run.classes == ["cat", "dog"]
    before = open_run("runs:preact_resnet").facts["preprocess"]
    assert {key: run.facts["preprocess"][key] for key in ("size", "mean", "std")} == {
        key: before[key] for key in ("size", "mean", "std")
    }
    assert run.folder is not None
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["init_from"] == str(find_checkpoint("runs:preact_resnet"))
    assert main(["predict", "runs:finetune/pets", "pets/cat", "--top", "1"]) == 0
    assert "dog" in (said := capsys.readouterr().out) or "cat" in said
    small = ["--trainer.max_steps=1", "--new_run=true", *FEW[2:]]
    assert main(["fit", str(run.folder / "config.yaml"), *small]) == 0
    assert "finetune/pets" in capsys.readouterr().out
    assert main(["finetune", "runs:finetune/pets", "pets", "--epochs", "1", "--lr", "0", *FEW]) == 2
    assert (
        main(["finetune", "runs:finetune/pets", "pets", "--epochs", "1", "--lr", "1e-9", "--name", "again", *FEW]) == 0
    )
    was, now = _state("runs:finetune/pets"), _state("runs:finetune/again")
    assert all(
        value.allclose(now[key], atol=1e-6) for key, value in was.items() if key.endswith("weight") and "fc" not in key
    )


@pytest.mark.parametrize(("kind", "head"), [("mae", "head"), ("moco", "fc")])
def test_a_pre_training_gets_a_classifier(kind: str, head: str, here: Path) -> None:
    """Frozen, the trunk stays as it was to the last bit, running statistics too; the classifier alone moves."""
    name = f"runs:finetune/{kind}"
    assert main(["finetune", f"runs:{kind}", "pets", "--epochs", "1", "--freeze", "--name", kind, *FEW]) == 0
    task = open_run(name).task
    own = dict(open_run(f"runs:{kind}").network.state_dict())
    prefix = {"mae": "", "moco": "encoder_q."}[kind]
    state = task.network.state_dict()
    kept = [key for key in state if prefix + key in own and not key.startswith(("head", "fc"))]
    assert len(kept) > 8
    assert all(state[key].equal(own[prefix + key]) for key in kept if "pos_embed" not in key)
    config = yaml.safe_load((find_checkpoint(name).parent.parent / "config.yaml").read_text())
    frozen = [one for one in config["trainer"]["callbacks"] if one["class_path"] == "zoo.training.Freeze"]
    assert frozen == [{"class_path": "zoo.training.Freeze", "init_args": {"but": [head]}}]
    with pytest.raises(ZooError, match="unknown part"):
        Freeze(["nix"]).setup(None, task, "fit")  # type: ignore[arg-type]


def test_videos_and_objects(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "runs:slowfast", "films", "--epochs", "1", "--name", "films", *FEW]) == 0
    assert open_run("runs:finetune/films").classes == ["fall", "rise"]
    assert main(["finetune", "runs:mask_rcnn", "objects", "--epochs", "1", "--name", "objects", *FEW]) == 0
    run = open_run("runs:finetune/objects")
    assert run.facts["data"]["num_classes"] == len(run.classes or [])
    was, now = open_run("runs:mask_rcnn").network, run.network
    assert type(was) is type(now)
    capsys.readouterr()
    for words, line in (
        (["runs:slowfast", "pets"], "is a set of pictures; SlowFastClassification learns from videos"),
        (["runs:meanflow", "pets"], "learns labels from its network"),
        (["runs:preact_resnet", "nowhere"], "unknown dataset"),
        (["nix", "pets"], "unknown model"),
        (["runs:preact_resnet", "pets/cat"], "has no classes"),
    ):
        assert main(["finetune", *words, *FEW]) == 2
        assert line in capsys.readouterr().err


def test_from_a_file_of_weights(here: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = zoo.create_model("preact_resnet110_cifar")
    save_file(net.state_dict(), "weights.safetensors")
    words = ["finetune", "preact_resnet110_cifar", "pets", "--weights", "weights.safetensors", "--freeze"]
    assert main([*words, "--epochs", "1", "--name", "file", *FEW]) == 0
    state = _state("runs:finetune/file")
    assert all(state[key].equal(value) for key, value in net.state_dict().items() if not key.startswith("fc"))
    assert open_run("runs:finetune/file").facts["preprocess"]["size"] == 32


@pytest.mark.parametrize(
    ("name", "task", "options"),
    [
        ("mae_vit_large_patch16.in1k_1600ep", "MAEFineTuning", {"embed_dim": 1024, "global_pool": "avg"}),
        ("moco_v2_resnet50_trunk.in1k_800ep", "MoCoFineTuning", {"arch": "resnet50"}),
        ("moco_v3_vit_small.in1k_300ep", "MoCoV3FineTuning", {"arch": "vit_small"}),
        ("preact_resnet200.fb_in1k", "PreActResNetClassification", {"depths": [3, 24, 36, 3]}),
        ("mask_rcnn_r101_c4.coco_3x", "MaskRCNNDetection", {"design": "c4"}),
        ("slowfast_r50_8x8.k400", "SlowFastClassification", {"alpha": 4, "fusion_kernel": 7}),
    ],
)
def test_published_weights_find_their_task(name: str, task: str, options: dict[str, object]) -> None:
    start = from_card(name, None)
    assert start.task.__name__ == task
    assert start.source == name
    assert {key: start.options[key] for key in options} == options


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pets/cat", "--epochs", "1"], "has no classes"),
        (["objects"], "is a set of pictures with boxes"),
        (["alone"], "one class alone, 'dog'"),
        (["pets", "--lr", "inf"], "--lr is a number above 0"),
        (["pets", "--name", "../../x"], "cannot name a folder under runs/"),
    ],
)
def test_what_trains_nothing(words: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "alone" / "dog").mkdir(parents=True, exist_ok=True)
    for n in range(4):
        write_png(torch.zeros(3, 32, 32, dtype=torch.uint8), str(here / "alone" / "dog" / f"{n}.png"))
    assert main(["finetune", "runs:preact_resnet", *words]) == 2
    assert said in capsys.readouterr().err


def test_options_of_a_fit_are_handed_on() -> None:
    words = [
        "--logger",
        "csv",
        "--logger",
        "wandb",
        "runs:x",
        "--trainer.devices",
        "4",
        "pets",
        "--report=false",
        "--lr",
        "1",
    ]
    own, further = finetune._split(words)
    assert own == ["runs:x", "pets", "--lr", "1"]
    assert further == ["--logger", "csv", "--logger", "wandb", "--trainer.devices", "4", "--report=false"]

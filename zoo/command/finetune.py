"""`zoo finetune MODEL FOLDER`: the recipe of the commonest job, written and run."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from zoo import catalog
from zoo.command import recipes
from zoo.command.common import Parser
from zoo.command.runs import safe_name
from zoo.errors import ZooError
from zoo.nn.bounded import bounded_networks
from zoo.training import Classification, LinearClassification
from zoo.training.detection import Detection
from zoo.training.video import ActionDetection, MultiLabelVideoClassification, VideoClassification
from zoo.weights.pretrained import Architecture, paper_module, shapes
from zoo.weights.runs import RunModel, check_class_paths, is_run, open_run

# Settings of a recipe's data that are about its own set, or are said anew.
_OF_DATASET = {"dataset", "data_dir", "options", "train_samples", "batch_size", "num_workers", "seed", "epoch_samples"}
# Options of a task that the data give, or that are said anew.
_SAID_ANEW = {"optim", "init_from", "num_classes", "num_tasks", "img_size", "mixup", "cutmix", "bn_splits"}
# How many samples a run sees, how many epochs at least and at most, and the largest batch, by kind of data.
_LENGTHS = {"image": (20_000, 5, 50, 64), "objects": (6_000, 6, 50, 8), "clip": (4_000, 5, 40, 8)}
_WHAT = {"image": "pictures", "objects": "pictures with boxes", "clip": "videos"}
_DATA = {
    "image": "zoo.data.ImageDataModule",
    "objects": "zoo.data.detection.DetectionDataModule",
    "clip": "zoo.data.VideoDataModule",
}


def parser() -> Parser:
    found = Parser(
        prog="zoo finetune",
        description="Trains a model on a folder of yours, from published weights or from a run.",
        epilog="zoo finetune runs:mae ./flowers --epochs 20; zoo finetune mask_rcnn_r50_fpn.coco_3x ./coco_like."
        " Further options go to the recipe: --trainer.devices 4 --data.num_workers 2 --logger csv",
    )
    found.add_argument("model", help="published weights, a model's name, or a run: runs/..., runs:RECIPE, a checkpoint")
    found.add_argument(
        "folder", help="a folder a class (of pictures or videos), one in COCO's format, or a dataset's name"
    )
    found.add_argument("--epochs", type=int, help="default: by the size of the data")
    found.add_argument("--lr", type=float, help="the peak learning rate, as it stands")
    found.add_argument("--batch", type=int, help="samples a step on each device; the learning rate follows, linearly")
    found.add_argument("--freeze", action="store_true", help="train the last layers only (of a detector, its heads)")
    found.add_argument("--name", help="of the runs: they lie under runs/finetune/NAME")
    found.add_argument("--weights", metavar="FILE", help="a file of weights instead of the published ones")
    found.add_argument("--data_dir", metavar="FOLDER", help="where a dataset that is named lies")
    return found


def main(words: Sequence[str], debug: bool = False) -> int:
    """Runs ``zoo finetune WORDS``."""
    own, further = _split(words)
    given = parser().parse_args(own)
    for name in ("epochs", "lr", "batch"):
        if (value := getattr(given, name)) is not None and not 0 < value < math.inf:
            raise ZooError(f"--{name} is a number above 0, not {value}")
    start = _start(given.model, given.weights)
    data = _count(given.folder, given.data_dir, start, further)
    recipe, said = _recipe(start, data, given)
    name = safe_name(f"finetune/{given.name or _label(given.model, given.folder)}", "")
    if not name:
        raise ZooError(f"--name {given.name}: cannot name a folder under runs/")
    print("\n".join(said), flush=True)
    with tempfile.TemporaryDirectory(prefix="zoo-") as place:
        path = Path(place) / "recipe.yaml"
        text = yaml.safe_dump(recipe, sort_keys=False)
        path.write_text(f"# recipe: {name}\n{text}", encoding="utf-8")
        code = recipes.run("fit", str(path), further, debug)
    if code == 0 and not any(word.startswith("--trainer.fast_dev_run") for word in further):
        print(f"the recipe is the run's config.yaml; use it as runs:{name}: zoo predict runs:{name} FILE -o OUT.png")
    return code


_OF_FIT = ("--seed_everything", "--config", "--average", "--logger", "--report", "--ckpt_path", "--new_run")


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own words, and those of the recipe: options with a dot in them and those of a fit, with their values."""
    own: list[str] = []
    further: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        key, equals, _ = word.partition("=")
        if key.startswith("--") and ("." in key or key in _OF_FIT):
            further.append(word)
            if not equals and position < len(words) and not words[position].startswith("--"):
                further.append(words[position])
                position += 1
        else:
            own.append(word)
    return own, further


def _label(model: str, folder: str) -> str:
    """A name for the runs: of the model and of the folder."""
    if is_run(model):
        recipe = str((open_run(model).facts["recipe"] or {}).get("name") or "run")
        model = recipe.removeprefix("finetune/")
    names = (model, Path(folder).expanduser().resolve().name or "data")
    return "-".join(re.sub(r"[^\w.+=@-]+", "_", name).strip("._-") or "x" for name in names)


# ----------------------------------------------------------------------------------------------------- where it starts


@dataclass
class Start:
    """What is trained, and from which weights.

    Attributes:
        kind: of data: "image", "objects" or "clip".
        task: the class.
        options: of the task, without those that the data give.
        source: of the weights, as the task's `init_from` takes it.
        data: settings of the data module that belong to the weights.
        optim: the optimiser that they were trained with, where they were trained on the same task.
    """

    kind: str
    task: type[Any]
    options: dict[str, Any]
    source: str
    data: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] | None = None


def _start(model: str, weights: str | None) -> Start:
    if is_run(model):
        if weights is not None:
            raise ZooError("--weights goes with a published model; a run has weights of its own")
        return _from_run(open_run(model))
    return from_card(model, weights)


def _kind(task: type[Any]) -> str | None:
    """The kind of data that a task learns labels from; None for tasks that are no such."""
    if issubclass(task, Detection):
        return "objects"
    if issubclass(task, VideoClassification):
        return None if issubclass(task, ActionDetection | MultiLabelVideoClassification) else "clip"
    if issubclass(task, Classification) and not issubclass(task, LinearClassification):
        return "image"
    return None


def _tasks_beside(task: type[Any]) -> list[type[Any]]:
    """The tasks of a paper that learn labels, its own one first."""
    module = importlib.import_module(task.__module__)
    beside = [
        one
        for _, one in inspect.getmembers(module, inspect.isclass)
        if one.__module__ == task.__module__ and _kind(one) is not None and one is not task
    ]
    return [task, *beside] if _kind(task) else beside


def _parameters(task: type[Any]) -> set[str]:
    """The names of a task's arguments, those of its network included."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(task, "task", fail_untyped=False)
    return set(vars(parser.get_defaults().task))


def _from_run(run: RunModel) -> Start:
    facts, own = run.facts, run.task_class
    known = facts["preprocess"] or {}
    settings = dict(((facts["recipe"] or {}).get("data") or {}).get("init_args") or {})
    reasons = []
    for task in _tasks_beside(own):
        kind, same = str(_kind(task)), task is own
        options = dict(run.options)
        if not same:
            taken = _parameters(task)
            options = {key: value for key, value in {**_stated(task), **options}.items() if key in taken}
        options = {key: value for key, value in options.items() if key not in _SAID_ANEW}
        try:
            with torch.device("meta"), bounded_networks():
                task(**options)
        except Exception as error:  # options of another kind of network
            reasons.append(f"{task.__name__}: {' '.join(str(error).split())}")
            continue
        data = {key: value for key, value in settings.items() if key not in _OF_DATASET}
        if kind == "image":
            if known.get("kind") != "image" or not known.get("size"):
                raise ZooError(f"{run.name}: its pictures were prepared in a way that is not known; see zoo show")
            data = {key: data[key] for key in ("train_transform", "eval_transform") if same and data.get(key)}
            data |= {"image_size": known["size"], "mean": list(known["mean"]), "std": list(known["std"])}
        elif kind == "objects" and data.get("image_size") is None and not data.get("eval_transforms"):
            data["image_size"] = known.get("size") or (settings.get("options") or {}).get("size")
        data = {key: value for key, value in data.items() if value is not None}
        check_class_paths([options, data], run.checkpoint)
        optim = _milder(dict(facts["options"].get("optim") or {}), settings) if same else None
        return Start(kind, task, options, str(run.checkpoint), data, optim)
    said = f" ({reasons[0]})" if reasons else ""
    raise ZooError(f"{run.name}: no task of {own.__module__.rpartition('.')[2]} learns labels from its network{said}")


def _stated(task: type[Any]) -> dict[str, Any]:
    """What the recipes of a paper that fine-tune say of the task."""
    path = f"{task.__module__}.{task.__qualname__}"
    for recipe in catalog.list_recipes("*/finetune*"):
        model = yaml.safe_load(catalog.recipe_path(recipe).read_text(encoding="utf-8"))["model"]
        if model["class_path"] == path:
            return {k: v for k, v in (model.get("init_args") or {}).items() if k not in _SAID_ANEW}
    return {}


def _milder(optim: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """A tenth of the rate that a run was trained at, for a batch as there, then along a cosine."""
    if not optim:
        return None
    batch = optim.get("global_batch") or settings.get("batch_size")
    if optim.get("lr") is not None and batch:
        optim |= {"base_lr": optim["lr"], "reference_batch": batch}
    return {**optim, "lr": None, "base_lr": optim["base_lr"] / 10, **_COSINE}


_COSINE = {
    "schedule": "cosine", "interval": "step", "first_epoch": 0, "milestones": [], "milestone_steps": [], "factors": [],
    "global_batch": None, "warmup_steps": None, "warmup_lr": None, "schedule_from": "warmup", "min_lr": 0.0,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ published ones


def from_card(name: str, weights: str | None) -> Start:
    """The task, of those that the paper's recipes and rows run, whose network the published one fits best."""
    card, model = catalog.model(name)
    entry = catalog.weight(name)[1] if "." in name else next((w for w in card.weights if w.model == model.name), None)
    if entry is None and weights is None:
        raise ZooError(f"{name!r} has no published weights to start from; give --weights FILE")
    module = paper_module(card)
    network = Architecture(card, model.name, dict(entry.overrides) if entry else {}).on_meta()
    states = [{key: torch.empty(shape, device="meta") for key, shape in shapes(network).items()}]
    if callable(convert := getattr(module, "convert_trunk", None)):
        with contextlib.suppress(ZooError):
            states.append(convert(states[0]))
    best: tuple[int, Start] | None = None
    for task, options, settings, sort in _candidates(card, model.name):
        if best is not None and sort == _PROBE:
            break
        kind = str(_kind(task))
        try:
            with torch.device("meta"):
                wanted = shapes(task(**options).network)
        except Exception:  # a row of another network
            continue
        score = max(_agreement(shapes_of, wanted) for shapes_of in states)
        if score > 0 and (best is None or score > best[0]):
            data = {key: value for key, value in settings.items() if key not in _OF_DATASET and value is not None}
            data = _pictures(model, entry) if kind == "image" else data
            kept = {key: value for key, value in options.items() if key not in _SAID_ANEW}
            best = score, Start(kind, task, kept, weights or str(entry and entry.name), data)
            if sort == _EXACT:
                break
    if best is None:
        raise ZooError(f"no recipe of {card.slug} trains {name} on labels: zoo list recipes {card.slug}")
    return best[1]


def _pictures(model: catalog.ModelEntry, entry: catalog.Weight | None) -> dict[str, Any]:
    """The settings of the data that a classifier's pictures want: those of its weights, or of the model's own set."""
    if entry is not None:
        facts: Any = entry.preprocess
        crop = {key: getattr(facts, key) for key in ("crop_pct", "interpolation", "crop_mode", "kernel")}
        if crop["interpolation"] == "lanczos":
            del crop["interpolation"]
        data = {"image_size": facts.size, "mean": list(facts.mean), "std": list(facts.std)}
        return {**data, "eval_transform": {"class_path": "zoo.data.transforms.EvalResizeCrop", "init_args": crop}}
    if model.classifier is None:
        raise ZooError(f"{model.name!r} has no published weights, and so nothing is known of its pictures")
    of = catalog.data_card(model.classifier.dataset)
    return {"image_size": model.classifier.image_size, "mean": list(of.mean or ()), "std": list(of.std or ())}


_EXACT, _LIKELY, _PROBE = range(3)  # sorts of candidates


def _candidates(card: catalog.PaperCard, model: str) -> Iterator[tuple[type[Any], dict[str, Any], dict[str, Any], int]]:
    """(task, its options, settings of the data, sort) of the paper's recipes and rows that learn labels, each once:
    rows of the model, then recipes that fine-tune, then others; last, of recipes that probe, the task beside it that
    trains end to end."""
    named: list[tuple[str, dict[str, Any], bool]] = [
        (row.recipe, row.options, row.model == model) for row in card.leaderboard if row.recipe
    ]
    named += [(recipe, {}, False) for recipe in catalog.list_recipes(f"{card.slug}/*")]

    def rank(one: tuple[str, dict[str, Any], bool]) -> tuple[bool, ...]:
        return "pocket" in one[0], not one[2], "finetune" not in one[0]

    probes, seen = [], set()
    for recipe, changes, exact in sorted(named, key=rank):
        content = yaml.safe_load(catalog.recipe_path(recipe).read_text(encoding="utf-8"))
        path = content["model"]["class_path"]
        if not path.startswith("zoo."):
            continue
        task = getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2])
        probed = issubclass(task, LinearClassification)
        if _kind(task) is None and not probed:
            continue
        parts = {part: dict(content[part].get("init_args") or {}) for part in ("model", "data")}
        for key, value in changes.items():
            part, _, inner = key.partition(".")
            if part in parts:
                _set(parts[part], inner.split("."), value)
        options = {key: value for key, value in parts["model"].items() if key not in ("optim", "init_from")}
        if (once := repr((task, options))) in seen:
            continue
        seen.add(once)
        if probed:
            probes.append((task, options, parts["data"]))
        else:
            yield task, options, parts["data"], _EXACT if exact else _LIKELY
    for task, options, settings in probes:
        for beside in _tasks_beside(task):
            taken = _parameters(beside)
            yield beside, {k: v for k, v in options.items() if k in taken}, settings, _PROBE


def _set(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    keys = [key for key in keys if key != "init_args"]
    for key in keys[:-1]:
        found = tree.get(key)
        inner = found.get("init_args") if isinstance(found, dict) and "class_path" in found else found
        tree[key] = found if isinstance(inner, dict) and inner is not found else dict(inner or {})
        tree = inner if isinstance(inner, dict) and inner is not found else tree[key]
    tree[keys[-1]] = value


def _agreement(state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Size]) -> int:
    """How many entries of a network are in `state` in the same shape; negative where one of its trunk is in another."""
    same = [key for key, shape in wanted.items() if key in state and state[key].shape == shape]
    classes = re.compile(r"(head|fc|fc_norm|classifier)\.|.*(predictor|pos_embed)")
    fresh = re.compile(r"nonlocals|num_batches_tracked|^norm\.")
    other = [k for k, shape in wanted.items() if k in state and state[k].shape != shape and not classes.match(k)]
    left = [key for key in state if key not in wanted and key.startswith(("layer", "stages", "blocks", "backbone"))]
    missing = [key for key in wanted if key not in state and not classes.match(key) and not fresh.search(key)]
    return -1 if other or left or missing else len(same)


# -------------------------------------------------------------------------------------------------------- on which data


@dataclass
class Data:
    """A set to train on: its name, samples to train on and to be judged by, and its classes."""

    dataset: str
    data_dir: str | None
    train: int
    held: int
    classes: int
    own_split: bool


def _count(folder: str, data_dir: str | None, start: Start, further: Sequence[str]) -> Data:
    """Looks the folder over.

    Raises:
        ZooError: nothing there, or data of another kind than the model learns from.
    """
    from zoo.data.video_sources import is_video_set, open_layout, open_part

    path = Path(folder).expanduser()
    dataset = str(path.resolve()) if path.exists() else folder
    video = dataset != "shapes" and is_video_set(dataset)
    mistaken = ZooError(
        f"{folder} is a set of {'videos' if video else 'pictures'}; {start.task.__name__} learns from"
        f" {_WHAT[start.kind]}"
    )
    if video and start.kind != "clip":
        raise mistaken
    if start.kind == "objects":
        from zoo.data.detection import DetectionDataModule

        module = DetectionDataModule(dataset, data_dir)
        train, held = (len(module.samples(split)) for split in ("train", "val"))
        names = module.class_names
        parts = ["train", "val"] if module._layout is None else list(module._layout.parts)
    elif start.kind == "clip":
        layout = open_layout(dataset, data_dir)
        if not layout.class_names and not video:
            raise mistaken
        if layout.kind != "label" and dataset != "shapes":
            raise ZooError(f"{folder}: its videos have several labels or boxes; fine-tune by the paper's recipe")
        train, held = (len(open_part(layout, split)) for split in ("train", "val"))
        names, parts = layout.class_names, list(layout.parts)
    else:
        from zoo.data.check import coco_of
        from zoo.data.sources import describe, open_source, split_names

        if path.is_dir() and coco_of(dataset, None, carded=False) is not None:
            raise ZooError(
                f"{folder} is a set of {_WHAT['objects']}; {start.task.__name__} learns from {_WHAT['image']}"
            )
        names = describe(dataset, data_dir).class_names
        train, held = (len(open_source(dataset, split, data_dir)) for split in ("train", "val"))
        parts = split_names(dataset, data_dir)
    limit = next((w for n, w in _pairs(further) if n in ("data.train_samples", "data.init_args.train_samples")), None)
    if limit is not None and limit.isdecimal():
        train = min(train, int(limit))
    if not names:
        raise ZooError(f"{folder}: has no classes; a folder a class gives them")
    if len(names) == 1 and start.kind != "objects":
        raise ZooError(f"{folder}: has one class alone, {names[0]!r}: there is nothing to tell apart")
    return Data(dataset, data_dir, train, held, len(names), any(part != "train" and part != "all" for part in parts))


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for position, word in enumerate(words):
        key, equals, value = word.partition("=")
        if key.startswith("--"):
            yield key[2:], value if equals else (words[position + 1] if position + 1 < len(words) else "")


# ----------------------------------------------------------------------------------------------------------- the recipe


def _recipe(start: Start, data: Data, given: Any) -> tuple[dict[str, Any], list[str]]:
    """The recipe, and what is said of it."""
    seen, least, most, largest = _LENGTHS[start.kind]
    batch = given.batch or _batch(data.train, largest, start)
    epochs = given.epochs or min(most, max(least, math.ceil(seen / max(data.train, 1))))
    taken = _parameters(start.task)
    optim = {**(start.optim or _optim(start))}
    optim["warmup_epochs"] = min(5, round(epochs / 10, 1))
    lr = optim["base_lr"] * batch / optim.get("reference_batch", 256)
    rate = f"learning rate {lr:.2g}: {optim['base_lr']:.2g} for {optim.get('reference_batch', 256)}, in proportion"
    if given.lr is not None:
        optim |= {"lr": given.lr}
        rate = f"learning rate {given.lr:g}"
    model = {**start.options, "init_from": start.source, "optim": optim}
    for name, value in (("mixup", 0.0), ("cutmix", 0.0)):
        if name in taken:
            model[name] = value
    if start.kind == "image" and data.train < 5000 and "label_smoothing" in taken and start.optim is None:
        model["label_smoothing"] = 0.1
    settings = {"dataset": data.dataset, "batch_size": batch, **start.data}
    if data.data_dir is not None:
        settings["data_dir"] = data.data_dir
    if start.kind == "image" and "train_transform" not in settings:
        settings["train_transform"] = {
            "class_path": "zoo.data.transforms.FineTuneTrain",
            "init_args": {"auto_augment": None, "random_erase": 0.0, "scale": [0.35, 1.0]},
        }
    callbacks = []
    if given.freeze:
        keep = _last_layers(start, data.classes)
        callbacks.append({"class_path": "zoo.training.Freeze", "init_args": {"but": keep}})
    recipe = {
        "seed_everything": 0,
        "model": {"class_path": f"{start.task.__module__}.{start.task.__qualname__}", "init_args": model},
        "data": {"class_path": _DATA[start.kind], "init_args": settings},
        "trainer": {
            "max_epochs": epochs,
            "precision": "bf16-mixed" if torch.cuda.is_available() and start.kind != "objects" else "32-true",
            "log_every_n_steps": max(1, min(20, data.train // max(batch, 1) // 2)),
            "check_val_every_n_epoch": max(1, epochs // 10),
            **({"callbacks": callbacks} if callbacks else {}),
        },
    }
    held = f"{data.held} to be judged by" if data.own_split else f"every tenth held out ({data.held})"
    said = [
        f"{start.task.__name__} from {start.source}" + (f", {', '.join(keep)} alone" if given.freeze else ""),
        f"{data.train} {_WHAT[start.kind]} of {data.classes} classes, {held}",
        f"{epochs} epoch{'s' * (epochs > 1)} of batches of {batch}; {rate}",
    ]
    return _plain(recipe), said


def _batch(count: int, largest: int, start: Start) -> int:
    """A power of two: at least eight steps an epoch where there are samples enough, and no more than fits a laptop."""
    size = start.data.get("image_size") or 0
    if start.kind == "objects" and (not size or size > 320):
        largest = 2
    if start.kind == "image" and size > 160:
        largest = 32
    return max(2, min(largest, 2 ** int(math.log2(max(count, 16) / 8))))


def _optim(start: Start) -> dict[str, Any]:
    """What the field fine-tunes with, by kind of network."""
    if start.kind == "objects":
        return {"name": "sgd", "base_lr": 0.005, "reference_batch": 16, "weight_decay": 1e-4, "no_decay": "norm"}
    if start.kind == "clip":
        return {"name": "sgd", "base_lr": 0.05, "reference_batch": 64, "nesterov": True, "weight_decay": 1e-4}
    with torch.device("meta"):
        network = start.task(**start.options).network
    if hasattr(network, "layer_id"):
        return {
            "name": "adamw", "base_lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.05, "layer_decay": 0.75,
        }  # fmt: skip
    return {"name": "sgd", "base_lr": 0.05, "nesterov": True, "weight_decay": 1e-4, "no_decay": "none"}


def _last_layers(start: Start, classes: int) -> list[str]:
    """The parts of the network that a new number of classes makes anew; of a detector all but its backbone."""
    with torch.device("meta"):
        one, other = (start.task(**start.options, num_classes=classes + n).network for n in (0, 1))
    if start.kind == "objects":
        return [name for name, part in one.named_children() if name != "backbone" and len(list(part.parameters()))]
    first, second = shapes(one), shapes(other)
    return sorted({key.rpartition(".")[0] for key in first if first[key] != second.get(key)})


def _plain(value: Any) -> Any:
    """`value` as YAML writes it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value

"""What a model, published or of a run, makes of files: a sheet of its own drawing, the objects it finds, the likeliest
classes, its own or any that are named, of pictures and clips, the answers to grids; and what one makes of noise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo import catalog, files
from zoo.command.common import progress
from zoo.command.drawing import draw_classes, draw_objects, draw_segments, strip
from zoo.data.panoptic import PanopticClasses, coco_panoptic, colours_of
from zoo.data.shown import name_of
from zoo.data.sources import EXTENSIONS as PICTURES
from zoo.data.sources import read_image
from zoo.data.text import WordPiece, prompts
from zoo.errors import ZooError
from zoo.metrics.zero_shot import class_features
from zoo.weights.pretrained import create_model, create_preprocess
from zoo.weights.runs import RunModel, data_module, is_run, open_run, preparation

_TOGETHER, _VIEWS = 16, 4  # pictures, and views of a video, that go through a network at a time


@dataclass
class Subject:
    """A model that is asked about files.

    Attributes:
        name: as the user wrote it.
        label: of it in the names of files.
        does: "draws" a sheet, finds "objects", parts a picture into "segments", says which "classes", or which of any
            "labels"; of videos "clips", of grids "grids".
        ask: of a prepared batch what it makes of it: sheets, probabilities (B, K), or what the network finds.
        prepare: of a file's picture, or its path.
        names: of the classes, None where they are numbers.
        mean, std: by which pictures were normalised.
        by_default: draws where no file is named.
        tasks: of grids, the names of those that it knows.
        panoptic: of segments, their categories; None where they are numbers.
    """

    name: str
    label: str
    does: str
    ask: Callable[[Any], Any]
    prepare: Callable[[Any], Any]
    names: list[str] | None = None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    by_default: bool = False
    tasks: list[str] = field(default_factory=list)
    panoptic: PanopticClasses | None = None


def predict(
    model: str,
    images: Sequence[Path],
    out: Path | None = None,
    weights: str | None = None,
    seed: int = 0,
    top: int = 5,
    threshold: float = 0.5,
    labels: Sequence[str] | None = None,
    use_ema: bool | str | None = None,
) -> list[dict[str, Any]]:
    """Runs a model on files: pictures, videos for those that classify clips, json for those that answer grids.

    A model with a method ``picture(images, mean=, std=) -> uint8 (3, H, W)`` draws, one with a method ``detect`` finds
    objects, one with ``zero_shot(images, names) -> (B, K)`` tells which of any names is likely, one that gives logits
    (B, K) classifies.

    Args:
        model: a model, with or without the tag of its weights; without, the first that its card lists are taken. Or a
            run, as of :func:`zoo.weights.runs.is_run`.
        images: the files.
        out: a ``.png`` for one file, a folder for one picture a file, or a ``.json`` for the result alone, of one that
            gives segments in COCO's panoptic format, with its PNGs in a folder of that name beside it. One that draws
            puts all files on one sheet in a ``.png``, and takes this folder by default.
        weights: load these instead of the published ones: a path, an address, or the name of other weights.
        use_ema: of a file or run that holds raw weights and their average, take the average; False: the raw ones.
        seed: of what a model draws at random, such as masks.
        top: classes named an image.
        threshold: objects of a lower score are left out.
        labels: what a zero-shot model is to choose from; ImageNet's 1000 names, of a run its classes, by default.

    Returns:
        One dict a file: {"image", "picture"}, {"image", "top": [{"label", "index", "probability"}]}, {"image",
        "segments": [{"id", "label", "thing", "index", "area", "score"}]}, {"image",
        "objects": [{"label", "index", "score", "box", "keypoints"}]} with boxes x0, y0, x1, y1 and keypoints x, y in
        pixels of the file, the best first, or {"image", "grids": [{"task", "test", "prediction"}]}; of those that are
        drawn "picture". A file among several that cannot be read gives {"image", "error"}.

    Raises:
        ZooError: no file can be read, unknown names, weights that do not match.
    """
    _one_is_there(images)
    subject = _subject(model, weights, use_ema, labels)
    many = [path for path in images if path.suffix.lower() == ".json"]
    if many and subject.does != "grids":
        raise ZooError(f"{many[0]}: {model} takes no json")
    one_sheet = subject.does in ("draws", "grids")
    if out is not None and out.suffix == ".png" and len(images) > 1 and not one_sheet:
        raise ZooError(f"{len(images)} images and one file {str(out)!r}: give a folder with -o")
    if out is not None and out.suffix and out.suffix not in (".png", ".json") and not out.is_dir():
        raise ZooError(f"-o is a .png, a .json or a folder, not {str(out)!r}")
    if subject.does == "draws" and out is not None and out.suffix == ".json":
        raise ZooError(f"{model} draws: its result is a .png, or a folder of them, not {str(out)!r}")
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        results = list(_HANDLERS[subject.does](subject, images, _Target(subject, images, out), top, threshold))
    failed = [row["error"] for row in results if "error" in row]
    if failed and len(failed) == len(results):
        raise ZooError(failed[0])
    if out is not None and out.suffix == ".json":
        whole = subject.does == "segments" and subject.panoptic is not None
        files.write_json(out, coco_panoptic(results, subject.panoptic) if whole else results)  # type: ignore[arg-type]
    return results


def _one_is_there(images: Sequence[Path]) -> None:
    """Tells of a file that is not there, or is no picture, before weights are fetched."""
    if not any(path.exists() for path in images) or (len(images) == 1 and images[0].suffix.lower() in PICTURES):
        read_image(images[0], upright=True)


# -------------------------------------------------------------------------------------------------------- what is asked


def _subject(model: str, weights: str | None, use_ema: bool | str | None, labels: Sequence[str] | None) -> Subject:
    if is_run(model):
        if weights is not None:
            raise ZooError(f"--weights goes with published models; {model} is a run, with weights of its own")
        return _of_run(open_run(model, use_ema), labels)
    return _published(model, weights, use_ema, labels)


def _published(model: str, weights: str | None, use_ema: bool | str | None, labels: Sequence[str] | None) -> Subject:
    published = _entry(model)
    kind = published.kind
    if kind == "full":
        model = published.name
    if catalog.model(model)[0].field == "video":
        if labels is not None:
            raise ZooError(f"{model} has classes of its own: labels are for models that take any names")
        return _published_clips(model, weights, use_ema)
    if kind == "encoder" and ("." in model and weights is None):
        raise ZooError(f"{model} is an encoder without a head: it neither draws nor classifies")
    prepare = create_preprocess(model)
    net: Any = create_model(model, pretrained=weights is None, weights=weights, use_ema=use_ema).eval()
    draws, free = (callable(getattr(net, name, None)) for name in ("picture", "zero_shot"))
    if labels is not None and not free:
        raise ZooError(f"{model} has classes of its own, or none: labels are for models that take any names")
    if callable(getattr(net, "segment", None)):
        classes = _panoptic_classes(net)
        return Subject(model, model, "segments", net, prepare, by_default=True, panoptic=classes)
    if callable(getattr(net, "detect", None)):
        return Subject(model, model, "objects", net, prepare, _object_names(net), by_default=True)
    if kind == "full" and not (draws or free):
        raise ZooError(f"{model} neither draws nor classifies; use it from Python: zoo.create_model({model!r})")
    facts = published.preprocess
    if draws:
        ask = lambda batch: net.picture(batch, mean=facts.mean, std=facts.std)  # noqa: E731
        return Subject(model, model, "draws", ask, prepare)
    if free:
        names = list(labels) if labels is not None else prompts("imagenet1k")[0]
        return Subject(model, model, "classes", lambda batch: net.zero_shot(batch, names), prepare, names)
    return Subject(model, model, "classes", lambda batch: _softmax(net(batch), model), prepare, _IMAGENET)


def _published_clips(model: str, weights: str | None, use_ema: bool | str | None) -> Subject:
    """A published classifier of clips, which takes the views that the tests of its own recipe or row take."""
    from zoo.command.finetune import from_card

    start = from_card(model, weights)
    module = data_module({"class_path": "zoo.data.VideoDataModule", "init_args": {**start.data, "dataset": "shapes"}})
    facts = module.preprocess_facts()
    net: Any = create_model(model, pretrained=weights is None, weights=weights, use_ema=use_ema).eval()
    about: dict[str, Any] = {"mean": facts["mean"], "std": facts["std"]}
    return Subject(
        model, model, "clips", _over_views(lambda views: net(views).softmax(-1)), preparation(facts), **about
    )


def _over_views(ask: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The mean (1, K) over the views (V, C, T, H, W) of a video, a few of them at a time."""
    return lambda views: torch.cat([ask(some) for some in views.split(_VIEWS)]).mean(dim=0, keepdim=True)


def _softmax(logits: Any, model: str) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ZooError(f"{model} neither draws nor classifies; use it from Python: zoo.create_model({model!r})")
    return logits.float().softmax(dim=1)


def _of_run(run: RunModel, labels: Sequence[str] | None) -> Subject:
    from zoo.training import Classification
    from zoo.training.arc import CanvasPrediction
    from zoo.training.video import ActionDetection, VideoClassification

    task: Any = run.task
    facts = run.facts["preprocess"] or {}
    recipe = (run.facts["recipe"] or {}).get("name") or type(task).__name__
    about: dict[str, Any] = {"name": run.name, "label": str(recipe).replace("/", "_").replace(":", "_")}
    about |= {"names": run.classes, "mean": facts.get("mean", ()), "std": facts.get("std", ())}
    net = run.network
    if labels is not None and not callable(getattr(net, "zero_shot", None)):
        raise ZooError(f"{run.name} has classes of its own, or none: labels are for models that take any names")
    prepare = run.preprocess()
    if isinstance(task, CanvasPrediction):
        ask = lambda batch: task.network(batch["image"], batch["task"], batch["mask"])  # noqa: E731
        return Subject(does="grids", ask=ask, prepare=prepare, tasks=list(facts.get("tasks") or ()), **about)
    if isinstance(task, ActionDetection):
        raise ZooError(f"{run.name} classifies boxes of a key frame, which a video alone does not give; use zoo test")
    if isinstance(task, VideoClassification):
        ask = _over_views(lambda views: task.probabilities(task.predict_logits({"video": views})))
        return Subject(does="clips", ask=ask, prepare=prepare, **about)
    if callable(getattr(net, "segment", None)):
        about["panoptic"] = PanopticClasses.of(facts["panoptic"]) if facts.get("panoptic") else None
        return Subject(does="segments", ask=net, prepare=prepare, **about)
    if facts.get("kind") == "objects":
        return Subject(does="objects", ask=net, prepare=prepare, **about)
    if callable(getattr(net, "picture", None)):
        given = {name: getattr(task, name) for name in ("mask_ratio",) if hasattr(task, name)}
        ask = lambda batch: net.picture(batch, **given, mean=facts["mean"], std=facts["std"])  # type: ignore[operator]  # noqa: E731
        return Subject(does="draws", ask=ask, prepare=prepare, **about)
    if callable(getattr(task, "picture", None)):
        return Subject(does="draws", ask=lambda batch: task.picture({"image": batch}), prepare=prepare, **about)
    if callable(getattr(net, "zero_shot", None)):
        return Subject(does="classes", ask=_zero_shot(run, about, labels), prepare=prepare, **about)
    if isinstance(task, Classification):
        ask = lambda batch: task.predict_logits({"image": batch}).float().softmax(dim=1)  # noqa: E731
        return Subject(does="classes", ask=ask, prepare=prepare, **about)
    if callable(getattr(task, "sample", None)):
        raise ZooError(f"{run.name} makes pictures of noise: zoo predict {run.name} -o OUT.png, without pictures")
    raise ZooError(
        f"{run.name} knows no classes: zoo embed {run.name} FOLDER -o FILE.npz gives features of pictures,"
        f" zoo finetune {run.name} FOLDER teaches it the classes of a folder"
    )


def _zero_shot(run: RunModel, about: dict[str, Any], labels: Sequence[str] | None) -> Callable[[Tensor], Tensor]:
    """Which of some names a picture shows, by the run's own vocabulary and templates; `about` takes the names."""
    facts, net, data = run.facts["preprocess"], run.network, run.facts["data"]
    names = list(labels) if labels is not None else run.classes
    if names is None:
        raise ZooError(f"{run.name} takes any names: say which with --labels 'cat,dog'")
    about["names"] = names
    templates = facts["templates"]
    _, texts = prompts(str(data["dataset"]), names, templates)
    table = WordPiece(facts["tokenizer"], facts["context_length"]).table(texts)
    with torch.inference_mode():
        classes = class_features(net.encode_text, table)  # type: ignore[arg-type]
    return lambda batch: (net.scale * net.encode_image(batch) @ classes.T).softmax(dim=-1)  # type: ignore[operator]


# ---------------------------------------------------------------------------------------------------- where it is drawn


class _Target:
    """Where the picture of each file goes; None where none is drawn."""

    def __init__(self, subject: Subject, images: Sequence[Path], out: Path | None) -> None:
        self.paths: list[Path | None] = [None] * len(images)
        # Of segments the maps go beside a json.
        self.maps = out.with_suffix("") if out is not None and out.suffix == ".json" and subject.panoptic else None
        if out is not None and out.suffix == ".png":
            self.paths = [out] * len(images)
        elif out is None and not (subject.by_default or subject.does == "draws"):
            return
        elif out is None or out.suffix != ".json":
            names = [f"{image.stem}_{subject.label}" for image in images]
            names = [f"{name}_{n}" if name in names[:n] else name for n, name in enumerate(names)]
            self.paths = [(out or Path()) / f"{name}.png" for name in names]

    def write(self, n: int, drawn: Callable[[], Tensor]) -> dict[str, str]:
        """Draws file `n` where that is wanted; {"picture"} or nothing."""
        path = self.paths[n]
        if path is None:
            return {}
        _write(drawn(), path)
        return {"picture": str(path)}


def _write(sheet: Tensor, path: Path) -> None:
    from torchvision.io import write_png

    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(sheet.contiguous().cpu(), str(path))


Results = Iterator[dict[str, Any]]


def _readable(images: Sequence[Path], read: Callable[[Path], Any]) -> Iterator[tuple[int, Path, Any, dict[str, Any]]]:
    """Each file with its number and what `read` makes of it, or the row that says why that failed."""
    with progress(len(images), "predict") as bar:
        for n, image in enumerate(images):
            try:
                yield n, image, read(image), {}
            except ZooError as error:
                yield n, image, None, {"image": str(image), "error": str(error)}
            bar.advance(bar.task_ids[0])


def _draw(subject: Subject, images: Sequence[Path], target: _Target, top: int, threshold: float) -> Results:
    whole, batch = len(set(target.paths)) == 1, []
    for n, image, x, failed in _readable(images, lambda path: subject.prepare(read_image(path, upright=True))):
        if failed:
            yield failed
        elif whole:
            batch.append(x)
            yield {"image": str(image), "picture": str(target.paths[n])}
        else:
            yield {"image": str(image), **target.write(n, partial(subject.ask, x[None]))}
    if batch and (path := target.paths[0]):
        _write(subject.ask(torch.stack(batch)), path)


def _classify(subject: Subject, images: Sequence[Path], target: _Target, top: int, threshold: float) -> Results:
    waiting: list[tuple[int, Path, Any, dict[str, Any]]] = []

    def read(path: Path) -> tuple[Tensor, Tensor]:
        picture = read_image(path, upright=True)
        return picture, subject.prepare(picture)

    def answers() -> Results:
        whole = [entry for entry in waiting if not entry[3]]
        shapes = {entry[2][1].shape for entry in whole}
        groups = [torch.stack([entry[2][1] for entry in whole])] if len(shapes) == 1 else []
        likely = subject.ask(groups[0]) if groups else [subject.ask(entry[2][1][None])[0] for entry in whole]
        found = iter(likely)
        for n, image, seen, failed in waiting:
            if failed:
                yield failed
                continue
            rows = _top(next(found), subject.names, top)
            drawn = target.write(n, partial(draw_classes, seen[0], rows))
            yield {"image": str(image), **drawn, "top": rows}
        waiting.clear()

    for entry in _readable(images, read):
        waiting.append(entry)
        if len(waiting) == _TOGETHER:
            yield from answers()
    yield from answers()


def _clips(subject: Subject, images: Sequence[Path], target: _Target, top: int, threshold: float) -> Results:
    for n, video, views, failed in _readable(images, subject.prepare):
        if failed:
            yield failed
            continue
        rows = _top(subject.ask(views)[0], subject.names, top)
        frames = strip(views[len(views) // 2], subject.mean, subject.std)
        drawn = target.write(n, partial(draw_classes, frames, rows))
        yield {"image": str(video), **drawn, "top": rows}


def _top(likely: Tensor, names: Sequence[str] | None, count: int) -> list[dict[str, Any]]:
    """The `count` likeliest of the probabilities (K,) by name."""
    names = _class_names(len(likely)) if names is _IMAGENET else names
    best = likely.topk(min(count, len(likely)))
    return [
        {"label": name_of(names, k), "index": k, "probability": p}
        for p, k in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _detect(subject: Subject, images: Sequence[Path], target: _Target, top: int, threshold: float) -> Results:
    for n, image, picture, failed in _readable(images, lambda path: read_image(path, upright=True)):
        if failed:
            yield failed
            continue
        found = find_objects(subject.ask, picture, subject.prepare, threshold)
        drawn = target.write(n, partial(draw_objects, picture, found, subject.names))
        yield {"image": str(image), **drawn, "objects": _objects(found, subject.names)}


def _segment(subject: Subject, images: Sequence[Path], target: _Target, top: int, threshold: float) -> Results:
    for n, image, picture, failed in _readable(images, lambda path: read_image(path, upright=True)):
        if failed:
            yield failed
            continue
        found = _asked(subject.ask, picture, subject.prepare)
        ids, rows = _segments(found, subject.panoptic)
        numbers = [row["id"] for row in rows]
        drawn = target.write(n, partial(draw_segments, picture, ids, numbers, [row["label"] for row in rows]))
        size = {"height": int(picture.shape[-2]), "width": int(picture.shape[-1])}
        if target.maps is not None:
            path = target.maps / f"{image.stem}.png"
            _write(torch.from_numpy(colours_of(ids.numpy())).permute(2, 0, 1), path)
            size["map"] = str(path)  # type: ignore[assignment]
        yield {"image": str(image), **drawn, **size, "segments": rows}


def _segments(found: Mapping[str, Tensor], classes: PanopticClasses | None) -> tuple[Tensor, list[dict[str, Any]]]:
    """The segment of each pixel, and what each segment is; of a network without things one a label."""
    if "panoptic" in found:
        ids, table, scores = found["panoptic"], found["segments"].tolist(), found["segment_scores"].tolist()
    else:
        labels, areas = found["semantic"].unique(return_counts=True)
        ids = found["semantic"].int() + 1
        table = [[label + 1, -1, label, area] for label, area in zip(labels.tolist(), areas.tolist(), strict=True)]
        scores = [float("nan")] * len(table)
    rows = []
    for (number, thing, label, area), score in zip(table, scores, strict=True):
        names = None
        if classes is not None:
            names = classes.thing_names if thing > 0 else classes.semantic_names
        row: dict[str, Any] = {"id": number, "label": name_of(names, label), "index": label, "area": area}
        rows.append({**row, "thing": thing > 0, **({"score": score} if score == score else {})})
    return ids.cpu(), rows


def _answer(subject: Subject, images: Sequence[Path], target: _Target, top: int, threshold: float) -> Results:
    from zoo.data.arc import evaluation_view, read_grid, read_task_file
    from zoo.data.arc_predictions import draw_grids

    canvas: Any = subject.prepare
    sheets: dict[Path, list[Any]] = {}
    for n, image, tasks, failed in _readable(images, read_task_file):
        if failed:
            yield failed
            continue
        known = [task for task in tasks if task.name in subject.tasks]
        if not known:
            few = ", ".join(task.name for task in tasks[:3])
            more = "" if len(tasks) <= 3 else ", ..."
            yield {
                "image": str(image),
                "error": f"{image}: {subject.name} has not learnt the task {few}{more}; test-time training solves new"
                " ones: zoo test varc/ttt_vit_arc_agi_1",
            }
            continue
        grids, rows = [], []
        for task in known:
            for number, pair in enumerate(task.test):
                try:
                    placed = canvas(pair.input)
                except ZooError:  # larger than the canvas
                    continue
                place = torch.tensor([subject.tasks.index(task.name)])
                seen = subject.ask({**placed, "task": place}).argmax(dim=1)[0].cpu().numpy()
                grid = read_grid(seen, evaluation_view(pair, canvas.size, canvas.scale))
                facts = {"task": task.name, "test": number, "prediction": grid.tolist()}
                if pair.output is not None:
                    facts["right"] = grid.shape == pair.output.shape and bool((grid == pair.output).all())
                grids.append(facts)
                rows.append((pair.input, grid, pair.output))
        drawn = {}
        if (path := target.paths[n]) is not None and rows:
            sheets.setdefault(path, []).extend(rows)
            _write(draw_grids(sheets[path]), path)
            drawn = {"picture": str(path)}
        yield {"image": str(image), **drawn, "grids": grids}


_HANDLERS = {
    "draws": _draw,
    "objects": _detect,
    "segments": _segment,
    "classes": _classify,
    "clips": _clips,
    "grids": _answer,
}


# ------------------------------------------------------------------------------------------------------------- samples


class _Decoded:
    """A network that samples latents, with the autoencoder that makes pictures of them."""

    def __init__(self, net: Any) -> None:
        from zoo.nn.autoencoder import PIXELS, FrozenAutoencoder

        self.net, self.noise_shape, self.num_classes = net, net.noise_shape, net.num_classes
        self.autoencoder = FrozenAutoencoder(getattr(net, "autoencoder", PIXELS))

    def sample(self, noise: Tensor, label: Tensor | None) -> Tensor:
        return self.autoencoder.decode(self.net.sample(noise, label))


def sample(
    model: str,
    out: Path | None = None,
    weights: str | None = None,
    count: int = 16,
    classes: Sequence[int | str] | None = None,
    seed: int = 0,
    use_ema: bool | str | None = None,
) -> list[dict[str, Any]]:
    """A sheet of what a generative model samples, a row a class.

    Args:
        model: as in :func:`predict`; it gives ``sample``, ``noise_shape`` and ``num_classes``
            (:mod:`zoo.training.sampling`), and ``autoencoder`` where it samples latents.
        out: the ``.png``; default ``<model>.png`` here.
        weights, use_ema: as in :func:`predict`.
        count: pictures.
        classes: labels of the rows, numbers or the names that a run knows; default the first ones.
        seed: of the noise.

    Returns:
        [{"picture"}].

    Raises:
        ZooError: the model does not sample; unknown names; weights that do not match.
    """
    from zoo.training.sampling import SampleGrid, check_samples

    net: Any
    names: list[str] = []
    label = model
    if is_run(model):
        run = open_run(model, use_ema)
        net, names = run.task, run.classes or []
        label = str((run.facts["recipe"] or {}).get("name") or "samples").replace("/", "_").replace(":", "_")
    path = out or Path(f"{label}.png")
    if path.suffix != ".png":
        raise ZooError(f"samples are drawn into a .png, not {str(path)!r}")
    if not is_run(model):
        net = create_model(model, pretrained=weights is None, weights=weights, use_ema=use_ema).eval()
    if not callable(getattr(net, "sample", None)):
        raise ZooError(f"{model} makes nothing without pictures: zoo predict {model} IMAGE...")
    check_samples(net)
    rows = None if classes is None else [_class_number(one, names) for one in classes]
    with torch.inference_mode():
        sampler = net if is_run(model) else _Decoded(net)
        sheet = SampleGrid(count, classes=rows, seed=seed).sheet(sampler, "cpu")
    _write(sheet, path)
    return [{"picture": str(path)}]


def _class_number(word: int | str, names: Sequence[str]) -> int:
    with contextlib.suppress(ValueError):
        return int(word)
    if word not in names:
        from zoo.errors import unknown

        raise unknown("class", str(word), names) if names else ZooError(f"a class is a number here, not {word!r}")
    return list(names).index(str(word))


# ------------------------------------------------------------------------------------------------------------- objects


def find_objects(net: Callable[[Any], Any], picture: Tensor, prepare: Any, threshold: float = 0.5) -> dict[str, Tensor]:
    """What a detector finds on a picture (3, H, W) uint8, in its pixels, the best first: boxes (N, 4), scores (N,),
    labels (N,), and masks (N, H, W) and keypoints (N, P, 3) where it gives them. `prepare` is its preprocessing."""
    found = _asked(net, picture, prepare)
    order = found["scores"].argsort(descending=True)
    order = order[found["scores"][order] >= threshold]
    return {name: value[order] for name, value in found.items()}


def _asked(net: Callable[[Any], Any], picture: Tensor, prepare: Any) -> dict[str, Tensor]:
    """What a network of whole batches finds on a picture (3, H, W) uint8, in its pixels."""
    image = prepare(picture)
    height, width = image.shape[-2:]
    step = getattr(net, "size_divisibility", 32) or 1
    padded = image.new_zeros(1, 3, -(-height // step) * step, -(-width // step) * step)
    padded[..., :height, :width] = image
    sizes = {"size": torch.tensor([[height, width]]), "original_size": torch.tensor([picture.shape[-2:]])}
    with torch.inference_mode():
        return net({"image": padded, **sizes})[0]


def _objects(found: Mapping[str, Tensor], names: Sequence[str] | None) -> list[dict[str, Any]]:
    rows = []
    for n, (label, score, box) in enumerate(zip(found["labels"], found["scores"], found["boxes"], strict=True)):
        row: dict[str, Any] = {"label": name_of(names, int(label)), "index": int(label), "score": float(score)}
        row["box"] = [round(value, 2) for value in box.tolist()]
        if "keypoints" in found:
            row["keypoints"] = [[round(v, 2) for v in point] for point in found["keypoints"][n, :, :2].tolist()]
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------------------- names


def _object_names(net: nn.Module) -> list[str] | None:
    """The names of a detector's classes: those of the set of its number of classes, "person" for the only one."""
    count = getattr(net, "num_classes", None)
    if count == 1:
        return ["person"]
    cards = [catalog.data_card(name) for name in catalog.list_datasets()]
    named = [card.class_names for card in cards if "detection" in card.task and card.num_classes == count]
    return next((names for names in named if names), None)


def _panoptic_classes(net: Any) -> PanopticClasses | None:
    """The categories of the set of a network's numbers of things and of labels of pixels."""
    count = net.semantic_head.config.classes
    for card in map(catalog.data_card, catalog.list_datasets()):
        things, stuff = card.class_names or [], card.stuff_names or []
        if not stuff or getattr(net, "num_classes", len(things)) != len(things):
            continue
        first = (True,) * len(things) + (False,) * len(stuff)
        if count == len(stuff) + 1:
            return PanopticClasses((*things, *stuff), first, "separated", tuple(card.category_ids or ()))
        if count == len(stuff) + len(things) and not card.category_ids:  # Cityscapes: stuff comes first
            return PanopticClasses((*stuff, *things), first[::-1], "all")
    return None


def _entry(model: str) -> catalog.Weight:
    """The published weights named, or the first of a model named without tag."""
    if "." in model:
        return catalog.weight(model)[1]
    card, entry = catalog.model(model)
    published = [weight for weight in card.weights if weight.model == entry.name]
    if not published:
        raise ZooError(f"{model!r} has no published weights, and so no preprocessing of their own")
    return published[0]


_IMAGENET: list[str] = []  # stands for the names of ImageNet's classes, of models of 1000


def _class_names(count: int) -> list[str] | None:
    if count != 1000:
        return None
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.index_to_description(k) for k in range(count)]

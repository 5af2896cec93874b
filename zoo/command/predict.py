"""`zoo predict MODEL FILE...`: what a model, published or of a run, makes of pictures, videos or grids."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.command.common import Parser, expand, print_json, use_ema_option
from zoo.errors import ZooError

_MANY = 8  # files of which more than the likeliest class is printed


def parser() -> Parser:
    found = Parser(
        prog="zoo predict",
        description="What a model makes of files, or a generative one of noise.",
        epilog="zoo predict runs:last photo.jpg -o out.png; zoo predict runs/mae/pocket FOLDER -o OUT",
    )
    found.add_argument(
        "model", help="a model with a weight tag, or a run: runs/..., a checkpoint, runs:RECIPE, runs:last"
    )
    found.add_argument(
        "images", nargs="*", metavar="FILE", type=Path,
        help="pictures, videos for models of clips, json for grids; folders and patterns too; none: samples are drawn",
    )  # fmt: skip
    found.add_argument("-o", "--out", metavar="OUT", type=Path, help="a .png (one file), a folder, or a .json")
    found.add_argument("--weights", help="a file to load instead of the published weights")
    use_ema_option(found, "of that file, or of a run")
    found.add_argument("--average", metavar="NAME", help="of a run that keeps several averages, this one")
    found.add_argument("--seed", type=int, default=0, help="of a random mask, or of the samples")
    found.add_argument(
        "--threshold", type=float, default=0.5, help="of a detector: objects of a lower score are left out"
    )
    found.add_argument("--labels", help="names that a zero-shot model chooses from: 'cat,dog'")
    found.add_argument("--top", type=int, default=5, help="classes named a file (5)")
    found.add_argument("--count", type=int, help="of samples (16)")
    found.add_argument("--classes", nargs="+", metavar="K", help="of samples, a row each: numbers, or a run's names")
    found.add_argument("--json", action="store_true")
    return found


def main(words: Sequence[str], model: str | None = None) -> int:
    """Runs ``zoo predict WORDS``; `model` stands for the first of them where that is a recipe, whose run is meant."""
    arguments = parser().parse_intermixed_args(list(words))  # options may stand before the pictures
    from zoo.command import picture
    from zoo.data.sources import EXTENSIONS as PICTURES
    from zoo.data.video_reader import EXTENSIONS as VIDEOS
    from zoo.weights.runs import is_run

    name, labels = model or arguments.model, None
    if arguments.labels is not None and not (labels := [x.strip() for x in arguments.labels.split(",") if x.strip()]):
        raise ZooError("--labels names nothing; write --labels 'cat,dog'")
    if arguments.top < 1:
        raise ZooError("--top is 1 or more")
    use_ema = arguments.use_ema if arguments.average is None else arguments.average
    if arguments.images:
        if arguments.count or arguments.classes:
            raise ZooError("--count and --classes are of samples, which want no pictures")
        endings: tuple[str, ...] = (*PICTURES, *VIDEOS, ".json") if is_run(name) else (*PICTURES, *VIDEOS)
        if is_run(name) and any(path.is_dir() for path in arguments.images):
            endings = _endings(name)
        results = picture.predict(
            name,
            expand(arguments.images, endings),
            arguments.out,
            weights=arguments.weights,
            use_ema=use_ema,
            seed=arguments.seed,
            threshold=arguments.threshold,
            labels=labels,
            top=arguments.top,
        )
    else:
        results = picture.sample(
            name,
            arguments.out,
            arguments.weights,
            arguments.count or 16,
            arguments.classes,
            arguments.seed,
            use_ema=use_ema,
        )
    failed = [row["error"] for row in results if "error" in row]
    if arguments.json:
        print_json(results)
    else:
        _print(results, name)
    for line in failed:
        print(f"zoo: {line}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(results)} files could not be used", file=sys.stderr)
    return int(bool(failed))


def _endings(name: str) -> tuple[str, ...]:
    """Of the files in a folder that a run takes."""
    from zoo.data.sources import EXTENSIONS as PICTURES
    from zoo.data.video_reader import EXTENSIONS as VIDEOS
    from zoo.weights.runs import open_run

    kind = (open_run(name).facts["preprocess"] or {}).get("kind")
    return {"clip": VIDEOS, "grid": (".json",)}.get(str(kind), PICTURES)


def _print(results: Sequence[Mapping[str, Any]], model: str) -> None:
    many = len(results) > _MANY
    for result in results:
        name = result.get("image", model)
        if "picture" in result:
            print(f"{name}: {result['picture']}")
        for row in result.get("objects", []):
            box = ", ".join(f"{value:.0f}" for value in row["box"])
            print(f"{name}: {row['score']:6.1%}  {row['label']} ({box})")
        for row in result.get("segments", []):
            score = f"{row['score']:6.1%}" if "score" in row else "      "
            print(f"{name}: {score}  {row['label']} ({row['area']} pixels)")
        if result.get("objects") == []:
            print(f"{name}: nothing found")
        for row in result.get("top", [])[: 1 if many else None]:
            print(f"{name}: {row['probability']:6.1%}  {row['label']}")
        for row in result.get("grids", []):
            size = "x".join(map(str, (len(row["prediction"]), len(row["prediction"][0]) if row["prediction"] else 0)))
            verdict = {True: ", right", False: ", wrong"}.get(row.get("right"), "")
            print(f"{name}: {row['task']} test {row['test']}: a grid of {size}{verdict}")

"""Speed of a paper's training step and data pipeline: ours beside others, in one interleaved measurement.

    python benchmarks/speed/run.py mae --official PATH --dtype bfloat16 --threads 2 --batch 16 --repeats 9

Writes benchmarks/speed/results/<name>.json and rewrites benchmarks/speed/RESULTS.md from all results there. A paper
takes part with a module benchmarks/speed/<paper>.py: MODELS, DEFAULT_MODEL, PACKAGES, trainers, images, work, loaders;
without trainers, images and work it is about data alone. `samplers`, of a generative paper, gives those that draw.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))

import torch  # noqa: E402

from benchmarks.environment import command_line, environment  # noqa: E402
from benchmarks.speed.harness import Setting, peak_memory, time_loading, time_training  # noqa: E402
from zoo import catalog  # noqa: E402
from zoo.errors import ZooError  # noqa: E402

RESULTS = HERE / "results"
SECTIONS = ("step", "data", "sample")


def papers() -> list[str]:
    """The papers that have a module here."""
    return sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("run", "harness", "__init__"))


def measure(
    paper: str, setting: Setting, sections: tuple[str, ...] = ("step", "data"), memory: bool = False
) -> dict[str, Any]:
    """Measure the sections of a paper under a setting; the record that goes into its result file. With `memory`, the
    contenders of the step also say what it takes."""
    peers = importlib.import_module(f"benchmarks.speed.{paper}")
    threads = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    record: dict[str, Any] = {
        "benchmark": paper,
        "command": command_line(),
        "setting": {
            "model": setting.model,
            "dtype": setting.dtype,
            "threads": setting.threads,
            "batch": setting.batch,
            "repeats": setting.repeats,
            "device": setting.device,
            "compile": setting.compile,
        },
        "environment": environment(*peers.PACKAGES),
    }
    try:
        if "step" in sections and hasattr(peers, "trainers"):
            trainers, images = peers.trainers(setting), peers.images(setting)
            peaks = [peak_memory(trainer, images, setting) for trainer in trainers] if memory else []
            record["step"] = time_training(trainers, images, peers.work(setting), setting)
            for row, peak in zip(record["step"]["contenders"], peaks, strict=False):
                row["peak_bytes"] = peak
        if "data" in sections:
            with peers.loaders(setting) as (loaders, work):
                record["data"] = time_loading(loaders, work, setting)
        if "sample" in sections:
            samplers, work = peers.samplers(setting)
            record["sample"] = time_loading(samplers, work, setting)
    finally:
        torch.set_num_threads(threads)
    return record


def _machine(record: dict[str, Any]) -> tuple[Any, ...]:
    """What must agree for two times to be comparable."""
    about = record["environment"]
    return about["cpu"]["kind"], about["gpu"], *(record["setting"][key] for key in ("device", "threads", "dtype"))


def our_rate(found: dict[str, Any]) -> float:
    """Our images a second; of processor time where that was taken, which other programs hardly touch."""
    ours = found["contenders"][0]
    if "processor_seconds" in ours:
        return found["work"]["images"] / ours["processor_seconds"]["median"]
    return ours["images_per_second"]


def compare(record: dict[str, Any], path: Path) -> None:
    """Notes in each section of `record` what the last kept one at `path` had reached on a like machine."""
    if not path.is_file():
        return
    last = json.loads(path.read_text())
    for section in SECTIONS:
        if section in record and section in last and _machine(record) == _machine(last):
            rate, date = our_rate(last[section]), last["environment"]["date"]
            record[section]["last"] = {"images_per_second": rate, "date": date}


def slower(found: dict[str, Any]) -> str | None:
    """The mark of a section in which we are more than 10 % slower than the last kept time; None otherwise."""
    last = found.get("last")
    if last is None or our_rate(found) >= 0.9 * last["images_per_second"]:
        return None
    drop = 100 * (1 - our_rate(found) / last["images_per_second"])
    return f"**Slower: {drop:.0f} % below the {last['images_per_second']:.4g} images/s of {last['date']}.**"


def write(record: dict[str, Any], path: Path) -> None:
    """Write a record as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, path)


def _table(record: dict[str, Any], section: str) -> list[str]:
    setting, found, machine = record["setting"], record[section], record["environment"]
    device = machine["gpu"] if setting["device"].startswith("cuda") else machine["cpu"]["kind"]
    work = found["work"]
    if section == "step":
        title = (
            f"{record['benchmark']}: training step, {setting['model']}, {setting['dtype']}, batch {setting['batch']}"
        )
    else:
        about = work["detail"]
        what = about.get("title") or f"{about.get('from', 'JPEG')} to batch, {about['data']}, crop {about['crop']}"
        title = f"{record['benchmark']}: {what}"
    compiled = ", torch.compile" if setting["compile"] and section == "step" else ""
    lines = [
        f"### {title}",
        *([mark, ""] if (mark := slower(found)) else []),
        f"{device}, {setting['threads']} thread(s){compiled}, {found['rounds']} rounds, load before "
        f"{machine['load']} a core, torch {machine['versions']['torch']}, {machine['date']}.",
        "",
        f"    {record['command']}",
        "",
    ]
    on_gpu = section == "step" and setting["device"].startswith("cuda")
    head = ["", "seconds (quartiles)", "images/s"]
    if section == "step":
        head += [
            *(["tokens/s"] if work["tokens"] else []),
            "TFLOP/s",
            *(["share of peak"] if on_gpu else []),
            "forward",
            "backward",
            "update",
        ]
    in_memory = any("peak_bytes" in row for row in found["contenders"])
    head += ["peak memory without weights"] if in_memory else []
    on_cpu = not setting["device"].startswith("cuda")
    head += ["time over ours (quartiles)", *(["processor time over ours"] if on_cpu else [])]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found["contenders"]:
        time, ratio = row["seconds"], row["times_ours"]
        cells = [
            f"{row['name']} {row['version']}",
            f"{time['median']:.3f} ({time['q25']:.3f} to {time['q75']:.3f})",
            f"{row['images_per_second']:.1f}",
        ]
        if section == "step":
            cells += [f"{row['tokens_per_second']:.0f}"] if work["tokens"] else []
            cells += [f"{row['tflops']:.3f}"]
            if on_gpu:
                share = row["share_of_peak"]
                cells += ["" if share is None else f"{100 * share:.1f} %"]
            cells += [f"{row[part]:.3f}" for part in ("forward", "backward", "update")]
        cells += [f"{row['peak_bytes'] / 2**20:.0f} MiB"] if in_memory else []
        cells += [f"{ratio['median']:.3f} ({ratio['q25']:.3f} to {ratio['q75']:.3f})"]
        if on_cpu:
            ratio = row["processor_times_ours"]
            cells += [f"{ratio['median']:.3f} ({ratio['q25']:.3f} to {ratio['q75']:.3f})"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {row['name']}: {row['about']}" for row in found["contenders"]), ""]
    return lines


def render(results: Path) -> str:
    """The markdown page of all result files in a folder, field after field."""
    lines = [
        "# Speed, measured",
        "",
        "Written by `benchmarks/speed/run.py` from the files in `results/`. Contenders take turns in one process;",
        "times are medians with quartiles, the last column is the ratio within each round: above 1, ours is faster.",
        "",
    ]
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    by_field: dict[str, list[dict[str, Any]]] = {field: [] for field in (*catalog.FIELDS, "data")}
    for record in records:
        name = record["benchmark"]
        by_field[catalog.paper(name).field if name in catalog.list_papers() else "data"].append(record)
    for field, found in by_field.items():
        tables = [_table(record, section) for record in found for section in SECTIONS if section in record]
        if tables:
            lines += [f"## {field}", "", *(line for table in tables for line in table)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", choices=papers())
    parser.add_argument("--model", help="one of the paper's sizes (default: its base model)")
    parser.add_argument("--official", type=Path, help="a checkout of the official code")
    parser.add_argument("--data", type=Path, help="a folder of class folders with JPEG files for the data pipelines")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 means autocast")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before that do not")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile every contender's loss")
    parser.add_argument("--only", choices=SECTIONS, help="one section (default: step and data)")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of a training step")
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/ beside this script)")
    given = parser.parse_args(argv)
    peers = importlib.import_module(f"benchmarks.speed.{given.paper}")
    model = given.model or peers.DEFAULT_MODEL
    if model not in peers.MODELS:
        parser.error(f"unknown model {model!r}; known: {', '.join(peers.MODELS)}")
    for folder in (given.official, given.data):
        if folder is not None and not folder.is_dir():
            parser.error(f"no folder {folder}")
    setting = Setting(
        model=model,
        dtype=given.dtype,
        threads=given.threads,
        batch=given.batch,
        repeats=given.repeats,
        warmup=given.warmup,
        device=given.device,
        compile=given.compile,
        official=given.official,
        data=given.data,
    )
    try:
        if given.only == "sample" and not hasattr(peers, "samplers"):
            raise ZooError(f"{given.paper} does not sample")
        record = measure(given.paper, setting, (given.only,) if given.only else ("step", "data"), given.memory)
    except ZooError as error:
        print(error, file=sys.stderr)
        return 2
    out = given.out or RESULTS
    kind = f"{model}_{given.dtype}_b{given.batch}" if given.only != "data" else "data"
    kind = kind if hasattr(peers, "trainers") else f"{model}_b{given.batch}"
    kind += "_sample" if given.only == "sample" else ""
    name = "_".join(
        [given.paper, kind, given.device.split(":")[0], f"t{given.threads}", *(["compile"] * given.compile)]
    )
    compare(record, out / f"{name}.json")
    write(record, out / f"{name}.json")
    page = out.parent / "RESULTS.md" if given.out is None else out / "RESULTS.md"
    page.write_text(render(out))
    for section in SECTIONS:
        if section in record:
            print("\n".join(_table(record, section)))
    print(f"written: {name}.json and {page.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`zoo benchmark`: how fast a network's forward, a recipe's training step or its data are here. Imports no torch until
it works."""

from __future__ import annotations

import argparse
from typing import Any

from zoo.command.common import print_json

EXAMPLE = "example: zoo benchmark mae/pocket train --batch auto --threads 2"
WHAT = ("forward", "train", "data")


def add(commands: Any) -> None:
    """Adds the command to those of `zoo`."""
    one = commands.add_parser(
        "benchmark",
        help="samples a second of a model, recipe or run",
        description="Time a network's forward pass, a recipe's training step, or its data alone, after a warm-up.",
        epilog=EXAMPLE,
    )
    one.add_argument("name", metavar="MODEL|RECIPE|RUN", help="a model (weights are random: none are downloaded), ...")
    one.add_argument("what", nargs="?", choices=WHAT, help="default: a recipe's train, else forward")
    one.add_argument("--batch", default="8", metavar="N|auto", help="auto: doubled while it pays and fits (default 8)")
    one.add_argument("--size", type=int, metavar="PIXELS", help="forward: side of the pictures")
    one.add_argument("--repeats", type=int, default=10, help="measured passes (default 10)")
    one.add_argument("--warmup", type=int, default=3, help="passes before them (default 3)")
    one.add_argument("--threads", type=int, help="of the processor (default: torch's own)")
    one.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    one.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of mixed precision"
    )
    one.add_argument("--compile", action="store_true", help="torch.compile the network")
    one.add_argument("--channels_last", action="store_true", help="activations in the order (B, H, W, C)")
    one.add_argument("--json", action="store_true")
    one.set_defaults(do=run)


def run(arguments: argparse.Namespace, extra: list[str]) -> int:
    from zoo.errors import ZooError

    batch: int | None = None
    if arguments.batch != "auto":
        if not arguments.batch.isdecimal() or int(arguments.batch) < 1:
            raise ZooError(f"--batch is a number of samples or auto, not {arguments.batch!r}")
        batch = int(arguments.batch)
    for name in ("repeats", "threads", "size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ZooError(f"--{name} is 1 or more, not {value}")
    if arguments.warmup < 0:
        raise ZooError(f"--warmup is 0 or more, not {arguments.warmup}")
    from zoo.command import throughput

    setting = throughput.Setting(
        batch=batch,
        size=arguments.size,
        repeats=arguments.repeats,
        warmup=arguments.warmup,
        threads=arguments.threads,
        device=arguments.device,
        dtype=arguments.dtype,
        compile=arguments.compile,
        channels_last=arguments.channels_last,
    )
    found = throughput.measure(arguments.name, arguments.what, setting)
    if arguments.json:
        return print_json(found)
    print("\n".join(lines(found)))
    return 0


def lines(found: dict[str, Any]) -> list[str]:
    """What a user is told of a measurement."""
    said = [f"batch {row['batch']}: {row['samples_per_s']:.4g} {found['samples']}/s" for row in found["tried"]]
    ms = {key: 1000 * value for key, value in found["seconds"].items()}
    how = [found["device"], *([f"{found['threads']} threads"] if found["threads"] else []), found["dtype"]]
    how += [word for word in ("compile", "channels_last") if found[word]]
    said.append(
        f"{found['name']} {found['what']}: {found['samples_per_s']:.4g} {found['samples']}/s at batch {found['batch']}:"
        f" {ms['median']:.4g} ms ({ms['q25']:.4g} to {ms['q75']:.4g}, the middle half of {found['repeats']}"
        f" after {found['warmup']} to warm up)"
    )
    peak = f" · peak {found['peak_mib']:,.0f} MiB" if found["peak_mib"] is not None else ""
    said.append(" · ".join(how) + peak)
    if found["load"] is not None and found["load"] > 1.2:
        said.append(f"others compute on this machine too (load {found['load']} a core): the number is too low")
    return said

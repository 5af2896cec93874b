"""`zoo export`: a model or a run as one file that runs without the zoo. Imports no torch until it works."""

from __future__ import annotations

import argparse
from typing import Any

from zoo.command.common import print_json, use_ema_option

EXAMPLE = "example: zoo export runs:last -o model.onnx"


def add(commands: Any) -> None:
    """Adds the command to those of `zoo`."""
    one = commands.add_parser(
        "export",
        help="a model or run as one file: zoo export runs:last -o model.onnx",
        description="Write a network as .pt2 (torch.export) or .onnx, load it again, compare and time it.",
        epilog=EXAMPLE,
    )
    one.add_argument("model", metavar="MODEL|RUN", help="a model with the tag of its weights, a run, or hf://org/name")
    one.add_argument("-o", "--out", metavar="FILE", required=True, help="FILE.pt2 or FILE.onnx (pip: paperzoo[export])")
    one.add_argument("--part", help="a method or module of the network instead of what suits it: forward_features, ...")
    one.add_argument("--batch", type=int, metavar="N", help="a fixed number of samples (default: any)")
    one.add_argument("--size", type=int, metavar="PIXELS", help="side of the pictures (default: of its preprocessing)")
    one.add_argument("--weights", help="of a model: a file or other weights to load instead of the published ones")
    one.add_argument("--untrained", action="store_true", help="of a model: random weights, to try the exporter")
    use_ema_option(one, "of a file or a run")
    one.add_argument("--json", action="store_true")
    one.set_defaults(do=run)


def run(arguments: argparse.Namespace, extra: list[str]) -> int:
    from pathlib import Path

    from zoo.errors import ZooError

    if Path(arguments.out).suffix not in (".pt2", ".onnx"):  # not after a download
        raise ZooError(f"-o writes .pt2 or .onnx, not {arguments.out!r}")
    if arguments.size is not None and arguments.size < 1:
        raise ZooError(f"--size is 1 or more, not {arguments.size}")
    from zoo.weights import export
    from zoo.weights.source import open_source

    source = open_source(arguments.model, arguments.weights, arguments.use_ema, arguments.untrained)
    subject = export.subject(
        source.network, arguments.size or source.size, source.channels, arguments.part, source.not_exported
    )
    facts = {**source.facts, "classes": source.classes, "preprocess": source.preprocess}
    written = export.write(subject, arguments.out, facts, arguments.batch)
    if arguments.json:
        return print_json(vars(written))
    print("\n".join(lines(written)))
    return 0


def lines(written: Any) -> list[str]:
    """What a user is told of an export."""
    what = "a sample" if written.batch is None else f"a batch of {written.batch}"
    said = [
        f"{written.path}: {written.part}, {written.bytes / 1e6:.1f} MB; preprocessing: {written.path.name}.json",
        f"inputs: {'; '.join(f'{name} {axes}' for name, axes in written.inputs.items())}",
        f"outputs: {'; '.join(f'{name} {axes}' for name, axes in written.outputs.items())}",
        f"loaded again and compared: largest difference {written.difference:.1e} of the outputs' size; {what} takes"
        f" {written.file_ms:.1f} ms by {written.runtime}, {written.eager_ms:.1f} ms eager, {written.threads} threads",
    ]
    if written.note:
        said.append(written.note)
    if written.constant:
        said.append("its outputs are constant, as of an untrained network: the comparison says little")
    return said

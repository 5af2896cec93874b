"""The `zoo` command.

This file imports no torch: `zoo list` and `zoo show` read cards only, and the other commands import what they use.
"""

from __future__ import annotations

import argparse
import difflib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from zoo.command import benchmark, export, leaderboard, preview, push, report
from zoo.command.common import Parser, is_unicode, print_json, use_ema_option
from zoo.errors import ZooError, unknown

RUN = ("fit", "validate", "test", "predict")
KINDS = ("papers", "models", "weights", "recipes", "datasets")
_VALUELESS = ("-h", "--help", "--print_config", "--json", "--use-ema", "--use_ema", "--no-use-ema", "--no-use_ema")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit code: 0, 2 for a mistake of the user, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    for stream in (sys.stdout, sys.stderr):  # a terminal of ASCII shows "?" where it lacks a letter
        if isinstance(stream, io.TextIOWrapper) and not is_unicode(stream):
            stream.reconfigure(errors="replace")
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words, debug)
    except ZooError as error:
        if debug:
            raise
        print(f"zoo: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except (ModuleNotFoundError, OSError) as error:
        if debug:
            raise
        print(f"zoo: {_of_the_machine(error)} (--debug shows where)", file=sys.stderr)
    return 2


def _of_the_machine(error: OSError | ImportError) -> str:
    if isinstance(error, ImportError):
        return f"the package {error.name!r} is not installed; pip install {(error.name or '').partition('.')[0]}"
    what = " ".join((error.strerror or str(error) or type(error).__name__).split())
    return what if error.filename is None else f"{what}: {error.filename}"


def _dispatch(words: list[str], debug: bool) -> int:
    before, command, rest = _split(words)
    if command in RUN:
        return _run(command, before + rest, debug)
    if command == "finetune":
        from zoo.command import finetune

        return finetune.main(before + rest, debug)
    if command == "embed":
        from zoo.command import embed

        return embed.main(before + rest)
    if command == "__complete":
        return _complete(rest)
    parser, known = _parser()
    if command is not None and command not in known:
        raise unknown("command", command, [*known, *RUN])
    arguments, extra = parser.parse_known_args([*before, *([command] if command else []), *rest])
    if command is None:
        parser.print_help()
        return 0
    if extra and arguments.do is not preview.run:  # which hands them to the recipe
        raise ZooError(f"zoo {command} has no option {extra[0]!r} (see zoo {command} --help)")
    if getattr(arguments, "device", None) not in (None, "cpu", "auto"):
        from zoo.machine import device_of

        device_of(arguments.device)
    return arguments.do(arguments, extra) or 0


def _split(words: list[str]) -> tuple[list[str], str | None, list[str]]:
    """The options before the command, the command, and what follows it; `--config X` may stand on either side."""
    position = 0
    while position < len(words) and words[position].startswith("-"):
        word = words[position]
        position += 1
        if word in ("--config", "-c"):
            position += 1
        elif not word.startswith("--config=") and word not in ("-h", "--help", "--version"):
            raise ZooError(f"the option {word!r} stands before the command; write zoo COMMAND ... {word}")
    return words[:position], (words[position] if position < len(words) else None), words[position + 1 :]


def _parser() -> tuple[Parser, list[str]]:
    parser = Parser(
        prog="zoo",
        usage="zoo COMMAND ...",
        description="A model zoo: recipes, published weights, leaderboards, parity. zoo COMMAND --help says more.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=20, width=100),
    )
    parser.add_argument("--version", action="version", version=f"zoo {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="", prog="zoo", parser_class=Parser)
    for name, text in {
        "fit": "train a recipe or a leaderboard row: zoo fit mae/pocket",
        "validate": "a recipe's validation: zoo validate RECIPE --ckpt_path last",
        "test": "a recipe's, a row's or a run's test: zoo test runs:last",
        "predict": "what a model or run makes of files: zoo predict runs:last photo.jpg",
        "finetune": "train a model on a folder of yours: zoo finetune MODEL FOLDER",
        "embed": "features of pictures, videos or texts: zoo embed MODEL FOLDER -o F.npz",
    }.items():
        commands.add_parser(name, help=text, add_help=False)

    one = commands.add_parser(
        "list",
        help="what there is: papers, models, weights, recipes, datasets",
        description="What there is, as a table.",
        epilog="example: zoo list weights 'mae*'",
    )
    one.add_argument("kind", nargs="?", default="papers", metavar="|".join(KINDS))
    one.add_argument("pattern", nargs="?", default="*", help="a part of the name, or a pattern with *")
    one.add_argument("--licence", help="weights only: those of this licence")
    form = one.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="papers only: the table of README")
    form.add_argument("--json", action="store_true")
    one.set_defaults(do=_list)

    one = commands.add_parser(
        "show",
        help="one paper, model, weight, recipe, dataset, run or PAPER:ROW",
        epilog="example: zoo show mae; zoo show mae:finetune_vit_b; zoo show runs:last",
    )
    one.add_argument("name", help="a name, or PAPER:ROW")
    one.add_argument("--json", action="store_true")
    one.set_defaults(do=_show)

    for module in (leaderboard, report, preview):
        module.add(commands)

    one = commands.add_parser(
        "claim",
        help="a paper's central claim in miniature: shown, or run on a CPU",
        epilog="example: zoo claim mae; zoo claim mae --run --seeds 3; zoo claim mae -o claim.png",
    )
    _claim_options(one)
    one.set_defaults(do=_claim)

    one = commands.add_parser(
        "parity",
        help="replay cases of the official code on this machine",
        epilog="example: zoo parity mae --dtype float32",
    )
    one.add_argument("paper", nargs="?")
    one.add_argument("--dtype", choices=["float64", "float32", "bfloat16", "float16"], help="default: the case's own")
    one.add_argument("--device", default="cpu")
    one.add_argument("--json", action="store_true")
    one.add_argument("--make", action="store_true", help="how a case is made; with PAPER: a script that makes one")
    one.add_argument("-o", "--out", metavar="FILE", help="--make PAPER: where the script is written")
    one.set_defaults(do=_parity)

    one = commands.add_parser(
        "weights",
        help="published weights: get, verify, convert",
        epilog="example: zoo weights get NAME; zoo weights convert runs:last -o net.safetensors",
    )
    one.add_argument("what", choices=["get", "verify", "convert"])
    one.add_argument("name", help="published weights; convert --to: also a checkpoint of yours")
    one.add_argument("-o", "--out", metavar="FILE", help="convert: the file, .safetensors, .pth or .pkl")
    one.add_argument("--to", metavar="FORMAT", help="convert: into another library's layout (detectron2, ...)")
    use_ema_option(one, "convert, of a run or checkpoint of yours")
    one.add_argument("--average", metavar="NAME", help="convert: the average of this name, of several in a checkpoint")
    one.set_defaults(do=_weights)

    for module in (benchmark, export, push):
        module.add(commands)

    one = commands.add_parser(
        "data",
        help="look a dataset over before a run; make its latents, statistics or patch axes",
        epilog="example: zoo data check ./my_folder",
    )
    _data_parsers(one)

    one = commands.add_parser(
        "explain",
        help="why two numbers differ: rows of a leaderboard, runs or result files",
        epilog="example: zoo explain mae:finetune_vit_b mae:finetune_vit_l",
    )
    one.add_argument("a", metavar="A")
    one.add_argument("b", metavar="B")
    one.add_argument("--json", action="store_true")
    one.set_defaults(do=_explain)

    one = commands.add_parser(
        "new",
        help="the files of a new paper to fill in",
        epilog="example: zoo new my_paper --field recognition --title 'My Paper'",
    )
    one.add_argument("paper", nargs="?", help="its name: small letters, digits, underscores")
    one.add_argument("--card_fields", action="store_true", help="print what a card may say, and write nothing")
    one.add_argument("--field", help="recognition, selfsup, detection, video, multimodal, ...")
    one.add_argument("--title", help="the paper's title")
    one.set_defaults(do=_new)

    one = commands.add_parser(
        "completion", help="a completion script for bash, zsh or fish", epilog='example: eval "$(zoo completion bash)"'
    )
    one.add_argument("shell", choices=["bash", "zsh", "fish"])
    one.set_defaults(do=_completion)
    return parser, list(commands.choices)


def _claim_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("paper")
    one.add_argument(
        "-o", "--out", metavar="FILE", help="draw the result, .png or .svg; with --run also .json: write it"
    )
    one.add_argument("--json", action="store_true", help="declaration and result")
    one.add_argument("--run", action="store_true", help="run it; finished parts are kept, a killed run goes on")
    run = one.add_argument_group("with --run")
    run.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="one number: so many, from 0 (or from 100, --pilot); several: these",
    )
    run.add_argument("--data", metavar="DATASET", help="instead of the declared one")
    run.add_argument("--data_dir", metavar="FOLDER", help="where it lies (default: shared/data beside the checkout)")
    run.add_argument("--arms", nargs="+", metavar="ARM", help="only these")
    run.add_argument("--quick", action="store_true", help="a few steps of everything: tries the program, says nothing")
    run.add_argument("--pilot", action="store_true", help="on the pilot seeds, to explore settings; never a result")
    run.add_argument("--threads", type=int, default=1, help="of the process (default 1)")
    kept = "where finished parts are kept; processes with other --arms share it"
    run.add_argument("--work", metavar="FOLDER", default="runs/claims", help=kept)


def _data_parsers(data: argparse.ArgumentParser) -> None:
    kinds = data.add_subparsers(metavar="check|latents|stats|patch_pca", required=True)
    for name, text, do in (
        ("check", "count and read every sample", _data_check),
        ("latents", "encode the pictures of a dataset by an autoencoder, once", _data_latents),
        ("stats", "the statistics of a dataset's pictures that FID compares with", _data_stats),
        ("patch_pca", "the principal axes of the patches of a dataset's pictures", _data_patch_pca),
    ):
        written = {"check": "", "latents": " -o latents", "stats": " -o stats.npz", "patch_pca": " -o axes.safetensors"}
        epilog = f"example: zoo data {name} ./my_folder{written[name]}"
        one = kinds.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=epilog)
        one.add_argument("dataset", help="a dataset's name or a folder")
        one.add_argument("--data_dir", help="where the named dataset lies")
        one.set_defaults(do=do)
        if name == "check":
            one.add_argument("--quick", action="store_true", help="count only; do not read every sample")
            one.add_argument("--json", action="store_true")
            continue
        written = {"latents": "the folder", "stats": "the .npz file", "patch_pca": "the .safetensors file"}
        one.add_argument("-o", "--out", required=True, help=written[name])
        one.add_argument("--image_size", type=int, default=256, help="side of the pictures in pixels")
        one.add_argument("--batch_size", type=int, default=32)
        one.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
        if name == "latents":
            one.add_argument("--autoencoder", default="sd_vae.ft_mse", help="published weights, or a file")
            one.add_argument("--splits", nargs="+", default=["train"], metavar="SPLIT")
            one.add_argument("--no_mirror", action="store_true", help="without the pictures' mirror images")
            one.add_argument("--dtype", default="float32", help="of the moments: float32, float16, bfloat16")
            one.add_argument("--part", default="0/1", metavar="K/N", help="the K-th of N shares, for N devices at once")
            one.add_argument("--scale", type=float, help="of the latents; default: Stable Diffusion's 0.18215")
        elif name == "patch_pca":
            one.add_argument("--patch_size", type=int, default=16)
            one.add_argument(
                "--images", type=int, default=10_000, help="so many, evenly spread over the training split"
            )
            one.add_argument("--uncentered", action="store_true", help="do not take the mean patch off first")
            one.add_argument("--num_workers", type=int, help="processes that read pictures; default: by the machine")
        else:
            one.add_argument("--split", default="train")
            one.add_argument("--extractor", default="inception", help="inception, or random where it is not to be had")
            one.add_argument("--resize", default="tf1", help="inception's: tf1 (torch-fidelity, ADM) or antialias")
            one.add_argument("--features", action="store_true", help="keep the features: for KID, precision and recall")


def _version() -> str:
    from zoo import __version__

    return __version__


# --------------------------------------------------------------------------------------------------- recipes, images


def _run(command: str, words: list[str], debug: bool) -> int:
    positional, options = _positional(words)
    if not positional:
        if "-h" in options or "--help" in options:
            print(f"usage: zoo {command} RECIPE [options]; zoo {command} RECIPE --help lists them; zoo list recipes")
            return 0
        config = _config_among(options)
        if config is None:
            raise ZooError(f"zoo {command} wants a recipe: zoo {command} mae/pocket (see zoo list recipes)")
        positional, options = [config[0]], config[1]
    from zoo.weights.runs import is_run

    if is_run(positional[0]):
        return _run_again(command, positional[0], words, debug)
    if command == "predict" and _is_model(positional[0]):
        from zoo.command import predict

        return predict.main(words)
    if command == "predict" and len(positional) > 1:
        return _predict_by_recipe(positional[0], words)
    if len(positional) > 1:
        raise ZooError(f"unexpected {positional[1]!r}: zoo {command} takes one recipe, then options with --")
    from zoo import catalog

    catalog.recipe_path(positional[0])  # an unknown name must not wait for torch
    from zoo.command import recipes

    return recipes.run(command, positional[0], options, debug)


def _run_again(command: str, name: str, words: list[str], debug: bool) -> int:
    """A command on a run: its recipe with its options and that checkpoint; or what its model makes of files."""
    of_recipe = re.compile(r"--(data|model|trainer|config|print_config|ckpt_path)\b")
    if command == "predict" and not any(map(of_recipe.match, words)):
        from zoo.command import predict
        from zoo.weights.runs import open_run

        files_given = predict.parser().parse_intermixed_args(words).images
        if files_given or hasattr(open_run(name).task_class, "sample"):
            return predict.main(words)
    from zoo.command import recipes
    from zoo.command.runs import recipe_of
    from zoo.weights.runs import open_run

    rest = [word for position, word in enumerate(words) if position != words.index(name)]
    model = open_run(name)
    with recipe_of(model) as path:
        return recipes.run(command, str(path), ["--ckpt_path", str(model.checkpoint), *rest], debug)


def _predict_by_recipe(recipe: str, words: list[str]) -> int:
    """``zoo predict RECIPE FILE... --ckpt_path last``: by the newest run of the recipe, or by that checkpoint."""
    from zoo import catalog
    from zoo.command import predict

    catalog.recipe_path(recipe)  # an unknown name must not wait for torch
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--ckpt_path=") else [word])]
    which = "last"
    if "--ckpt_path" in words[:-1]:
        at = words.index("--ckpt_path")
        which, words = words[at + 1], words[:at] + words[at + 2 :]
    from zoo.command.reading import run_name

    return predict.main(words, f"runs:{run_name(recipe)}:{which}" if which in ("last", "best") else which)


def _positional(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are neither an option nor its value, and the rest; every option but a few takes one value."""
    positional, options, position = [], [], 0
    while position < len(words):
        word = words[position]
        if not word.startswith("-"):
            positional.append(word)
        else:
            options.append(word)
            valued = "=" not in word and word not in _VALUELESS and position + 1 < len(words)
            if valued and not words[position + 1].startswith("--"):
                position += 1
                options.append(words[position])
        position += 1
    return positional, options


def _config_among(options: list[str]) -> tuple[str, list[str]] | None:
    """The first config file among `options`, and the others: without a recipe's name it is the recipe."""
    for position, word in enumerate(options):
        if word in ("--config", "-c") and position + 1 < len(options):
            return options[position + 1], options[:position] + options[position + 2 :]
        if word.startswith("--config="):
            return word.partition("=")[2], options[:position] + options[position + 1 :]
    return None


def _is_model(name: str) -> bool:
    from zoo import catalog

    if name.endswith((".yaml", ".yml")) or catalog.is_row(name):
        return False
    models = {*catalog.list_models(), *catalog.list_weights()}
    if name in models:
        return True
    try:
        catalog.recipe_path(name)
    except ZooError:
        if "/" not in name and "." not in name:
            raise unknown("model or recipe", name, [*models, *catalog.list_recipes("*")]) from None
        return name.partition(".")[0] in models
    return False


# ------------------------------------------------------------------------------------------------------------- cards


def _list(arguments: argparse.Namespace, extra: list[str]) -> int:
    if arguments.kind not in KINDS:
        if arguments.pattern != "*" or not _names_a_paper(arguments.kind):
            raise unknown("kind", arguments.kind, KINDS)
        arguments.kind, arguments.pattern = "papers", arguments.kind
    if arguments.licence and arguments.kind != "weights":
        raise ZooError("--licence filters weights: zoo list weights --licence MIT")
    if arguments.markdown and (arguments.kind, arguments.pattern) != ("papers", "*"):
        raise ZooError("--markdown is of all papers: zoo list papers --markdown")
    if arguments.markdown:
        from zoo.command import show

        print(show.papers_markdown(), end="")
        return 0
    from zoo.command import listing

    rows = listing.rows_of(arguments.kind, arguments.pattern, arguments.licence)
    if arguments.json:
        return print_json(rows)
    listing.print_listing(arguments.kind, rows, arguments.pattern)
    return 0


def _names_a_paper(word: str) -> bool:
    """Whether ``zoo list WORD`` means papers: a slug holds the word, and it is no kind misspelt."""
    from zoo import catalog

    near = difflib.get_close_matches(word, KINDS, n=1, cutoff=0.75)
    return not near and bool(catalog.list_papers(pattern=word))


def _show(arguments: argparse.Namespace, extra: list[str]) -> int:
    from zoo.command import show

    if arguments.json:
        return print_json(show.describe(arguments.name))
    show.print_description(arguments.name)
    return 0


def _explain(arguments: argparse.Namespace, extra: list[str]) -> int:
    from zoo.command import show

    found = show.explain(arguments.a, arguments.b)
    if arguments.json:
        return print_json(found)
    show.print_explanation(found)
    return 0


def _new(arguments: argparse.Namespace, extra: list[str]) -> int:
    from zoo.command.new import card_fields, write_skeleton

    if arguments.card_fields:
        print(card_fields(), end="")
        return 0
    if arguments.paper is None or arguments.field is None:
        raise ZooError("zoo new wants a name and a field: zoo new my_paper --field recognition")
    for path in write_skeleton(arguments.paper, arguments.field, arguments.title):
        print(path)
    print("fill in what stands in capitals; CONTRIBUTING.md tells the rest, and it runs already:")
    print(f"zoo fit {arguments.paper}/pocket")
    return 0


# ------------------------------------------------------------------------------------------------- things that compute


def _claim(arguments: argparse.Namespace, extra: list[str]) -> int:
    from zoo.claims import declaration
    from zoo.command import show

    claim, given = declaration.read(arguments.paper), vars(arguments)
    forms = (".png", ".svg", *([".json"] if arguments.run else []))
    if arguments.out and not arguments.out.endswith(forms):  # not after minutes of training
        raise ZooError(f"-o writes {', '.join(forms)}, not {arguments.out!r}")
    if not arguments.run:
        for name in ("seeds", "data", "data_dir", "arms", "quick", "pilot"):
            if given[name]:
                raise ZooError(f"--{name} goes with --run")
        result = declaration.result(arguments.paper)
        if arguments.out and result is None:
            raise ZooError(f"the claim of {arguments.paper} has no result to draw; zoo claim {arguments.paper} --run")
        if arguments.json:
            return print_json({"declaration": claim.model_dump(mode="json", exclude_defaults=True), "result": result})
        if not arguments.out:
            show.print_claim(arguments.paper, claim, result)
    else:
        from zoo.claims.run import run

        seeds = arguments.seeds
        if seeds and len(seeds) == 1:
            if seeds[0] < 1:
                raise ZooError(f"--seeds {seeds[0]}: one number is a count, 1 or more")
            first = claim.pilot_seeds[0] if arguments.pilot else 0
            seeds = list(range(first, first + seeds[0]))
        written = arguments.out if (arguments.out or "").endswith(".json") else None
        names = ("data_dir", "arms", "quick", "pilot", "threads", "work")
        options = {name: given[name] for name in names}
        say = (lambda line: print(line, file=sys.stderr)) if arguments.json else print
        result, path = run(arguments.paper, seeds, arguments.data, out=written, say=say, **options)
        if arguments.json:
            return print_json(result)
        print("\n".join([f"{result['claim']}: {result['statement']}", *show.claim_lines(result)]))
        for name in ("quick", "pilot"):
            if given[name]:
                print(f"a {name} run is no result: its numbers say nothing beyond it")
        print(f"written: {path}")
        if written:
            return 0
    if arguments.out:
        from zoo.claims import picture

        assert result is not None
        print(f"picture: {picture.save(result, arguments.out)}")
    return 0


def _parity(arguments: argparse.Namespace, extra: list[str]) -> int:
    from zoo import parity
    from zoo.command import show

    if arguments.make or arguments.out:
        return _parity_make(arguments)
    verdicts = parity.run_cases(arguments.paper, dtype=arguments.dtype, device=arguments.device)
    rows = show.verdicts(verdicts)
    if arguments.json:
        print_json(rows)
    else:
        show.print_verdicts(rows)
    return int(not rows or any(row["ok"] is False for row in rows))


def _parity_make(arguments: argparse.Namespace) -> int:
    from zoo import parity

    if not arguments.make or (arguments.out and not arguments.paper):
        raise ZooError("-o goes with a paper's script: zoo parity --make PAPER -o make_case.py")
    text = parity.template(arguments.paper) if arguments.paper else parity.GUIDE
    if arguments.out:
        path = Path(arguments.out)
        if path.exists():
            raise ZooError(f"{path} is there already; give another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        text = f"{path}\n"
    print(text, end="")
    return 0


def _weights(arguments: argparse.Namespace, extra: list[str]) -> int:
    which = arguments.use_ema if arguments.average is None else arguments.average
    if (arguments.out or arguments.to or which is not None) and arguments.what != "convert":
        raise ZooError("-o, --to, --use-ema and --average go with zoo weights convert")
    from zoo.weights import pretrained

    if arguments.what == "get":
        print(pretrained.fetch_weights(arguments.name))
    elif arguments.what == "verify":
        print(f"{arguments.name}: {pretrained.verify_weights(arguments.name)}")
    else:
        if arguments.to and not arguments.out:
            raise ZooError("--to wants the file to write: -o FILE.pkl, .pth or .safetensors")
        out = Path(arguments.out or f"{arguments.name}.safetensors")
        print(pretrained.convert_weights(arguments.name, out, arguments.to, which) or out)
    return 0


def _data_check(arguments: argparse.Namespace, extra: list[str]) -> int:
    from zoo.data import check

    report = check.check(arguments.dataset, arguments.data_dir, read=not arguments.quick)
    if arguments.json:
        print_json(report)
    else:
        check.print_report(report)
    return int(bool(report["problems"]))


def _data_latents(arguments: argparse.Namespace, extra: list[str]) -> int:
    part = arguments.part.split("/")
    if len(part) != 2 or not all(number.isdecimal() for number in part):
        raise ZooError(f"--part is K/N, such as 0/8, not {arguments.part!r}")
    from zoo.data.latents import cache_latents

    facts = cache_latents(
        arguments.dataset,
        arguments.out,
        arguments.autoencoder,
        arguments.image_size,
        arguments.data_dir,
        arguments.splits,
        not arguments.no_mirror,
        arguments.dtype,
        arguments.scale,
        device=arguments.device,
        batch_size=arguments.batch_size,
        part=(int(part[0]), int(part[1])),
    )
    counts = ", ".join(f"{count} of {split}" for split, count in facts["splits"].items())
    print(f"{arguments.out}: latents {'x'.join(map(str, facts['shape']))}, {counts}")
    return 0


def _data_patch_pca(arguments: argparse.Namespace, extra: list[str]) -> int:
    from zoo.data.patch_pca import fit_patch_pca

    facts = fit_patch_pca(
        arguments.dataset,
        arguments.out,
        arguments.image_size,
        arguments.patch_size,
        arguments.images,
        not arguments.uncentered,
        arguments.data_dir,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        device=arguments.device,
    )
    print(
        f"{arguments.out}: axes of {facts['patches']} patches of {facts['images']} pictures; the first 16 hold"
        f" {facts['explained_16']:.1%} of the variance"
    )
    return 0


def _data_stats(arguments: argparse.Namespace, extra: list[str]) -> int:
    from zoo.data import ImageDataModule
    from zoo.data.transforms import ADMCrop
    from zoo.metrics.generation import make_extractor
    from zoo.training.sampling import reference_statistics

    options = {"resize": arguments.resize} if arguments.extractor == "inception" else {}
    extractor = make_extractor(arguments.extractor, **options).to(arguments.device)
    data = ImageDataModule(
        arguments.dataset,
        arguments.data_dir,
        arguments.batch_size,
        image_size=arguments.image_size,
        eval_transform=ADMCrop(),
    )
    found = reference_statistics(data, arguments.split, extractor, arguments.device, arguments.features)
    found.write(arguments.out, arguments.features)
    print(f"{arguments.out}: {found.name}, {extractor.facts}")
    return 0


# -------------------------------------------------------------------------------------------------------- completion

_SCRIPTS = {
    "bash": """_zoo() {
    local IFS=$'\\n'
    COMPREPLY=($(zoo __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _zoo zoo""",
    "zsh": """#compdef zoo
_zoo() {
    local -a found
    found=(${(f)"$(zoo __complete "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    (( ${#found} )) && compadd -Q -a found || _files
}
compdef _zoo zoo""",
    "fish": "complete -c zoo -a '(zoo __complete (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'",
}


def _completion(arguments: argparse.Namespace, extra: list[str]) -> int:
    print(_SCRIPTS[arguments.shell])
    return 0


def _complete(words: list[str]) -> int:
    """Prints what may stand for the last of `words`, one a line; nothing where files should be completed."""
    from zoo import catalog

    *done, prefix = words or [""]
    typed = ""
    if ":" in (prefix, *done[-1:]):  # bash breaks paper:row into words, and completes the last one only
        typed = "".join([*done[-1:], ":"]) if prefix == ":" else "".join(done[-2:])
        done, prefix = (done[:-1], typed) if prefix == ":" else (done[:-2], typed + prefix)
    candidates: list[str] = []
    if not done:
        candidates = _parser()[1]
    elif done[0] in ("predict", *RUN) and len(done) == 1:
        candidates = catalog.list_recipes("*") + (catalog.list_weights() if done[0] == "predict" else [])
        candidates += [name for name in catalog.list_rows() if catalog.row(name)[1].recipe]
    elif done[0] == "preview" and len(done) == 1:
        candidates = [*catalog.list_recipes("*"), *(n for n in catalog.list_rows() if catalog.row(n)[1].recipe)]
    elif done[0] in ("finetune", "embed") and len(done) == 1:
        candidates = catalog.list_weights()
    elif done[0] == "list":
        candidates = list(KINDS) if len(done) == 1 else []
    elif done[0] == "show":
        candidates = [*catalog.list_papers(), *catalog.list_models(), *catalog.list_weights()]
        candidates += [*catalog.list_recipes("*"), *catalog.list_datasets("*"), *catalog.list_rows()]
    elif done[0] == "explain":
        candidates = catalog.list_rows()
    elif done[0] in ("leaderboard", "claim", "parity"):
        candidates = catalog.list_papers()
    elif done[0] == "weights":
        candidates = ["get", "verify", "convert"] if len(done) == 1 else catalog.list_weights()
    elif done[0] == "data":
        candidates = ["check", "latents", "stats", "patch_pca"] if len(done) == 1 else catalog.list_datasets("*")
    elif done[0] == "completion":
        candidates = list(_SCRIPTS)
    print("\n".join(name.removeprefix(typed) for name in candidates if name.startswith(prefix)))
    return 0

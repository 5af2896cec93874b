"""A run handed on: a folder of three files, on a hub (``hf://org/name``) or on this machine.

- ``model.safetensors``: the weights of the network;
- ``config.json``: its task and options, how samples are prepared, the names of its classes, where it comes from
  (:class:`Config`);
- ``README.md``: the model card.

It is read as files of strangers are: the task must be one of the zoo's, the weights must match it key for key, and
nothing is executed.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

import zoo
from zoo import files
from zoo.errors import ZooError
from zoo.weights.runs import RunModel

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_MOST = 16 << 20  # bytes of a config
_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")


class Config(BaseModel):
    """What ``config.json`` says, in the words of :attr:`zoo.weights.runs.RunModel.facts`."""

    model_config = ConfigDict(extra="forbid")

    library: Literal["paperzoo"]
    format: Literal[1]
    task: str
    options: dict[str, Any]
    classes: list[str] | None = None
    preprocess: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    recipe: str | None = None
    started_from: str | None = None
    licence: str | None = None
    metrics: dict[str, float] = {}
    steps: int | None = None
    epochs: int | None = None
    versions: dict[str, str] | None = None


def _first(error: ValidationError) -> str:
    """The first of what is wrong, and where."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]


def open_pushed(name: str) -> PushedModel:
    """The model of a hub, which is downloaded, or of a folder.

    Raises:
        ZooError: not there, not to be had, or nothing that the zoo wrote.
    """
    if not name.startswith("hf://"):
        return PushedModel(name, Path(name).expanduser())
    from zoo.weights import download

    place = name if "@" in name else f"{name}@main"
    repository, _, revision = place.removeprefix("hf://").partition("@")
    found = [download.from_hub(f"hf://{repository}@{revision}/{file}") for file in (CONFIG, WEIGHTS)]
    return PushedModel(name, found[0].parent)


class PushedModel(RunModel):
    """A model that was handed on; its parts are made as they are asked for, as those of a run."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, folder / WEIGHTS)
        self.folder = None  # of no run of this machine

    def __str__(self) -> str:
        return self.name

    @cached_property
    def config(self) -> Config:
        path = self.checkpoint.with_name(CONFIG)
        try:
            if path.stat().st_size > _MOST:
                raise ZooError(f"{self.name}: {CONFIG} is larger than any that the zoo writes")
            return Config.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ZooError(f"{self.name}: {CONFIG} is none that zoo push writes: {_first(error)}") from None

    @cached_property
    def facts(self) -> dict[str, Any]:
        config = self.config
        names = ("task", "options", "classes", "preprocess", "data", "versions", "steps", "epochs", "metrics")
        known = {name: getattr(config, name) for name in names}
        return {**known, "recipe": {"name": config.recipe}, "averages": []}

    def state(self) -> dict[str, Tensor]:
        """The weights of the task: those of its network, and what it has beside it as it is made anew."""
        from zoo.weights.files import read_safetensors, refuse_nan

        state = read_safetensors(self.checkpoint)
        refuse_nan(state, self.checkpoint)
        return {f"network.{name}": value for name, value in state.items()}

    def fill(self, task: Any) -> None:
        network, state = task.get_submodule("network"), self.state()
        self.match(state, {f"network.{name}": value.shape for name, value in network.state_dict().items()})
        network.load_state_dict({name.removeprefix("network."): value for name, value in state.items()}, strict=True)


# ------------------------------------------------------------------------------------------------------------ writing


def config_of(model: RunModel, licence: str | None = None) -> Config:
    """What is known of a run, without what is this machine's alone."""
    facts = model.facts
    start = _started_from(facts["options"])
    data = {key: value for key, value in (facts["data"] or {}).items() if key != "data_dir"}
    if data.get("dataset") and os.sep in str(data["dataset"]):
        data["dataset"] = Path(str(data["dataset"])).name  # no folder of this machine
    options = {key: value for key, value in facts["options"].items() if not key.startswith("_")}
    options |= {"init_from": None} if "init_from" in options else {}
    try:
        return Config(
            library="paperzoo",
            format=1,
            task=facts["task"],
            options=_plain(options),
            classes=model.classes,
            preprocess=_plain(facts["preprocess"]),
            data=_plain(data) or None,
            recipe=(facts["recipe"] or {}).get("name"),
            started_from=start,
            licence=licence or _licence_of(start),
            metrics={key: float(value) for key, value in facts["metrics"].items() if _is_finite(value)},
            steps=facts["steps"],
            epochs=facts["epochs"],
            versions=facts["versions"],
        )
    except ValidationError as error:
        raise ZooError(f"{model}: {_first(error)}, which is not what the zoo writes") from None


def _started_from(options: Mapping[str, Any]) -> str | None:
    source = options.get("init_from")
    if not source:
        return None
    return Path(str(source)).name if os.sep in str(source) and "://" not in str(source) else str(source)


def _licence_of(start: str | None) -> str | None:
    from zoo import catalog

    return catalog.weight(start)[1].licence if start in catalog.list_weights() else None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and float("-inf") < value < float("inf")


def _plain(value: Any) -> Any:
    """As JSON holds it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | str) or _is_finite(value):
        return value
    raise ZooError(f"an option {value!r} of the run cannot be written as JSON")


def write(model: RunModel, folder: str | os.PathLike[str], licence: str | None = None, name: str | None = None) -> Path:
    """Writes the three files into a folder, and opens what was written to see that it is the same.

    Args:
        licence: under which it is handed on; None: that of the published weights which it started from, if it did.
        name: what the card calls it and loads it by; None: the folder.

    Raises:
        ZooError: the folder holds something else; a run that cannot be opened.
    """
    target = Path(folder)
    ours = {WEIGHTS, CONFIG, CARD}
    if target.exists() and not (target.is_dir() and {path.name for path in target.iterdir()} <= ours):
        raise ZooError(f"{target} holds other things already; give a folder of its own")
    from zoo.weights.pretrained import write_safetensors

    config, state = config_of(model, licence), model.network.state_dict()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name[:60]}.", dir=target.parent))
    try:
        write_safetensors(state, part / WEIGHTS)
        files.write_text(part / CONFIG, config.model_dump_json(indent=1, exclude_defaults=False) + "\n")
        files.write_text(part / CARD, card(config, model, name or target.name))
        again = PushedModel(str(target), part).network.state_dict()
        if [key for key, value in state.items() if not value.equal(again[key])]:
            raise ZooError(f"{model}: what was written is not what was read; nothing was kept")
        part.chmod(0o755)
        target.mkdir(exist_ok=True)
        for file in (WEIGHTS, CONFIG, CARD):
            files.rename(part / file, target / file)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


_PIPELINES = {
    "image": "image-classification",
    "objects": "object-detection",
    "clip": "video-classification",
}


def card(config: Config, model: RunModel, name: str) -> str:
    """The model card: metadata that the hub reads, then what it is, its numbers, and how it is loaded."""
    import yaml

    paper = _paper_of(config.task)
    data = str((config.data or {}).get("dataset") or "") or None
    task = config.task.rpartition(".")[2]
    kind = (config.preprocess or {}).get("kind")
    tags = ["paperzoo", "pytorch", *([paper.slug.replace("_", "-"), paper.field] if paper else [])]
    header: dict[str, Any] = {"library_name": "paperzoo", "tags": tags}
    if config.licence:
        header["license"] = config.licence.lower()
    if kind in _PIPELINES and (config.classes or kind == "objects"):
        header["pipeline_tag"] = _PIPELINES[kind]
    if data:
        header["datasets"] = [data]
    shown = {key: value for key, value in config.metrics.items() if key.startswith(("val/", "test/"))}
    if shown and data:
        results = {
            "task": {"type": header.get("pipeline_tag", "other")},
            "dataset": {"name": data, "type": data},
            "metrics": [{"type": key, "value": round(value, 6)} for key, value in shown.items()],
        }
        header["model-index"] = [{"name": name.rpartition("/")[2], "results": [results]}]
    count = sum(p.numel() for p in model.network.parameters())
    lines = ["---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(), "---", "", f"# {name}", ""]
    what = f"{type(model.network).__name__} of {count / 1e6:.2f} M parameters, trained as {task}"
    lines += [what + (f" on {data}" if data else "") + f" by paperzoo {zoo.__version__}."]
    if paper:
        link = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else paper.title
        lines += [f"Paper: {link}, {paper.year}."]
    lines += [f"Recipe: `{config.recipe}`; {config.steps} steps, {config.epochs} epochs."] if config.recipe else []
    if config.started_from:
        lines += [f"Started from `{config.started_from}`."]
    lines += [f"Licence: {config.licence}." if config.licence else "Licence: none was stated.", ""]
    if shown:
        lines += ["| metric | value |", "|---|---|", *(f"| {key} | {value:.4g} |" for key, value in shown.items()), ""]
    lines += ["```python", "import zoo", "", f'model = zoo.create_model("{name}")']
    if config.preprocess is not None and not config.preprocess.get("transform"):
        lines += [f'preprocess = zoo.create_preprocess("{name}")']
    lines += ["```", ""]
    if config.classes:
        most = config.classes[:200]
        lines += [f"Classes: {', '.join(most)}{', ...' * (len(config.classes) > 200)}.", ""]
    return "\n".join(lines)


def _paper_of(task: str) -> Any:
    from zoo import catalog

    module = task.rpartition(".")[0]
    cards = [catalog.paper(slug) for slug in catalog.list_papers()]
    return next((one for one in cards if module in (one.import_name, f"zoo_papers_{one.source.stem}")), None)


# ------------------------------------------------------------------------------------------------------------- sending


def send(folder: Path, name: str, private: bool = False) -> str:
    """Uploads the folder's files as one commit to ``hf://org/name``, which is made where it is missing; returns its
    address. The token is that of ``hf auth login`` or ``HF_TOKEN``, the hub ``HF_ENDPOINT``.

    Raises:
        ZooError: no such name, no right to write, no connection; the token is never among the words.
    """
    found = _HUB.fullmatch(name)
    if found is None or found["revision"]:
        raise ZooError(f"a model on the hub is hf://org/name, not {name!r}")
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="paperzoo", library_version=zoo.__version__)
    try:
        address = api.create_repo(found["repo"], private=private or None, exist_ok=True)
        additions = [CommitOperationAdd(file, folder / file) for file in (WEIGHTS, CONFIG, CARD)]
        api.create_commit(found["repo"], additions, commit_message=f"zoo push, paperzoo {zoo.__version__}")
    except Exception as error:  # the hub's errors have many roots
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = "the hub does not know you, or gives you no right to write: hf auth login, or HF_TOKEN"
        reason = said if status in (401, 403) else " ".join(str(error).split()) or type(error).__name__
        if token := get_token():
            reason = reason.replace(token, "***")
        raise ZooError(f"{name}: {reason}") from None
    return str(address)

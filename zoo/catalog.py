"""What the zoo holds: the cards of papers and data sets, and the names of recipes.

A card is a YAML file of facts beside the code it describes: ``zoo/<field>/<paper>.yaml`` for a paper,
``data/<name>.yaml`` for a data set. Reading them needs neither torch nor the papers' code.

Papers of one's own join the catalog without touching the package: ``ZOO_PAPERS`` names folders (separated as in
``PATH``) that hold ``<slug>.py`` with its card ``<slug>.yaml`` beside it.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from zoo.errors import ZooError, unknown
from zoo.paths import FIELDS, cache_dir, card_files, share, stamp
from zoo.paths import matching as _matching

_PACKAGE = Path(__file__).resolve().parent

# A name that a run logs, or a linear expression of one.
LOGGED = r"^(?:(?P<offset>\d+(?:\.\d+)?) (?P<sign>[+-]) )?(?:(?P<scale>\d+(?:\.\d+)?) \* )?(?P<name>\S+)$"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Facts(BaseModel):
    """Base of everything that is declared in a YAML file: no unknown keys, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Classifier(Facts):
    """What timm wants to know of a classifier, at the model's defaults.

    `dataset` is the one it is made for, whose mean and deviation its images are normalised by. `stem` and `head` are
    the names of its first convolution and of its last layer; `pool` is the side of what is pooled before that, in a
    network that takes other sizes than `image_size` too.
    """

    dataset: str = "imagenet1k"
    image_size: int
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875
    num_classes: int
    stem: str
    head: str
    pool: int | None = None


class ModelEntry(Facts):
    """A published size: the name of the function that builds it, and its number of parameters at its defaults.

    A classifier with timm's protocol says so by `classifier`; :mod:`zoo.timm` registers it.
    """

    name: str
    params: int
    classifier: Classifier | None = None
    summary: str = ""


class Preprocess(Facts):
    """What weights expect: resize the short side to `size / crop_pct`, crop `size`, scale to [0, 1], normalise.

    With `longest`, as detectors want it, nothing is cropped: the short side becomes `size` pixels, or fewer where the
    long one would have more than `longest`. With `canvas`, which networks for ARC want, a grid of colours is laid on a
    canvas of `size` pixels instead. `mean` and `std` are of the `channels` in their order. `kernel` is whose resize it
    is (:func:`zoo.data.transforms.resize`); by the `crop_mode` "square" the middle is cut out before the resize.
    """

    size: int
    longest: int | None = None
    canvas: bool = False
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    kernel: Literal["pillow", "torch7", "tensorflow", "tensorflow_v1"] = "pillow"
    crop_mode: Literal["center", "square"] = "center"
    mean: list[float] = [0.485, 0.456, 0.406]
    std: list[float] = [0.229, 0.224, 0.225]
    channels: Literal["rgb", "bgr"] = "rgb"


class WeightMetric(Facts):
    """A published result of one set of weights."""

    dataset: str
    metric: str
    value: float
    where: str


class Weight(Facts):
    """A published checkpoint.

    `model` is the function it loads into (default: `name` up to the first dot), called with `overrides`; `converter` is
    the function of the paper's module that puts the file's keys into the model's names. Keys must match one for one,
    but for `fresh` (parameters of the model that the file need not have: a new head) and `spare`
    (keys of the file that the model need not have), both patterns such as ``fc_norm.*``. Of a file that holds raw
    weights and their average, `use_ema` says which are published (null: the average); of several averages, its name.
    """

    name: Annotated[str, Field(pattern=r"^[^.\s]+\.[^\s]+$")]
    model: str = ""
    urls: Annotated[list[str], Field(min_length=1)]
    sha256: Sha256 | None = None
    md5_prefix: Annotated[str, Field(pattern=r"^[0-9a-f]{4,32}$")] | None = None
    size: int | None = None
    licence: str
    kind: Literal["encoder", "full", "classifier"]
    target: Literal["norm_pix", "plain"] | None = None
    layout: str | None = None
    converter: Annotated[str, Field(pattern=r"^convert_\w+$")] = "convert_official"
    overrides: dict[str, Any] = {}
    fresh: list[str] = []
    spare: list[str] = []
    use_ema: bool | str | None = None
    preprocess: Preprocess
    metrics: list[WeightMetric] = []
    notes: str = ""

    @model_validator(mode="before")
    @classmethod
    def _model_from_name(cls, facts: Any) -> Any:
        if isinstance(facts, dict) and "model" not in facts and isinstance(facts.get("name"), str):
            return {**facts, "model": facts["name"].partition(".")[0]}
        return facts


class Measured(Facts):
    """A value measured by this project: where, when, and by which command."""

    value: float
    hardware: str
    date: datetime.date
    command: str


class Row(Facts):
    """A line of a leaderboard: a published value and its protocol, what runs it, and our own value.

    ``PAPER:ID`` is its address. It is its `recipe` with `options` (dotted keys as on the command line). Where that is a
    first stage, `then` names the recipe or row that starts from its checkpoint and gives the value. `weights` names
    published weights that give the number without training. `logged` is how the value follows from what a run logs,
    such as ``100 - 100 * test/top1``, and `tolerance` how far a measured value may lie from the published one, in the
    unit of the row; both have defaults by metric (:mod:`zoo.command.verdict`).
    """

    id: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    dataset: str
    metric: str
    unit: str = ""
    model: str
    value: float | None
    where: str
    protocol: dict[str, Any] = {}
    recipe: str | None = None
    options: dict[Annotated[str, Field(pattern=r"^[a-z_]\w*(\.\w+)*$")], Any] = {}
    then: str | None = None
    weights: str | None = None
    logged: Annotated[str, Field(pattern=LOGGED)] | None = None
    tolerance: Annotated[float, Field(gt=0)] | None = None
    cost: str | None = None
    measured: Measured | None = None
    status: Literal["verified", "partly", "not run"] = "not run"
    higher_is_better: bool = True

    @model_validator(mode="after")
    def _status_is_backed(self) -> Row:
        if (self.measured is None) != (self.status == "not run"):
            raise ValueError(f"row {self.id!r}: status {self.status!r} and `measured` do not agree")
        if self.recipe is None and (self.options or self.weights or self.then):
            raise ValueError(f"row {self.id!r}: options and weights are of a recipe, and it names none")
        return self


class LedgerEntry(Facts):
    """A place where paper, official code and zoo differ."""

    topic: str
    paper: str
    code: str
    zoo: str


class Claim(Facts):
    """The paper's central claim in miniature; `result` is a file under ``benchmarks/claims/results``."""

    statement: str
    command: str
    arms: list[str]
    result: str


class InitialLoss(Facts):
    """What theory says of a recipe's first training loss, made small by the contract of pocket recipes: log K of K
    classes, and the like."""

    value: float
    tolerance: float
    because: str


class PaperCard(Facts):
    """All that is known about a paper; ``zoo/<field>/<slug>.yaml``.

    Its code is in ``<slug>.py`` beside it, or in that of another paper which `module` names.
    """

    slug: str
    field: str
    module: str | None = None
    title: str
    authors: list[str]
    year: int
    arxiv: str | None = None
    venue: str | None = None
    code: str | None = None
    licence: str | None = None
    summary: str
    models: list[ModelEntry] = []
    weights: list[Weight] = []
    leaderboard: list[Row] = []
    ledger: list[LedgerEntry] = []
    claim: Claim | None = None
    # By the recipe's name without the paper's: {pocket: ...}.
    initial_loss: dict[str, InitialLoss] = {}
    _path: Path = PrivateAttr(default=Path())

    @model_validator(mode="after")
    def _names_are_real(self) -> PaperCard:
        models = [entry.name for entry in self.models]
        for kind, names in (
            ("model", models),
            ("weights", [entry.name for entry in self.weights]),
            ("leaderboard id", [row.id for row in self.leaderboard]),
        ):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{kind} {twice[0]!r} stands here twice")
        for entry in self.weights:
            if entry.model not in models:
                raise ValueError(f"weights {entry.name!r} name {entry.model!r}, which is none of the card's models")
        for row in self.leaderboard:
            if row.weights is not None and row.weights not in {entry.name for entry in self.weights}:
                raise ValueError(f"row {row.id!r}: {row.weights!r} is none of the card's weights")
        return self

    @property
    def path(self) -> Path:
        """The card's file."""
        return self._path

    @property
    def source(self) -> Path:
        """The file of the paper's code."""
        return self._path.with_name(f"{self.module or self.slug}.py")

    @property
    def import_name(self) -> str:
        """The import name of the paper's code (a paper from ``ZOO_PAPERS`` is imported from its file)."""
        return f"zoo.{self.field}.{self.module or self.slug}"

    @property
    def is_own(self) -> bool:
        """Whether the card comes from a folder of ``ZOO_PAPERS``, not from the package."""
        return _PACKAGE not in self._path.parents


class Columns(Facts):
    """The columns of a Hugging Face data set."""

    image: str = "image"
    label: str = "label"
    caption: str | None = None


class DataCard(Facts):
    """All that is known about a data set; ``data/<name>.yaml``. `splits` gives the number of samples where known; of a
    panoptic set `category_ids` are the file's own numbers of classes and, after them, of stuff."""

    name: str
    title: str
    home: str | None = None
    licence: str
    task: str
    splits: dict[str, int | None]
    num_classes: int | None = None
    class_names: list[str] | None = None
    stuff_names: list[str] | None = None
    category_ids: list[int] | None = None
    image_size: int | None = None
    channels: int = 3
    mean: list[float] | None = None
    std: list[float] | None = None
    hub_id: str | None = None
    urls: list[str] = []
    layouts: list[str] = []
    columns: Columns = Columns()
    notes: str = ""

    @model_validator(mode="after")
    def _counts_agree(self) -> DataCard:
        if self.class_names is not None and self.num_classes != len(self.class_names):
            raise ValueError(f"num_classes is {self.num_classes}, but there are {len(self.class_names)} class_names")
        for key in ("mean", "std"):
            if getattr(self, key) is not None and len(getattr(self, key)) != self.channels:
                raise ValueError(f"{key} needs {self.channels} numbers, one a channel")
        return self


# ---- lists ----------------------------------------------------------------------------------------------------------


def list_papers(field: str | None = None, pattern: str | Sequence[str] = "*") -> list[str]:
    """Slugs of the papers, of one `field` if given."""
    cards = _papers()
    fields = {card.field for card in cards.values()}.union(FIELDS)
    if field is not None and field not in fields:
        raise unknown("field", field, fields)
    return _matching((slug for slug, card in cards.items() if field in (None, card.field)), pattern)


def list_models(pattern: str | Sequence[str] = "*", pretrained: bool = False) -> list[str]:
    """Names of the models that match a pattern, or one of several; with `pretrained`, of the published weights
    (``model.tag``) that can be loaded."""
    if pretrained:
        return list_weights(pattern)
    return _matching((entry.name for card in _papers().values() for entry in card.models), pattern)


def list_weights(pattern: str | Sequence[str] = "*", licence: str | None = None) -> list[str]:
    """Names of the published weights, of a `licence` (a pattern too: ``CC-BY*``) if given."""
    entries = [entry for card in _papers().values() for entry in card.weights]
    if licence is not None:
        wanted = set(_matching((entry.licence for entry in entries), licence))
        entries = [entry for entry in entries if entry.licence in wanted]
    return _matching((entry.name for entry in entries), pattern)


def list_recipes(pattern: str | Sequence[str] = "*") -> list[str]:
    """Names of the recipes: ``<paper>/<recipe>``."""
    root = share("recipes")
    return _matching((path.relative_to(root).with_suffix("").as_posix() for path in root.glob("*/*.yaml")), pattern)


def list_rows(pattern: str | Sequence[str] = "*") -> list[str]:
    """Addresses of the leaderboards' rows, ``paper:id``."""
    return _matching((f"{card.slug}:{row.id}" for card in _papers().values() for row in card.leaderboard), pattern)


def list_datasets(pattern: str | Sequence[str] = "*") -> list[str]:
    """Names of the data sets that have a card."""
    return _matching((path.stem for path in share("data").glob("*.yaml")), pattern)


# ---- single entries -------------------------------------------------------------------------------------------------


def paper(slug: str) -> PaperCard:
    """The card of a paper. Raises ZooError for an unknown one."""
    cards = _papers()
    if slug not in cards:
        raise unknown("paper", slug, cards)
    return cards[slug]


def model(name: str) -> tuple[PaperCard, ModelEntry]:
    """The paper and the entry of a model; `name` may carry a weights tag."""
    if "." in name:
        _, entry = weight(name)
        name = entry.model
    entries = {entry.name: (card, entry) for card in _papers().values() for entry in card.models}
    if name not in entries:
        raise unknown("model", name, entries)
    return entries[name]


def weight(name: str) -> tuple[PaperCard, Weight]:
    """The paper and the entry of published weights, ``model.tag``."""
    entries = {entry.name: (card, entry) for card in _papers().values() for entry in card.weights}
    if name not in entries:
        raise unknown("weights", name, entries)
    return entries[name]


def row(name: str) -> tuple[PaperCard, Row]:
    """The paper and the entry of a leaderboard row, ``paper:id``."""
    slug, _, key = name.partition(":")
    card = paper(slug)
    for entry in card.leaderboard:
        if entry.id == key:
            return card, entry
    raise unknown("leaderboard row", name, (f"{slug}:{entry.id}" for entry in card.leaderboard))


def is_row(name: str) -> bool:
    """Whether `name` is the address of a row, known or not: a word, a colon and a word."""
    return re.fullmatch(r"\w+:[\w.-]+", name) is not None and not Path(name).is_file()


def data_card(name: str) -> DataCard:
    """The card of a data set."""
    path = share("data") / f"{name}.yaml"
    if name not in list_datasets():
        raise unknown("dataset", name, list_datasets())
    return _data_card(path, stamp(path))


def recipe_path(recipe: str | os.PathLike[str]) -> Path:
    """The file of a recipe given by name (``mae/pocket``), by the beginning of one name, by path, or by a row."""
    name = os.fspath(recipe)
    if is_row(name):
        _, entry = row(name)
        if entry.recipe is None:
            raise ZooError(f"the row {name} has no recipe: nothing here runs it (zoo show {name} says what is known)")
        name = entry.recipe
    names = list_recipes()
    if name in names:
        return share("recipes") / f"{name}.yaml"
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise ZooError(f"no recipe file {name!r}")
    begins = [known for known in names if name and known.startswith(name)]
    if len(begins) > 1:
        raise ZooError(f"recipe {name!r} may mean {', '.join(begins)}; give one of them")
    if not begins:
        raise unknown("recipe", name, names)
    return share("recipes") / f"{begins[0]}.yaml"


def recipe_header(recipe: str | os.PathLike[str]) -> str:
    """The comment a recipe opens with, without its marks: what it reproduces, its cost, its command."""
    lines = []
    for line in recipe_path(recipe).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return "\n".join(lines).strip()


# ---- reading cards --------------------------------------------------------------------------------------------------


def _papers() -> dict[str, PaperCard]:
    """All cards by slug; read once, and again when a file changes."""
    return _index(tuple((path, own, stamp(path)) for path, own in card_files()))


@lru_cache(maxsize=4)
def _index(files: tuple[tuple[Path, bool, str], ...]) -> dict[str, PaperCard]:
    cards: dict[str, PaperCard] = {}
    owners: dict[str, str] = {}
    contents = _contents(files)
    for path, own, _ in files:
        card = validated(PaperCard, path, contents[path])
        card._path = path
        if card.slug != path.stem:
            raise ZooError(f"{_short(path)}: slug is {card.slug!r}; it must be the file's name, {path.stem!r}")
        if not own and card.field != path.parent.name:
            raise ZooError(f"{_short(path)}: field is {card.field!r}; it must be the folder's name")
        for name in (card.slug, *(entry.name for entry in card.models), *(entry.name for entry in card.weights)):
            if owners.setdefault(name, card.slug) != card.slug or card.slug in cards:
                raise ZooError(f"{_short(path)}: the name {name!r} is taken by {_short(cards[owners[name]].path)}")
        cards[card.slug] = card
    return cards


def _contents(files: Iterable[tuple[Path, bool, str]]) -> dict[Path, dict[str, Any]]:
    """What the cards say. Kept as JSON in the cache folder: many cards are read from there ten times as fast."""
    store = cache_dir() / "cards.json"
    try:
        known = json.loads(store.read_bytes())
        kept = {path: known[str(path)][1] for path, _, stamp in files if known.get(str(path), [""])[0] == stamp}
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        kept = {}
    contents = {path: kept[path] if path in kept else read_facts(path) for path, *_ in files}
    if len(kept) < len(contents):
        temporary = store.with_name(f"{store.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # a cache folder that cannot be written costs time, nothing else
            store.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({str(path): [stamp, contents[path]] for path, _, stamp in files}))
            os.replace(temporary, store)
    return contents


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML in which a key that stands twice is an error, not silently the last one, and dates stay text."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "a mapping is wanted here", node.start_mark)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# Beyond what any card or recipe needs; a file that asks for more is an accident or an attack.
_MOST_BYTES, _MOST_NODES, _MOST_DEPTH, _MOST_DIGITS = 4 << 20, 200_000, 100, 400


def read_facts(path: Path, kind: str = "card") -> dict[str, Any]:
    """The mapping that a card, or another `kind` of YAML file, holds; safe, whatever the file is.

    Raises:
        ZooError: no regular file, not UTF-8, not YAML, a key that stands twice, no mapping; or one of absurd size,
            depth or numbers, counted after its aliases are expanded.
    """
    name = _short(path)
    try:
        if not path.is_file():
            raise ZooError(f"{name}: not a file")
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            line = raw[: error.start].count(b"\n") + 1
            raise ZooError(f"{name}: not UTF-8 text (line {line}); save it as UTF-8") from error
        raise ZooError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    facts = parse_yaml(text, name if kind == "card" else f"{name}: not YAML")
    if not isinstance(facts, dict):
        raise ZooError(f"{name}: a {kind} is a mapping of keys, not {type(facts).__name__}")
    return facts


def parse_yaml(text: str, name: str) -> Any:
    """What YAML `text` says, under the bounds of :func:`read_facts`; `name` is its file or option, for errors."""
    try:
        check_yaml(text, name)
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ZooError(f"{name}: {' '.join(str(error).split())[:300]}") from error


def check_yaml(text: str, name: str) -> None:
    """Refuses YAML `text` of absurd size, without building anything of it.

    Raises:
        ZooError: too long, too deep, too many values once aliases are expanded, an alias of what holds it, a number of
            more than 400 digits. yaml.YAMLError for what is no YAML.
    """
    if len(text) > _MOST_BYTES:
        raise ZooError(f"{name}: more than {_MOST_BYTES >> 20} MB of YAML")
    sizes: dict[str, int] = {}  # of what each anchor stands for
    stack: list[tuple[str | None, int]] = []  # open collections: their anchors, and how many nodes came before
    count = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in [anchor for anchor, _ in stack]:
                raise ZooError(f"{name}: the alias *{event.anchor} stands in what it names")
            count += sizes.get(str(event.anchor), 0)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
            if event.implicit[0] and len(event.value) > _MOST_DIGITS and re.match(r"[-+.\d]", event.value):
                raise ZooError(f"{name}: a number of {len(event.value)} digits")
        elif isinstance(event, yaml.CollectionStartEvent):
            stack.append((event.anchor, count))
            count += 1
            if len(stack) > _MOST_DEPTH:
                raise ZooError(f"{name}: more than {_MOST_DEPTH} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = stack.pop()
            if anchor:
                sizes[anchor] = count - before
        if count > _MOST_NODES:
            raise ZooError(f"{name}: more than {_MOST_NODES:,} values once its aliases are expanded")


_Card = TypeVar("_Card", bound=BaseModel)


@lru_cache(maxsize=64)
def _data_card(path: Path, stamp: str) -> DataCard:
    """The data set's card; `stamp` makes the cache of this function forget a file that changed."""
    card = validated(DataCard, path, read_facts(path))
    if card.name != path.stem:
        raise ZooError(f"{_short(path)}: name is {card.name!r}; it must be the file's name, {path.stem!r}")
    return card


def validated(kind: type[_Card], path: Path, facts: dict[str, Any]) -> _Card:
    """The facts of the file `path` as a `kind`. Raises ZooError, one line, for the first that does not fit."""
    try:
        return kind.model_validate(facts)
    except ValidationError as error:
        raise ZooError(f"{_short(path)}: {_first_problem(error, kind)}") from error


def _first_problem(error: ValidationError, kind: type[BaseModel]) -> str:
    """One line for the first thing wrong with a card: the key, and what is the matter with it."""
    problem = error.errors(include_url=False)[0]
    key = ""
    for part in problem["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), _keys_at(kind, problem["loc"][:-1]), n=1, cutoff=0.3)
        message = "unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{key}: {message}{more}" if key else f"{message}{more}"


def _keys_at(kind: type[BaseModel], where: Iterable[str | int]) -> list[str]:
    """The keys a card may have at a place such as ``weights, 0, preprocess``."""
    for part in where:
        if isinstance(part, str) and part in kind.model_fields:  # else a name of the user's own, in a mapping
            kinds = _models_in(kind.model_fields[part].annotation)
            kind = kinds[0] if kinds else kind
    return list(kind.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _models_in(part)]


def _short(path: Path) -> str:
    """A path as the user best knows it: from the package's parent, or whole."""
    return str(path.relative_to(_PACKAGE.parent)) if _PACKAGE.parent in path.parents else str(path)

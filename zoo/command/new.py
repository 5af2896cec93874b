"""`zoo new PAPER --field FIELD`: the files of a paper, which pass lint, types and the contract as they are."""

from __future__ import annotations

import datetime
import json
import keyword
import re
from pathlib import Path
from string import Template

from pydantic import BaseModel

from zoo import catalog, files
from zoo.errors import ZooError, unknown
from zoo.paths import share

# Where each template goes, from the root of the checkout.
_FILES = {
    "paper.py": "zoo/{field}/{paper}.py",
    "card.yaml": "zoo/{field}/{paper}.yaml",
    "pocket.yaml": "recipes/{paper}/pocket.yaml",
    "test.py": "tests/papers/test_{paper}.py",
    "adapter.py": "tests/parity/adapters/{paper}.py",
    "claim.yaml": "benchmarks/claims/{paper}.yaml",
}
_TEMPLATES = Path(__file__).with_name("skeleton")


def write_skeleton(paper: str, field: str, title: str | None = None) -> list[Path]:
    """Writes the files of a new paper into the checkout that `zoo` runs from; their paths.

    Raises:
        ZooError: no such field, a name that is none or is taken, a file that stands already, no checkout.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", paper) or keyword.iskeyword(paper):
        raise ZooError(
            f"a paper's name is small letters, digits and single underscores, such as moco_v2; not {paper!r}"
        )
    if title is not None and (not title.strip() or re.search(r'[\\\x00-\x1f]|"""', title)):
        raise ZooError(f"a paper's title is one line without a backslash, not {title!r}")
    if field not in catalog.FIELDS:
        raise unknown("field", field, catalog.FIELDS)
    if paper in catalog.list_papers():
        raise ZooError(f"the paper {paper!r} is here already: {catalog.paper(paper).path}")
    root = share("recipes").parent
    if not (root / "pyproject.toml").is_file():
        raise ZooError(
            "zoo new writes into a checkout of the repository, and this zoo is an installed one;"
            " papers outside the package: ZOO_PAPERS (CONTRIBUTING.md)"
        )
    names = {
        "paper": paper,
        "field": field,
        "Class": "".join(part.capitalize() for part in paper.split("_")),
        "title": title or paper.replace("_", " "),
        "quoted": json.dumps(title or paper.replace("_", " "), ensure_ascii=False),
        "year": str(datetime.date.today().year),
    }
    texts = {
        root / place.format(paper=paper, field=field): Template(
            (_TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")
        ).substitute(names)
        for template, place in _FILES.items()
    }
    if standing := [path for path in texts if path.exists()]:
        raise ZooError(f"{standing[0]} is here already; nothing was written")
    for path, text in texts.items():
        files.write_text(path, text)
    refresh_readme(root / "README.md")
    return [path.relative_to(root) for path in texts]


def refresh_readme(readme: Path) -> None:
    """Brings README's table of papers up to date with the cards."""
    from zoo.command.show import papers_markdown

    begin, end = "<!-- papers -->\n", "<!-- /papers -->"
    before, found, rest = readme.read_text(encoding="utf-8").partition(begin)
    if found and end in rest:
        readme.write_text(before + begin + papers_markdown() + end + rest.partition(end)[2], encoding="utf-8")


def card_fields() -> str:
    """The fields of a paper's card as Markdown, generated from the schema (:class:`zoo.catalog.PaperCard`)."""
    paragraphs: list[str] = []
    kinds: list[type[BaseModel]] = [catalog.PaperCard]
    for kind in kinds:  # grows by the kinds that the fields name
        fields = []
        for name, field in kind.model_fields.items():
            text = re.sub(r"Annotated\[(.+), Field\(.*\)\]", r"\1", kind.__annotations__[name])
            default = "" if field.is_required() else f" = {field.get_default(call_default_factory=True)!r}"
            fields.append(f"`{name}: {text}{default}`")
            for word in re.findall(r"\w+", text):
                inner = getattr(catalog, word, None)
                if isinstance(inner, type) and issubclass(inner, BaseModel) and inner not in kinds:
                    kinds.append(inner)
        about = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join((kind.__doc__ or "").split()).replace("``", "`"))
        paragraphs.append(f"**{kind.__name__}**: {about}\n{', '.join(fields)}.\n")
    return "\n".join(paragraphs)

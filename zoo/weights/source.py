"""A network with what is known of it, by whatever name it goes: a model with published weights, a run, a pushed one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from zoo import catalog
from zoo.errors import ZooError
from zoo.weights.pretrained import create_model
from zoo.weights.runs import is_run, open_run


@dataclass
class Source:
    """`preprocess` in the words of :class:`zoo.catalog.Preprocess`, `classes` the names in order that a run knows,
    `facts` further plain values that tell where it comes from."""

    name: str
    network: nn.Module
    preprocess: Mapping[str, Any] | None = None
    classes: list[str] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    not_exported: str = ""

    @property
    def size(self) -> int | None:
        """Side of its pictures, where these are squares that preprocessing makes."""
        facts = self.preprocess or {}
        if facts.get("longest") or facts.get("canvas") or facts.get("kind") in ("objects", "grid", "clip"):
            return None
        return facts.get("size")

    @property
    def channels(self) -> int:
        return len((self.preprocess or {}).get("mean") or (0, 0, 0))


def open_source(
    name: str, weights: str | None = None, use_ema: bool | str | None = None, untrained: bool = False
) -> Source:
    """The network that `name` means, with its weights, in evaluation mode.

    Args:
        name: a model with the tag of its weights, a model of which one set is published, or what
            :func:`zoo.weights.runs.is_run` takes.
        weights: of a model, load these instead: a file, an address, or the name of others.
        use_ema: of a file that holds raw weights and their average; see :func:`zoo.create_model`.
        untrained: of a model without a tag: random weights.

    Raises:
        ZooError: unknown names; a model of which nothing says what weights are meant.
    """
    if is_run(name):
        if weights is not None or untrained:
            raise ZooError(f"{name} has its own weights: --weights and --untrained are for models")
        run = open_run(name, use_ema)
        known = run.facts
        facts = {"task": known["task"], "recipe": (known["recipe"] or {}).get("name"), "steps": known["steps"]}
        reason = run.task_class.not_exported
        return Source(name, run.network.eval(), known["preprocess"], run.classes, facts, reason)
    card, model = catalog.model(name)
    published = [entry for entry in card.weights if entry.model == model.name]
    entry = catalog.weight(name)[1] if "." in name else None
    if untrained and (entry is not None or weights is not None):
        raise ZooError("--untrained is of a model without weights")
    if entry is None and weights is None and not untrained:
        if len(published) != 1:
            offered = ", ".join(one.name for one in published) or "--weights FILE"
            raise ZooError(f"{name}: name the weights: {offered}; --untrained takes random ones")
        entry = published[0]
    network = create_model(
        entry.name if entry and weights is None else name, pretrained=entry is not None and weights is None,
        weights=weights, use_ema=use_ema,
    )  # fmt: skip
    said = entry or next(iter(published), None)
    facts = {"model": entry.name if entry else model.name, "paper": card.title}
    if entry is not None:
        facts |= {"licence": entry.licence}
    preprocess = None if said is None else said.preprocess.model_dump(mode="json")
    if preprocess is None and model.classifier is not None:
        preprocess = {"size": model.classifier.image_size}
    return Source(facts["model"], network.eval(), preprocess, facts=facts)

"""The zoo's classifiers under timm's names: ``import zoo.timm``, then ``timm.create_model("preact_resnet164_cifar")``.

Every model that its paper's card calls a classifier is registered, with a pretrained_cfg for each of its weights
(``preact_resnet200.fb_in1k``). ``pretrained=True`` takes the zoo's own way: fetched, checked against its checksum,
read without running anything in it, and converted key for key.

A name that timm has already keeps its meaning there; ours is then registered with ``zoo_`` in front.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from zoo import catalog
from zoo.catalog import ModelEntry, PaperCard, Weight
from zoo.errors import ZooError
from zoo.weights.pretrained import create_model

__all__: list[str] = []  # timm adds the names that it registers
default_cfgs: dict[str, Any] = {}  # where timm looks for what is known of them


def _facts(card: PaperCard, model: ModelEntry, weights: Weight | None = None) -> dict[str, Any]:
    """timm's description of a classifier, alone or with a set of weights."""
    about = model.classifier
    assert about is not None
    data = catalog.data_card(about.dataset)
    facts: dict[str, Any] = {
        "mean": tuple(data.mean or ()),
        "std": tuple(data.std or ()),
        "crop_pct": about.crop_pct,
        "input_size": (3, about.image_size, about.image_size),
        "fixed_input_size": about.pool is None,
        "pool_size": None if about.pool is None else (about.pool, about.pool),
        "num_classes": about.num_classes,
        "first_conv": about.stem,
        "classifier": about.head,
        "paper_name": card.title,
        "paper_ids": None if card.arxiv is None else f"arXiv:{card.arxiv}",
        "origin_url": card.code,
    }
    if weights is not None:
        prep = weights.preprocess
        facts |= {
            "url": weights.urls[0],
            "license": weights.licence,
            "input_size": (3, prep.size, prep.size),
            "num_classes": weights.overrides.get("num_classes", about.num_classes),
            "interpolation": prep.interpolation,
            "crop_pct": prep.crop_pct,
            "mean": tuple(prep.mean),
            "std": tuple(prep.std),
        }
    return facts


def _entrypoint(name: str, model: ModelEntry) -> Callable[..., nn.Module]:
    """The function that timm calls for `name`."""

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        cfg, overlay = options.get("pretrained_cfg"), options.get("pretrained_cfg_overlay") or {}
        device, dtype = options.pop("device", None), options.pop("dtype", None)
        tag = cfg.get("tag") if isinstance(cfg, dict) else getattr(cfg, "tag", cfg)
        if pretrained and not tag:
            tag = default_cfgs[name].tags[0]
        # Weights of one's own come by the overlay: timm's train.py --pretrained-path
        source = next((overlay[key] for key in ("file", "url") if overlay.get(key)), None) if pretrained else None
        wanted = model.name if source or not tag else f"{model.name}.{tag}"

        def network(**arguments: Any) -> nn.Module:
            size = arguments.get("img_size")
            if size is not None and not isinstance(size, int):
                if len(set(size)) > 1:
                    raise ZooError(f"{name} takes square images, not img_size {tuple(size)}")
                arguments["img_size"] = size[0]
            if source:  # timm leaves the head out where the overlay says -1 classes, and so does train.py
                anew = overlay.get("num_classes") == -1
                with torch.device(device or "cpu"):
                    net = create_model(wanted, weights=source, **arguments)
                    if anew and net.num_classes:
                        net.reset_classifier(net.num_classes)  # type: ignore[operator]
            else:
                with torch.device(device or "cpu"):
                    net = create_model(wanted, pretrained=pretrained, **arguments)
            net = net.to(dtype=dtype)
            if options.get("features_only"):
                if not hasattr(net, "forward_intermediates"):
                    raise ZooError(f"{name} has no intermediate features to give: leave features_only out")
                if "out_indices" not in options:
                    getter["out_indices"] = tuple(range(len(net.feature_info)))  # type: ignore[arg-type]
            return net

        getter: dict[str, Any] = {"feature_cls": "getter"}  # `network` adds which there are
        return build_model_with_cfg(network, name, pretrained=False, feature_cfg=getter, **options)

    create.__name__, create.__qualname__, create.__doc__ = name, name, model.summary
    return create


def _register() -> None:
    for slug in catalog.list_papers():
        card = catalog.paper(slug)
        for model in card.models:
            if model.classifier is None:
                continue
            name = f"zoo_{model.name}" if timm.is_model(model.name) else model.name
            published = [weights for weights in card.weights if weights.model == model.name]
            published.sort(key=lambda weights: weights.kind != "classifier")  # the first is what a name alone means
            cfgs: Any = {
                f"{name}.{weights.name.partition('.')[2]}": _facts(card, model, weights) for weights in published
            }
            default_cfgs.update(generate_default_cfgs(cfgs or {name: _facts(card, model)}))
            create = _entrypoint(name, model)
            globals()[name] = create
            register_model(create)


_register()

"""LVIS's annotations (Gupta et al. 2019, arXiv 1908.03195) of COCO's classes.

LVIS names its classes by synsets of WordNet. Those of COCO's 80 classes are LVIS's own mapping (lvis-api,
data/coco_to_synset.json); v0.5 has no hot dog and no oven under these names, v1 no hot dog.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zoo.errors import ZooError

# Where the synset of one of COCO's classes is not its first noun.
_SYNSETS = {
    "fire hydrant": "fireplug.n.01", "cow": "beef.n.01", "handbag": "bag.n.04", "tie": "necktie.n.01",
    "suitcase": "bag.n.06", "skis": "ski.n.01", "sports ball": "ball.n.06", "kite": "kite.n.03",
    "wine glass": "wineglass.n.01", "bowl": "bowl.n.03", "banana": "banana.n.02", "hot dog": "frank.n.02",
    "donut": "doughnut.n.02", "cake": "cake.n.03", "couch": "sofa.n.01", "potted plant": "pot.n.04",
    "toilet": "toilet.n.02", "tv": "television_receiver.n.01", "mouse": "mouse.n.04", "remote": "remote_control.n.01",
    "keyboard": "computer_keyboard.n.01", "cell phone": "cellular_telephone.n.01", "microwave": "microwave.n.02",
    "toaster": "toaster.n.02", "refrigerator": "electric_refrigerator.n.01", "teddy bear": "teddy.n.01",
    "hair drier": "hand_blower.n.01",
}  # fmt: skip


def synset(name: str) -> str:
    """WordNet's name of one of COCO's classes."""
    return _SYNSETS.get(name, f"{name.replace(' ', '_')}.n.01")


def with_coco_classes(content: dict[str, Any]) -> dict[str, Any]:
    """LVIS's json with COCO's 80 classes alone, in COCO's order: what a detector of COCO finds, measured by the finer
    masks of LVIS (the AP* of PointRend, arXiv 1912.08193). Detectron2's preparation of `lvis_v0.5_val_cocofied` keeps
    the same objects and the same facts of what is known on which picture.

    Raises:
        ZooError: categories without a synset.
    """
    from zoo import catalog

    names = catalog.data_card("coco").class_names or []
    place = {synset(name): n + 1 for n, name in enumerate(names)}
    if any("synset" not in category for category in content["categories"]):
        raise ZooError("COCO's classes are found by LVIS's synsets, but the annotations' categories have none")
    of_synset = {category["synset"]: category for category in content["categories"]}
    ids = {category["id"]: place[key] for key, category in of_synset.items() if key in place}

    def mapped(given: Iterable[Any]) -> list[int]:
        return [ids[k] for k in given if k in ids]

    listed = ("neg_category_ids", "not_exhaustive_category_ids")
    return {
        **content,
        "categories": [
            {"id": k, "name": name, "frequency": of_synset.get(synset(name), {}).get("frequency", "f")}
            for k, name in enumerate(names, start=1)
        ],
        "images": [i | {name: mapped(i[name]) for name in listed if name in i} for i in content["images"]],
        "annotations": [
            a | {"category_id": ids[a["category_id"]]} for a in content["annotations"] if a["category_id"] in ids
        ],
    }

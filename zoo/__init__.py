"""zoo: the PyTorch Lightning model zoo of Kaiming He's and Haoqi Fan's papers.

Importing it costs milliseconds: torch and lightning are imported by the functions that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zoo.catalog import list_datasets, list_models, list_papers, list_recipes, list_weights
    from zoo.command.recipes import load_recipe
    from zoo.errors import ZooError
    from zoo.weights.pretrained import create_model, create_preprocess

_WHERE = {
    "list_papers": "zoo.catalog",
    "list_models": "zoo.catalog",
    "list_weights": "zoo.catalog",
    "list_recipes": "zoo.catalog",
    "list_datasets": "zoo.catalog",
    "create_model": "zoo.weights.pretrained",
    "create_preprocess": "zoo.weights.pretrained",
    "load_recipe": "zoo.command.recipes",
    "ZooError": "zoo.errors",
}
__all__ = [
    "ZooError",
    "create_model",
    "create_preprocess",
    "list_datasets",
    "list_models",
    "list_papers",
    "list_recipes",
    "list_weights",
    "load_recipe",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        import importlib

        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

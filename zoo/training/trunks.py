"""What a pre-trained ResNet is worth: a linear classifier on its frozen features, or training end to end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models.resnet import ResNet
from torch import Tensor, nn

from zoo.nn.resnet import resnet, torchvision_trunk
from zoo.training.classification import Classification, LinearClassification
from zoo.training.optim import Optim
from zoo.weights.pretrained import fill, read_source


class _FromTrunk(Classification):
    """Starts from the trunk of a pre-training, with a new classifier. A paper's task says how its files are read."""

    @staticmethod
    def convert_trunk(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trunk in the names of torchvision's ResNet, from a state dict of the paper."""
        raise NotImplementedError

    def load_initial(self, source: str) -> None:
        trunk = torchvision_trunk(self.convert_trunk(read_source(source)))
        fill(self.network, trunk, source, lambda key: not key.startswith("fc."))


def _new_classifier(head: nn.Linear) -> nn.Linear:
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


class ResNetLinearProbe(_FromTrunk, LinearClassification):
    """Linear classification of frozen pooled features, the trunk in eval mode; the classifier starts from N(0, 0.01)
    weights and biases of 0 (MoCo, arXiv 1911.05722, section 4.1, and those after it).

    Args:
        num_classes: taken from the data module by a recipe.
        init_from: a checkpoint of the paper's pre-training, a published file, or the name of published weights.
        optim: optimiser and schedule.
        trunk: of :func:`zoo.nn.resnet.resnet`.
    """

    network: ResNet

    def __init__(
        self, num_classes: int = 1000, init_from: str | None = None, optim: Optim | None = None, **trunk: Any
    ) -> None:
        network = resnet(num_classes=0, bn_splits=1, **trunk)  # splits change nothing in eval mode
        head = _new_classifier(nn.Linear(network.num_features, num_classes))
        super().__init__(network, head, "fc", optim or Optim(), num_classes, init_from)
        self.save_hyperparameters()


class ResNetFineTuning(_FromTrunk):
    """End-to-end training of a pre-trained ResNet with a new classifier, as of :class:`ResNetLinearProbe`.

    Args:
        num_classes, init_from, optim, trunk: as of :class:`ResNetLinearProbe`.
        label_smoothing: of the training targets.
    """

    network: ResNet

    def __init__(
        self,
        num_classes: int = 1000,
        init_from: str | None = None,
        optim: Optim | None = None,
        label_smoothing: float = 0.0,
        **trunk: Any,
    ) -> None:
        network = resnet(num_classes=num_classes, **trunk)
        _new_classifier(network.fc)
        super().__init__(network, optim or Optim(), num_classes, 0.0, 0.0, label_smoothing, init_from)
        self.save_hyperparameters()

"""What a pre-trained encoder is worth: a linear classifier on its frozen features, or training end to end.

A paper's task is a subclass, which states its optimiser and where the numbers stand. Where a ResNet comes from a file,
it is taken out by the function `convert_trunk` of the module that the subclass is written in.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from timm.models.resnet import ResNet
from torch import Tensor, nn

from zoo.nn.resnet import resnet, torchvision_trunk
from zoo.training.classification import Classification, LinearClassification
from zoo.training.optim import Optim
from zoo.weights.pretrained import fill, read_source


def new_classifier(head: nn.Linear) -> nn.Linear:
    """A linear layer, started from N(0, 0.01) weights and biases of 0."""
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


class _FromTrunk(Classification):
    """Starts from the ResNet of a pre-training, with a new classifier."""

    published: ClassVar[Optim] = Optim()

    @classmethod
    def convert_trunk(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trunk in the names of torchvision's ResNet, from a state dict of the paper."""
        for kind in cls.__mro__:
            if convert := getattr(sys.modules[kind.__module__], "convert_trunk", None):
                return convert(state_dict)
        return torchvision_trunk(state_dict)

    def load_initial(self, source: str) -> None:
        trunk = torchvision_trunk(self.convert_trunk(read_source(source)))
        fill(self.network, trunk, source, lambda key: not key.startswith("fc."))


class ResNetLinearProbe(_FromTrunk, LinearClassification):
    """Linear classification of frozen pooled features, the trunk in eval mode; the classifier starts from N(0, 0.01)
    weights and biases of 0 (MoCo, arXiv 1911.05722, section 4.1, and those after it).

    Args:
        num_classes: taken from the data module by a recipe.
        init_from: a checkpoint of the paper's pre-training, a published file, or the name of published weights.
        optim: optimiser and schedule; null: the class's `published`.
        trunk: of :func:`zoo.nn.resnet.resnet`.
    """

    network: ResNet

    def __init__(
        self, num_classes: int = 1000, init_from: str | None = None, optim: Optim | None = None, **trunk: Any
    ) -> None:
        network = resnet(num_classes=0, bn_splits=1, **trunk)  # splits change nothing in eval mode
        head = new_classifier(nn.Linear(network.num_features, num_classes))
        super().__init__(network, head, "fc", optim or self.published, num_classes, init_from)
        self.save_hyperparameters()


class ResNetFineTuning(_FromTrunk):
    """End-to-end training of a pre-trained ResNet with a new classifier, as of :class:`ResNetLinearProbe`. Unless a
    paper says otherwise, as MoCo does on iNaturalist 2018 (arXiv 1911.05722, appendix A.6): SGD at 0.025, a tenth of it
    from epochs 70 and 90 of 100.

    Args:
        num_classes, init_from, optim, trunk: as of :class:`ResNetLinearProbe`.
        label_smoothing: of the training targets.
    """

    network: ResNet
    published = Optim(
        name="sgd", lr=0.025, weight_decay=1e-4, no_decay="none", schedule="step", interval="epoch", milestones=(70, 90)
    )

    def __init__(
        self,
        num_classes: int = 1000,
        init_from: str | None = None,
        optim: Optim | None = None,
        label_smoothing: float = 0.0,
        **trunk: Any,
    ) -> None:
        network = resnet(num_classes=num_classes, **trunk)
        new_classifier(network.fc)
        super().__init__(network, optim or self.published, num_classes, 0.0, 0.0, label_smoothing, init_from)
        self.save_hyperparameters()

"""The network of cases in the codes of DiT and SiT."""

from __future__ import annotations

from typing import Any

from zoo.nn.dit import DiT, convert_dit
from zoo.parity import Case, load_filled


def network(case: Case, variance: bool) -> Any:
    """The network of a case; `variance`: the second half of the channels is used."""
    facts = case["config"]["constructor"]
    learned = facts.get("learn_sigma", True)
    network = DiT(
        img_size=facts["input_size"],
        patch_size=facts["patch_size"],
        in_chans=facts["in_channels"],
        out_chans=facts["in_channels"] * (2 if learned else 1),
        embed_dim=facts["hidden_size"],
        depth=facts["depth"],
        num_heads=facts["num_heads"],
        mlp_ratio=facts.get("mlp_ratio", 4.0),
        num_classes=facts["num_classes"],
        null_class=facts.get("class_dropout_prob", 0.1) > 0,
    )
    load_filled(network, case, convert_dit)
    network.eval()
    if variance or not learned:
        return network
    return lambda x, t, labels: network(x, t, labels)[:, : facts["in_channels"]]

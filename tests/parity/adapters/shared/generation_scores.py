"""The scores of samples: cases of torch-fidelity and of its resizing."""

from __future__ import annotations

from torch import Tensor

from zoo.metrics.generation import (
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    tf1_resize,
)
from zoo.parity import Case, filled_inputs


def scores(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    generated, real = inputs["features_gen"], inputs["features_real"]
    logits, splits, seed = (
        inputs["logits_gen"] * config.get("logit_scale", 1.0),
        config["isc_splits"],
        config["rng_seed"],
    )
    score, score_std = inception_score(logits, splits, seed)
    kid, kid_std = kernel_distance(generated, real, config["kid_subsets"], config["kid_subset_size"], seed)
    precision, recall = precision_recall(generated, real, config["prc_neighborhood"])
    return {
        "fid": frechet_distance(Statistics.of(generated), Statistics.of(real)),
        "isc_mean": score,
        "isc_std": score_std,
        "isc_mean_unshuffled": inception_score(logits, splits, None)[0],
        "kid_mean": kid,
        "kid_std": kid_std,
        "precision": precision,
        "recall": recall,
    }


def tf1_bilinear(case: Case) -> dict[str, Tensor]:
    size, corners = case["config"]["size"], case["config"].get("align_corners", False)
    side = (size, size) if isinstance(size, int) else tuple(size)
    return {"resized": tf1_resize(filled_inputs(case)["image"], side, corners)}

"""Runs the kinds of cases that were taken from facebookresearch/flip and open_clip; all else is read from the case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.multimodal.flip import FLIP, convert_official
from zoo.parity import Case, by_entry, filled_inputs, gradients, load_filled, named
from zoo.training import Optim, lr_at

# ------------------------------------------------------------------------------------------------------------ network


def _network(config: dict[str, Any], channels: int) -> FLIP:
    image, text, clr = config["model_img"], config["model_txt"], config["clr"]
    if not (image["use_cls_token"] and image["sincos"]):
        raise ZooError("an image encoder without class token, or with learnt positions, is not built")
    return FLIP(
        img_size=image["image_size"],
        patch_size=image["patch_size"],
        in_chans=channels,
        embed_dim=image["hidden_size"],
        depth=image["num_layers"],
        num_heads=image["num_heads"],
        mlp_ratio=(image["mlp_dim"] + 0.5) / image["hidden_size"],  # the half keeps rounding from losing one
        vocab_size=text["vocab_size"],
        context_length=text["max_len"],
        text_embed_dim=text["hidden_size"],
        text_depth=text["num_layers"],
        text_num_heads=text["num_heads"],
        text_mlp_ratio=(text["mlp_dim"] + 0.5) / text["hidden_size"],
        proj_dim=clr["proj_dim_out"],
        image_pool="avg" if clr["img_avg_token"] else "token",
        text_pool="avg" if clr["txt_avg_token"] else "token",
        proj_bias=clr["proj_out_bias"],
        temperature=None if clr["tau_learnable"] else clr["tau"],
    )


def forward(case: Case) -> dict[str, Tensor]:
    config, inputs = case["config"], filled_inputs(case)
    images, text = inputs["image"].permute(0, 3, 1, 2), inputs["txt"]
    network: Any = load_filled(_network(config, images.shape[1]), case, convert_official)
    loss = network.loss(images, text, config["model_img"]["mask_ratio"], inputs.get("mask_noise"))
    loss.backward()
    with torch.no_grad():
        image, words = network(images, text)
        return {
            "train_loss": loss,
            "tau": 1 / network.scale,
            "eval_loss": network.loss(images, text),
            "eval_z_img": image,
            "eval_z_txt": words,
            "img_pos_embedding": network.visual.pos_embed,
            **named(case, convert_official, grad=gradients(network)),
        }


def lr_schedule(case: Case) -> dict[str, Tensor]:
    config = case["config"]
    per_epoch = config["samples_per_epoch"] // config["batch_size"]
    optim = Optim(
        base_lr=config["learning_rate"],
        warmup_epochs=config["warmup_epochs"],
        warmup_start_lr=config["warmup_abs_lr"],
        min_lr=config["min_abs_lr"],
    )
    # At least one epoch of cosine follows the warm-up.
    epochs = max(config["num_epochs"], config["warmup_epochs"] + 1)
    peak = optim.peak_lr(config["batch_size"])
    rates = [lr_at(optim, step / per_epoch, epochs, peak) for step in config["steps"]]
    return {"lr": torch.tensor(rates, dtype=torch.float64)}


# ------------------------------------------------------------------------------------- the loss, over several processes


def contrast(case: Case) -> dict[str, Tensor]:
    """Every rank in a process of its own (gloo, on the CPU whatever the device)."""
    size = case["config"]["world_size"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "case.json").write_text(json.dumps({**case, "device": "cpu"}))
        program = Path(__file__).parent / "shared" / "contrast_rank.py"
        command = [sys.executable, str(program), str(folder / "case.json")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        ranks = [subprocess.Popen([*command, str(rank), name], env=environment) for rank in range(size)]
        codes = [process.wait(timeout=300) for process in ranks]
        if any(codes):
            raise RuntimeError("a process of the case failed")
        found: dict[str, Tensor] = {}
        for rank in range(size):
            found |= torch.load(folder / f"{rank}.pt", weights_only=True)
        return found


run = by_entry(
    {
        "models_flip.FLIP": forward,
        "t5x.train_state_initializer.create_learning_rate_fn": lr_schedule,
        "open_clip.loss.ClipLoss": contrast,
    }
)

"""Runs the kinds of cases that were taken from facebookresearch/flip and open_clip; all else is read from the case.

As a program (`python flip.py CASE RANK FOLDER`) it is one process of a case of several.
"""

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
from torch.func import functional_call
from torch.nn.functional import normalize

from zoo.multimodal.flip import FLIP, convert_official
from zoo.ops.contrastive import clip_loss
from zoo.parity import Case, dtype_of, filled_inputs, filled_state
from zoo.training import Optim, lr_at


def run(case: Case) -> dict[str, Tensor]:
    return KINDS[case["official"]["entry"]](case)


# ------------------------------------------------------------------------------------------------------------ network


def _network(config: dict[str, Any]) -> FLIP:
    image, text, clr = config["model_img"], config["model_txt"], config["clr"]
    return FLIP(
        img_size=image["image_size"],
        patch_size=image["patch_size"],
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
    inputs = filled_inputs(case)
    network = _network(case["config"]).to(case.get("device", "cpu"), dtype_of(case))
    # Gradients are asked for by the official names and layouts: they flow back through the conversion.
    official = {key: value.requires_grad_() for key, value in filled_state(case).items()}
    state = convert_official(official)
    kept = set(convert_official({k: torch.empty(v["shape"]) for k, v in case["state"].items() if v["rule"] == "keep"}))
    own = network.state_dict()
    assert state.keys() | kept == own.keys(), state.keys() ^ own.keys()
    assert all(state[key].shape == own[key].shape for key in state)
    images, text = inputs["image"].permute(0, 3, 1, 2), inputs["txt"]
    network.requires_grad_(False)

    def call(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        image, words = functional_call(network, state, (images, text, *arguments))
        scale = functional_call(_Scale(network), {f"network.{key}": value for key, value in state.items()}, ())
        return clip_loss(image, words, scale), image, words

    train_loss, _, _ = call(case["config"]["model_img"]["mask_ratio"], inputs.get("mask_noise"))
    train_loss.backward()
    with torch.no_grad():
        eval_loss, image, words = call()
        scale = functional_call(_Scale(network), {f"network.{key}": value for key, value in state.items()}, ())
    return {
        "train_loss": train_loss,
        "tau": 1 / scale,
        "eval_loss": eval_loss,
        "eval_z_img": image,
        "eval_z_txt": words,
        "img_pos_embedding": network.visual.pos_embed,
        **{f"grad.{key}": value.grad for key, value in official.items() if value.grad is not None},
    }


class _Scale(torch.nn.Module):
    def __init__(self, network: FLIP) -> None:
        super().__init__()
        self.network = network

    def forward(self) -> Tensor:
        return self.network.scale


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
        command = [sys.executable, __file__, str(folder / "case.json")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        ranks = [subprocess.Popen([*command, str(rank), name], env=environment) for rank in range(size)]
        codes = [process.wait(timeout=300) for process in ranks]
        if any(codes):
            raise RuntimeError("a process of the case failed")
        found: dict[str, Tensor] = {}
        for rank in range(size):
            found |= torch.load(folder / f"{rank}.pt", weights_only=True)
        return found


def _rank(case: Case, rank: int, folder: Path) -> None:
    import torch.distributed as dist

    config, inputs = case["config"], filled_inputs(case)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=config["world_size"])
    found: dict[str, Tensor] = {}
    for name, mode in config["modes"].items():
        image, text = (
            normalize(inputs[f"{kind}_features_rank{rank}"], dim=-1).requires_grad_() for kind in ("image", "text")
        )
        scale = torch.tensor(config["logit_scale"], dtype=dtype_of(case), requires_grad=True)
        loss = clip_loss(image, text, scale, mode["local_loss"], mode["gather_with_grad"])
        loss.backward()
        outputs = {"loss": loss.detach(), "grad_image": image.grad, "grad_text": text.grad, "grad_scale": scale.grad}
        found |= {f"{name}.rank{rank}.{key}": value for key, value in outputs.items() if value is not None}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


KINDS = {
    "models_flip.FLIP": forward,
    "t5x.train_state_initializer.create_learning_rate_fn": lr_schedule,
    "open_clip.loss.ClipLoss": contrast,
}

if __name__ == "__main__":
    _rank(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), Path(sys.argv[3]))

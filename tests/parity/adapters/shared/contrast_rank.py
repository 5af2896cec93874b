"""One process of a case of the contrastive loss over several: python contrast_rank.py CASE RANK FOLDER"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from zoo.ops.contrastive import clip_loss
from zoo.parity import Case, dtype_of, filled_inputs


def run(case: Case, rank: int, folder: Path) -> None:
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


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), Path(sys.argv[3]))

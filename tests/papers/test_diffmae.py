"""DiffMAE: what tests/test_contract.py, which holds for every paper, does not test of this one."""

from __future__ import annotations

import json
import math
from collections import deque
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.nn.perceptual import FrozenNetwork
from zoo.ops.diffusion import Diffusion
from zoo.ops.masking import random_masking, take_tokens
from zoo.ops.patches import patchify_video, unpatchify_video
from zoo.selfsup import diffmae, mae
from zoo.training import Optim

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
DECODER = {"decoder_embed_dim": 8, "decoder_depth": 2, "decoder_num_heads": 2}
CLIPS = {**SIZES, "num_frames": 4, "tubelet_size": 2}
TOWER = "vit_base_patch16_clip_224.openai"


def _network(**options) -> diffmae.DiffusionMaskedAutoencoder:
    torch.manual_seed(0)
    return diffmae.DiffusionMaskedAutoencoder(**{**SIZES, **DECODER, **options})


def _task(**options) -> diffmae.DiffMAEPretraining:
    torch.manual_seed(0)
    return diffmae.DiffMAEPretraining(**{**SIZES, **DECODER, "steps": 3, "optim": Optim(lr=0.1), **options}).eval()


def _draws(net: diffmae.DiffusionMaskedAutoencoder, count: int = 3, seed: int = 1) -> tuple[Tensor, ...]:
    """Inputs, noise of masks, times, noise."""
    draw, frames = torch.Generator().manual_seed(seed), [net.num_frames] if net.num_frames else []
    images = torch.randn(count, 3, *frames, 16, 16, generator=draw)
    uniform = torch.rand(count, net.num_patches, generator=draw)
    t = torch.randint(1, net.timesteps + 1, (count,), generator=draw)
    return images, uniform, t, torch.randn(count, net.num_patches, net.patch_values, generator=draw)


def test_a_smaller_rho_is_more_noise() -> None:
    levels = [Diffusion(diffmae.noise_schedule(rho=rho)).abar for rho in (1.0, 0.8, 0.6)]
    assert all(level.dtype == torch.float64 for level in levels)
    assert all(bool((more < less).all()) for less, more in pairwise(levels))
    assert levels[0][-1].item() == pytest.approx(4e-5, rel=0.02)
    for wrong in ({"rho": 0.0}, {"beta_end": 1.0}):
        with pytest.raises(ZooError, match="noise schedule"):
            diffmae.noise_schedule(**wrong)


def test_visible_patches_stay_clean_and_the_last_step_is_the_estimate() -> None:
    process = Diffusion(diffmae.noise_schedule(), prediction="data", variance="fixed_small")
    x, noise, mask = torch.randn(3, 8, 5), torch.randn(3, 8, 5), (torch.arange(8) % 2).float().expand(3, 8)
    noisy = diffmae.diffuse(x, mask, torch.tensor([1, 500, 1000]), noise, process)
    assert torch.equal(noisy[:, ::2], x[:, ::2])
    torch.testing.assert_close(noisy[2, 1::2], noise[2, 1::2], rtol=1e-3, atol=1e-4)  # abar_T is about 0
    drawn = diffmae.posterior_step(noisy, x, torch.tensor([1, 500, 1000]), noise, process)
    torch.testing.assert_close(drawn[0], x[0])
    assert (drawn[1:] - x[1:]).abs().max() > 0.1


@pytest.mark.parametrize(("depth", "decoder", "links"), [(8, 8, [8, 7, 6, 5, 4, 3, 2, 1]), (24, 4, [24, 18, 12, 6])])
def test_decoder_blocks_read_the_encoder_top_down(depth: int, decoder: int, links: list[int]) -> None:
    assert diffmae.encoder_links(depth, decoder) == links


def test_space_time_patches_and_their_embedding() -> None:
    net = _network(**CLIPS)
    clips = _draws(net)[0]
    patches = patchify_video(clips, 4, 2)
    assert torch.equal(patches[:, 17, :3], clips[:, :, 2, 0, 4])  # the second moment, the second column; channels last
    assert torch.equal(unpatchify_video(patches, 4, 2, (2, 4, 4)), clips)
    torch.testing.assert_close(net.patch_embed.embed_patches(patches), net.patch_embed(clips))
    table = net.positions()
    torch.testing.assert_close(table[0, 1 + 16 + 5], net.pos_embed_temporal[0, 1] + net.pos_embed_spatial[0, 5])
    with pytest.raises(ZooError, match="cannot be cut"):
        patchify_video(clips[:, :, :3], 4, 2)
    with pytest.raises(ZooError, match="do not fill"):
        unpatchify_video(patches, 4, 2, (1, 4, 4))
    with pytest.raises(ZooError, match="clips of shape"):
        net(clips[:, :, :2])


@pytest.mark.parametrize("options", [{"decoder": d} for d in ("joint", "cross", "cross-self")] + [CLIPS])
def test_hidden_pixels_reach_the_decoder_only_as_noise(options: dict) -> None:
    net = _network(**options)
    images, uniform, t, noise = _draws(net)
    masking = random_masking(uniform, 0.75)
    patches = net.to_patches(images)
    memory = net.encode(patches, masking)
    other = net.encode(patches + 5 * masking.mask[..., None], masking)
    assert all(torch.equal(a, b) for a, b in zip(memory, other, strict=True))
    noisy = take_tokens(noise, masking.ids_masked)
    pred = net.decode(memory, masking, noisy, t)
    moved = noisy.clone()
    moved[:, 0] += 1
    far = (net.decode(memory, masking, moved, t) - pred)[:, 1:].abs().max()
    assert (far == 0) == (net.decoder == "cross")  # in that decoder alone noised tokens never see each other
    assert (net.decode(memory, masking, noisy, 1001 - t) - pred).abs().max() > 1e-4


def test_the_encoder_is_maes_and_sees_visible_tokens_only() -> None:
    net, twin = _network(), mae.MaskedAutoencoder(**SIZES, **DECODER)
    own = {key: value for key, value in net.state_dict().items() if key in twin.state_dict() and "decoder" not in key}
    twin.load_state_dict(own, strict=False)
    assert {key for key in twin.state_dict() if "decoder" not in key} - own.keys() == {"mask_token"}
    images, *rest = _draws(net)
    torch.testing.assert_close(net(images), twin.forward_features(images))
    seen: list[int] = []
    for block in (*net.blocks, *net.decoder_blocks):
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    net.loss(images, *rest)
    assert seen == [5, 5, 5, 12, 12]


@pytest.mark.parametrize(
    ("options", "floor"), [({}, "pixels"), ({"prediction": "eps"}, "noise"), ({"norm_pix_loss": True}, "standard")]
)
def test_the_loss_is_of_hidden_patches_alone_and_starts_at_the_targets_power(options: dict, floor: str) -> None:
    net = _network(**options)
    with torch.no_grad():
        net.decoder_pred.weight.zero_()
    images, uniform, t, noise = _draws(net)
    hidden = random_masking(uniform, 0.75).ids_masked
    clean = take_tokens(net.to_patches(images), hidden)
    target = {"pixels": clean, "noise": take_tokens(noise, hidden), "standard": mae.normalize_patches(clean)}[floor]
    torch.testing.assert_close(net.loss(images, uniform, t, noise), target.square().mean())
    images = net.from_patches(net.to_patches(images) + 3 * (1 - random_masking(uniform, 0.75).mask[..., None]))
    torch.testing.assert_close(net.loss(images, uniform, t, noise), target.square().mean())


def test_checkpointing_and_compiling_change_no_number() -> None:
    net = _network().double()
    images, uniform, t, noise = (x.double() if x.is_floating_point() else x for x in _draws(net))
    weight = net.decoder_patch_embed.weight
    plain = torch.autograd.grad(net.loss(images, uniform, t, noise), weight)[0]
    net.set_grad_checkpointing()
    torch.testing.assert_close(torch.autograd.grad(net.loss(images, uniform, t, noise), weight)[0], plain)
    net.set_grad_checkpointing(False)
    graph = torch.compile(net.loss, backend="aot_eager", fullgraph=True)  # no graph breaks
    torch.testing.assert_close(graph(images, uniform, t, noise), net.loss(images, uniform, t, noise))


@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_the_sampler_encodes_once_and_keeps_what_is_visible(prediction: str) -> None:
    net = _network(prediction=prediction)
    images, uniform, _, noise = _draws(net)
    masking, calls = random_masking(uniform, 0.75), []
    net.norm.register_forward_hook(lambda *_: calls.append(1))
    states = list(net.inpaint(images, masking, noise, steps=5))
    assert len(states) == 5
    assert len(calls) == 1
    pasted = net.paste(images, masking, states[-1])
    visible = net.from_patches(masking.mask[..., None].expand(-1, -1, net.patch_values)) == 0
    assert torch.equal(pasted[visible], images[visible])
    assert (pasted != images)[~visible].all()
    alone = random_masking(uniform[1:2], 0.75)
    one = deque(net.inpaint(images[1:2], alone, noise[1:2], steps=5), maxlen=1).pop()
    torch.testing.assert_close(one, states[-1][1:2], rtol=1e-4, atol=1e-5)  # whatever else is in the batch
    assert len(list(_network(timesteps=7).inpaint(images, masking, noise))) == 7


@pytest.mark.parametrize("rho", [0.3, 0.01])
def test_a_schedule_that_leaves_nothing_is_sampled_from_predicted_data_only(rho: float) -> None:
    net = _network(rho=rho)
    images, uniform, _, noise = _draws(net)
    masking = random_masking(uniform, 0.75)
    for steps in (None, 5):
        *_, last = net.inpaint(images, masking, noise, steps)
        assert last.isfinite().all()
    with pytest.raises(ZooError, match="larger rho"):
        list(_network(rho=rho, prediction="eps").inpaint(images, masking, noise))


def test_a_decoder_much_deeper_than_the_encoder_reads_its_embedding() -> None:
    net = _network(depth=1, decoder_depth=4)
    assert net.links == [1, 1, 0, 0]
    assert net.loss(*_draws(net)).isfinite()


def test_the_sampler_draws_from_the_posterior_of_a_perfect_decoder() -> None:
    """One that knows the mean of hidden pixels, which have no spread, ends there, whatever the noise."""
    net = _network()
    with torch.no_grad():
        net.decoder_pred.weight.zero_()
        net.decoder_pred.bias.fill_(0.7)
    images, uniform, _, noise = _draws(net)
    *_, before, last = net.inpaint(images, random_masking(uniform, 0.75), noise, steps=20)
    torch.testing.assert_close(last, torch.full_like(last, 0.7))
    assert 0 < (before - 0.7).std() < 0.4


@pytest.mark.parametrize(("options", "what"), [({"norm_pix_loss": True}, "standardised"), ({"feature_dim": 4}, "feat")])
def test_targets_that_are_not_pixels_are_not_sampled(options: dict, what: str) -> None:
    net = _network(**options)
    images, uniform, _, noise = _draws(net)
    with pytest.raises(ZooError, match=what):
        list(net.inpaint(images, random_masking(uniform, 0.75), noise))


@pytest.mark.parametrize("options", [{}, CLIPS])
def test_pictures_and_predictions(options: dict) -> None:
    task = _task(**options)
    batch = {task.key: _draws(task.network)[0], "index": torch.arange(3)}
    found = task.predict_step(batch, 0)
    hidden = (found["masked"] != batch[task.key]).any(1)
    assert hidden.float().mean() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(found["reconstruction"].movedim(1, -1)[~hidden], batch[task.key].movedim(1, -1)[~hidden])
    assert torch.equal(task.predict_step(batch, 0)["reconstruction"], found["reconstruction"])
    sheet = task.picture(batch)
    assert sheet.dtype == torch.uint8
    assert sheet.shape[2] == 5 * 128 + 4 * 4  # masked, two states (of three steps), sample, original
    assert task.features(batch[task.key]).shape == (3, 16)


class StandIn(nn.Module):
    """Colours of the corners of the patches, in the place of a CLIP."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, ::4, ::4].flatten(2).transpose(1, 2).repeat(1, 1, 256)


@pytest.mark.parametrize("options", [{}, CLIPS])
def test_a_teacher_gives_the_target(options: dict) -> None:
    task = _task(teacher=TOWER, teacher_file="nowhere.safetensors", **options)
    assert task.network.decoder_pred.out_features == 768
    with pytest.raises(ZooError, match=r"nowhere\.safetensors"):
        task.setup("fit")
    task.teacher = FrozenNetwork(StandIn)
    task.setup("fit")
    inputs = _draws(task.network)[0]
    target = task.targets(inputs)
    assert target.shape == (3, task.network.num_patches, 768)
    torch.testing.assert_close(target.mean(-1), torch.zeros(target.shape[:2]), atol=1e-5, rtol=0)
    assert task.loss({task.key: inputs}).isfinite()
    assert not any("teacher" in key for key in task.state_dict())


def test_maes_weights_start_it_and_its_own_start_fine_tuning_and_probe(tmp_path: Path) -> None:
    encoder = mae.MaskedAutoencoder(**SIZES, **DECODER)
    torch.save({"model": encoder.state_dict()}, tmp_path / "mae.pth")
    task = _task(init_from=str(tmp_path / "mae.pth"))
    task.setup("fit")
    torch.testing.assert_close(task.network.blocks[2].mlp.fc1.weight, encoder.blocks[2].mlp.fc1.weight)
    torch.save({"model": task.network.state_dict()}, tmp_path / "own.pth")
    for kind in (diffmae.DiffMAEFineTuning, diffmae.DiffMAELinearProbe):
        tuned = kind(**SIZES, num_classes=3, init_from=str(tmp_path / "own.pth"))
        tuned.setup("fit")
        assert torch.equal(tuned.network.blocks[0].attn.qkv.weight, task.network.blocks[0].attn.qkv.weight)


def test_conversion_is_strict() -> None:
    for options in ({}, {"decoder": "joint"}, {"decoder": "cross"}, CLIPS):
        state = _network(**options).state_dict()
        assert diffmae.convert_official(state).keys() == state.keys()
        with pytest.raises(ZooError, match="mask_token"):
            diffmae.convert_official({**state, "mask_token": torch.zeros(1)})
    with pytest.raises(ZooError, match="not an MAE"):
        diffmae.convert_official({"fc.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"decoder": "cros"}, "decoder"),
        ({"prediction": "noise"}, "prediction"),
        ({"prediction": "eps", "norm_pix_loss": True}, "choose one"),
        ({"mask_ratio": 0.97}, "mask_ratio"),
        ({"inpaint": "center"}, "inpaint"),
        ({"steps": 0}, "1 to 1000 steps"),
        ({"steps": 1001}, "1 to 1000 steps"),
        ({"feature_dim": 4}, "teacher"),
        ({"teacher": "clip_b"}, "CLIP tower"),
        ({"decoder_num_heads": 3}, "divisible"),
        ({**CLIPS, "num_frames": 3}, "num_frames"),
    ],
)
def test_wrong_options_are_named(options: dict, what: str) -> None:
    with pytest.raises(ZooError, match=what):
        _task(**options)


def test_published_sizes_have_their_parameters(shared: Path) -> None:
    """The encoder of ViT-B is that of MAE's published file."""
    layout = json.loads((shared / "statedicts" / "mae" / "mae_pretrain_vit_base.json").read_text())["keys"]
    with torch.device("meta"):
        state = diffmae.diffmae_vit_base_patch16().state_dict()
    own = {key: list(value.shape) for key, value in state.items() if diffmae._ENCODER.fullmatch(key)}
    assert own == {key: list(shape) for key, shape in layout.items()}
    assert sum(math.prod(shape) for shape in own.values()) == 85_798_656

"""SlowFast's claim and the timing of its data run; at Slow's frames the claim's patterns cannot be told apart."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.claims import common
from benchmarks.claims import slowfast as claim
from benchmarks.speed import slowfast as speed
from benchmarks.speed.harness import Setting
from zoo.video.slowfast import slow_indices


def test_claim_quick_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.json"
    arguments = ["--quick", "--data", "shapes", "--seeds", "2", "--work", str(tmp_path), "--out", str(out)]
    assert claim.main(arguments) == 0
    record = json.loads(out.read_text())
    assert set(record["arms"]) == set(claim.ARMS)
    assert [c["name"] for c in record["claims"]] == [
        "slow_is_blind_to_motion", "fast_is_thin", "better_than_slow", "better_than_fast", "laterals_help"
    ]  # fmt: skip
    for arm in record["arms"].values():
        for score in ("joint", "picture", "pattern"):
            assert all(0 <= value <= 1 for value in arm[score])
        assert all(joint <= min(a, b) for joint, a, b in zip(arm["joint"], arm["picture"], arm["pattern"], strict=True))

    def never(*arguments: object) -> None:
        raise AssertionError("a finished part is not computed again")

    monkeypatch.setattr(claim, "run_arm", never)
    assert claim.main(arguments) == 0
    assert json.loads(out.read_text())["arms"] == record["arms"]


def _turns(pattern: int, count: int) -> torch.Tensor:
    """(count, T) where on its circle a picture is, in turns, read off the clips of a picture with one bright pixel."""
    settings = claim.Settings()
    picture = torch.zeros(count, 1, 32, 32)
    picture[:, :, 16, 16] = 1
    video = claim.shaken(picture, torch.full((count,), pattern), settings, torch.Generator().manual_seed(pattern))
    at = video[:, 0].flatten(2).argmax(2)
    x, y = at % 32 - 16, at // 32 - 16
    assert bool((x.abs() <= 3).all() and (y.abs() <= 3).all())
    return torch.atan2(y.float(), x.float()) / (2 * torch.pi) % 1


def test_slow_frames_say_nothing_of_the_pattern() -> None:
    settings = claim.Settings()
    slow = slow_indices(settings.frames, settings.alpha)
    assert slow.diff().unique().tolist() == [9]
    clips = [_turns(pattern, 1500) for pattern in range(4)]
    steps = [torch.stack([(c[:, slow[k + 1]] - c[:, slow[k]]) % 1 for k in range(3)], 1) for c in clips]
    for other in steps[1:]:
        for bins in (steps[0][:, 0], steps[0][:, 2]):
            expected = torch.histc(bins, 8, 0, 1) / len(bins)
            torch.testing.assert_close(torch.histc(other[:, 0], 8, 0, 1) / len(other), expected, atol=0.05, rtol=0)
    # From frame to frame they are told apart with ease, by the size of the step.
    step = [((c.diff(dim=1) + 0.5) % 1 - 0.5).abs().mean(1) for c in clips]
    for slower, faster in pairwise(step):
        assert slower.max() < faster.min() + 0.02
        assert (slower.mean() - faster.mean()).abs() > 0.08


def test_all_arms_see_the_same_clips() -> None:
    world = common.open_world("shapes", None, 32, 40, 8)
    claim.Clips.settings = claim.Settings()
    first, again, other = (claim.Clips(*world.train, world, 9, 8, seed=seed) for seed in (1, 1, 2))
    assert first[3]["video"].shape == (8, 3, 28, 32, 32)
    assert torch.equal(first[3]["video"], again[3]["video"])
    assert torch.equal(first[3]["label"], again[3]["label"])
    assert not torch.equal(first[3]["video"], other[3]["video"])
    assert int(first[3]["label"].max()) < 4 * world.classes


def test_clips_are_loaded(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from tests.data.test_video_data import grey, write_video

    for k in range(5):
        write_video(tmp_path / f"{k}.mp4", grey(70))
    with speed.loaders(Setting(model="tiny", data=tmp_path)) as (found, work):
        assert found[0].name == "zoo"
        assert work.detail["from"] == "mp4"
        for loader in found:
            assert next(loader.batches).shape == (speed.CLIP_BATCH, 3, speed.CLIP_FRAMES, 32, 32)

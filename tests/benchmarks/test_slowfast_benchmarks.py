"""The timing of SlowFast's data runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.speed import slowfast as speed
from benchmarks.speed.harness import Setting
from benchmarks.speed.shared import video


def test_clips_are_loaded(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from tests.data.test_video_data import grey, write_video

    for k in range(5):
        write_video(tmp_path / f"{k}.mp4", grey(70))
    with speed.loaders(Setting(model="tiny", data=tmp_path)) as (found, work):
        assert found[0].name == "zoo"
        assert work.detail["from"] == "mp4"
        for loader in found:
            assert next(loader.batches).shape == (video.BATCH, 3, video.FRAMES, 32, 32)

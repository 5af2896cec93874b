"""Pictures with captions in shards, and the pipeline from them that open_clip's training script has."""

from __future__ import annotations

import contextlib
import io
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.environment import package_version
from benchmarks.speed import harness
from benchmarks.speed.harness import Loader, Setting
from zoo.data.text import write_vocabulary


@contextlib.contextmanager
def shards(setting: Setting, count: int) -> Iterator[tuple[Path, Path, str]]:
    """A folder of two webdataset shards with `count` photos and a caption each (its class's folder), a vocabulary for
    these, and what they are."""
    with harness.photos(setting, count) as (photographs, name), tempfile.TemporaryDirectory() as place:
        out, words = Path(place) / "shards", Path(place) / "words.txt"
        out.mkdir()
        write_vocabulary(["a photo of"], words)
        files = sorted(path for path in photographs.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:count]
        for shard in range(2):
            with tarfile.open(out / f"{shard:05d}.tar", "w") as tar:
                for number, path in enumerate(files[shard::2]):
                    caption = f"a photo of {path.parent.name.replace('_', ' ')}".encode()
                    for kind, content in (("jpg", path.read_bytes()), ("txt", caption)):
                        member = tarfile.TarInfo(f"{shard:05d}{number:04d}.{kind}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        yield out, words, f"{name} in shards"


def webdataset_loader(shards: Path, side: int, batch: int) -> Loader:
    """webdataset in the stages of open_clip's training script, with FLIP's crop."""
    import webdataset as wds
    from open_clip import get_tokenizer

    tokenize = get_tokenizer("ViT-B-32", context_length=32)
    stages = [
        wds.SimpleShardList([str(path) for path in sorted(shards.glob("*.tar"))[:1]]),
        wds.tarfile_to_samples(),
        wds.shuffle(5000, initial=1000),
        wds.decode("pilrgb"),
        wds.rename(image="jpg", text="txt"),
        wds.map_dict(image=harness.pil_crop(side, scale=(0.5, 1.0)), text=lambda text: tokenize(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(batch, partial=False),
    ]
    about = f"webdataset {package_version('webdataset')} in the stages of its script, PIL transforms, its BPE tokenizer"
    return harness.peer_loader("open_clip", "open_clip_torch", wds.DataPipeline(*stages), None, about)

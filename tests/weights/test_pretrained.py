"""Published weights, from a loopback server to a loaded model: what goes right, and everything that may go wrong."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from zoo import catalog
from zoo.errors import ZooError
from zoo.paths import cache_dir
from zoo.weights import download, pretrained
from zoo.weights.pretrained import create_model, create_preprocess

CODE = '''
from __future__ import annotations
import torch
from torch import Tensor, nn


class Patches(nn.Module):
    def __init__(self, img_size, in_chans, dim):
        super().__init__()
        self.grid = (img_size // 4, img_size // 4)
        self.proj = nn.Conv2d(in_chans, dim, 4, 4)


class TinyEncoder(nn.Module):
    """Pools with `norm` (token) or `fc_norm` (avg)."""

    def __init__(self, img_size: int = 16, in_chans: int = 3, num_classes: int = 10, dim: int = 8, pool: str = "avg"):
        super().__init__()
        self.patch_embed = Patches(img_size, in_chans, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (img_size // 4) ** 2, dim))
        self.add_module("norm" if pool == "token" else "fc_norm", nn.LayerNorm(dim))
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()


class TinyAutoencoder(nn.Module):
    def __init__(self, dim: int = 8):
        super().__init__()
        self.patch_embed = Patches(16, 3, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, 17, dim))
        self.norm = nn.LayerNorm(dim)
        self.decoder = nn.Linear(dim, 48)


def tiny_vit(**overrides) -> TinyEncoder:
    return TinyEncoder(**overrides)


def tiny_mae(**overrides) -> TinyAutoencoder:
    return TinyAutoencoder(**overrides)


def convert_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("stem.", "patch_embed.proj."): value for key, value in state.items()}
'''


@dataclass
class Server:
    """Serves `files` with Range and (`marks`) ETag; cuts short its first `cuts` answers, or with `stall` hangs in their
    midst; the first `broken` are 503, with the header Retry-After if `retry_after` says so."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: int = 0
    broken: int = 0
    stall: bool = False
    marks: bool = True
    retry_after: str = ""
    log: list[tuple[str, str | None, int]] = field(default_factory=list)
    stop: Any = None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            name, wanted = self.path.lstrip("/"), self.headers.get("Range")
            body = state.files.get(name)
            if body is None or state.broken:
                state.broken -= 1 if body is not None else 0
                headers = {"Retry-After": state.retry_after} if state.retry_after else {}
                self._answer(404 if body is None else 503, headers, b"", wanted)
                return
            tag = f'"{hashlib.sha256(body).hexdigest()}"'
            start = 0
            if wanted and self.headers.get("If-Range", tag) == tag:
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
                if start >= len(body):
                    self._answer(416, {"Content-Range": f"bytes */{len(body)}"}, b"", wanted)
                    return
            headers = {"ETag": tag, "X-Repo-Commit": "1" * 40} if state.marks else {}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self._answer(206 if start else 200, headers, body[start:], wanted)

        def _answer(self, status: int, headers: dict[str, str], body: bytes, wanted: str | None) -> None:
            state.log.append((self.path.lstrip("/"), wanted, status))
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if state.cuts and body:
                state.cuts -= 1
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                if state.stall:
                    released.wait(20)
                self.close_connection = True
            else:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{running.server_address[1]}"

    def stop() -> None:
        released.set()
        if thread.is_alive():
            running.shutdown()
            running.server_close()
            thread.join()

    state.stop = stop
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    monkeypatch.setattr(download, "ATTEMPTS", 3)
    yield state
    stop()


Card = Any


@pytest.fixture
def papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> Card:
    """Writes the card of a tiny paper whose weights lie on the loopback server; called with facts to change in it."""
    folder = tmp_path / "papers"
    folder.mkdir()
    (folder / "tiny.py").write_text(CODE)
    monkeypatch.setenv("ZOO_PAPERS", str(folder))
    preprocess = {"size": 16, "crop_pct": 0.8, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.25] * 3}
    common = {"licence": "CC-BY-NC-4.0", "preprocess": preprocess}

    def write(**changes: Any) -> None:
        encoder = {
            "name": "tiny_vit.encoder",
            "urls": [f"{server.url}/encoder.pth"],
            "kind": "encoder",
            "overrides": {"num_classes": 0, "pool": "token"},
            "fresh": ["fc_norm.*", "head.*"],
            "spare": ["norm.*"],
            **common,
        }
        weights = [
            {"name": "tiny_vit.ft", "urls": [f"{server.url}/ft.pth"], "kind": "classifier", **common, **changes},
            encoder,
            {"name": "tiny_mae.full", "urls": [f"{server.url}/full.pth"], "kind": "full", **common},
        ]
        models = [{"name": "tiny_vit", "params": 618}, {"name": "tiny_mae", "params": 976}]
        facts = {"slug": "tiny", "field": "selfsup", "title": "Tiny", "authors": ["A. Uthor"], "year": 2026}
        card = {**facts, "summary": "A test's paper.", "models": models, "weights": weights}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(card))

    write()
    return write


def checkpoint(name: str, seed: int = 0, **overrides: Any) -> tuple[bytes, dict[str, Tensor]]:
    """The bytes of an official file ({'model': ..., 'args': Namespace}) of a tiny model, and the state it holds."""
    torch.manual_seed(seed)
    state = create_model(name, **overrides).state_dict()
    official = {key.replace("patch_embed.proj.", "stem."): value for key, value in state.items()}
    return pack({"model": official, "args": argparse.Namespace(lr=1e-3), "epoch": 3}), state


def pack(content: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def assert_holds(net: torch.nn.Module, state: dict[str, Tensor]) -> None:
    own = net.state_dict()
    assert own.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(own[key], value), key


def leftovers() -> list[str]:
    return sorted(path.name for path in cache_dir().rglob("*") if ".part" in path.name or ".tmp" in path.name)


# ---- the happy path -------------------------------------------------------------------------------------------------


def test_weights_are_fetched_checked_converted_and_kept(papers: Card, server: Server, capfd: Any) -> None:
    server.files["ft.pth"], state = checkpoint("tiny_vit")
    papers(sha256=digest(server.files["ft.pth"]), size=len(server.files["ft.pth"]))
    pretrained._tell_licence.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_holds(create_model("tiny_vit.ft", pretrained=True), state)
    assert capfd.readouterr().err.count("licence CC-BY-NC-4.0") == 1
    folder = cache_dir() / "weights/tiny/tiny_vit.ft"
    assert {"ft.pth", "ft.pth.json", "converted.safetensors", "converted.json"} <= {p.name for p in folder.iterdir()}
    assert leftovers() == []
    assert "match tiny_vit key for key" in pretrained.verify_weights("tiny_vit.ft")

    server.stop()  # from here on there is no network
    assert_holds(create_model("tiny_vit.ft", pretrained=True), state)
    assert_holds(create_model("tiny_vit", weights="tiny_vit.ft"), state)
    assert len(server.log) == 1
    assert "licence" not in capfd.readouterr().err


def test_the_tag_without_pretrained_is_the_architecture_alone(papers: Card, server: Server) -> None:
    net = create_model("tiny_vit.encoder")
    assert {"norm.weight", "norm.bias"} <= net.state_dict().keys()
    assert "head.weight" not in net.state_dict()
    assert server.log == []


def test_encoder_weights_match_their_own_architecture_exactly(papers: Card, server: Server) -> None:
    server.files["encoder.pth"], state = checkpoint("tiny_vit.encoder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_holds(create_model("tiny_vit.encoder", pretrained=True), state)


def test_convert_writes_a_file_that_loads(papers: Card, server: Server, tmp_path: Path) -> None:
    server.files["ft.pth"], state = checkpoint("tiny_vit")
    out = pretrained.convert_weights("tiny_vit.ft", tmp_path / "new" / "ft.safetensors")
    assert_holds(create_model("tiny_vit", weights=out), state)
    with pytest.raises(ZooError, match="safetensors"):
        pretrained.convert_weights("tiny_vit.ft", tmp_path / "ft.pth")


def test_a_path_in_the_card_is_used_where_it_lies(papers: Card, tmp_path: Path) -> None:
    content, state = checkpoint("tiny_vit")
    (tmp_path / "mine.pth").write_bytes(content)
    papers(urls=[str(tmp_path / "mine.pth")])
    assert_holds(create_model("tiny_vit.ft", pretrained=True), state)
    papers(urls=[(tmp_path / "mine.pth").as_uri()], sha256="0" * 64)
    with pytest.raises(ZooError, match="sha256"):
        create_model("tiny_vit.ft", pretrained=True)


def test_an_address_may_be_given_directly(papers: Card, server: Server) -> None:
    server.files["some.pth"], state = checkpoint("tiny_vit", seed=3)
    assert_holds(create_model("tiny_vit", weights=f"{server.url}/some.pth"), state)
    assert_holds(create_model("tiny_vit", weights=f"{server.url}/some.pth"), state)
    assert len(server.log) == 1


def test_a_lightning_checkpoint_loses_its_prefix(papers: Card, tmp_path: Path) -> None:
    _, state = checkpoint("tiny_vit")
    for prefix, beside in (("model.", {}), ("network.", {"top1.total": torch.ones(())})):
        whole = {**{f"{prefix}{key}": value for key, value in state.items()}, **beside}
        torch.save({"state_dict": whole, "epoch": 1, "pytorch-lightning_version": "2.6"}, tmp_path / "last.ckpt")
        assert_holds(create_model("tiny_vit", weights=tmp_path / "last.ckpt"), state)


# ---- overrides ------------------------------------------------------------------------------------------------------


def test_num_classes_and_in_chans_start_anew_just_what_they_change(papers: Card, server: Server) -> None:
    server.files["ft.pth"], state = checkpoint("tiny_vit")
    with pytest.warns(UserWarning, match=r"start anew: head.weight \(4, 8\), head.bias \(4,\)$"):
        net = create_model("tiny_vit.ft", pretrained=True, num_classes=4)
    assert_holds(net, {**state, **{k: v for k, v in net.state_dict().items() if k.startswith("head.")}})
    with pytest.warns(UserWarning, match=r"start anew: patch_embed.proj.weight \(8, 1, 4, 4\)$"):
        net = create_model("tiny_vit.ft", pretrained=True, in_chans=1)
    assert_holds(net, {**state, "patch_embed.proj.weight": net.state_dict()["patch_embed.proj.weight"]})
    with pytest.warns(UserWarning, match=r"not used: head.bias, head.weight$"):
        net = create_model("tiny_vit.ft", pretrained=True, num_classes=0)
    assert_holds(net, {k: v for k, v in state.items() if not k.startswith("head.")})


def test_a_head_is_put_on_an_encoder(papers: Card, server: Server) -> None:
    server.files["encoder.pth"], state = checkpoint("tiny_vit.encoder")
    with pytest.warns(UserWarning, match=r"start anew: fc_norm.*head.*not used: norm.bias, norm.weight"):
        net = create_model("tiny_vit.encoder", pretrained=True, num_classes=7, pool="avg")
    assert torch.equal(net.state_dict()["pos_embed"], state["pos_embed"])


def test_one_s_own_head_may_be_of_any_size(papers: Card, tmp_path: Path) -> None:
    content, state = checkpoint("tiny_vit", num_classes=5)
    (tmp_path / "mine.pth").write_bytes(content)
    assert_holds(create_model("tiny_vit", weights=tmp_path / "mine.pth", num_classes=5), state)
    with pytest.warns(UserWarning, match=r"start anew: head.weight \(7, 8\), head.bias \(7,\)$"):
        create_model("tiny_vit", weights=tmp_path / "mine.pth", num_classes=7)
    with pytest.raises(ZooError, match=r"2 other shape \(head.weight \(5, 8\) for \(10, 8\)"):
        create_model("tiny_vit", weights=tmp_path / "mine.pth")


def test_another_image_size_resizes_position_tables(papers: Card, server: Server) -> None:
    from zoo.ops.pos_embed import resize_pos_embed

    server.files["ft.pth"], state = checkpoint("tiny_vit")
    with pytest.warns(UserWarning, match=r"tiny_vit.ft: resized: pos_embed \(1, 17, 8\) to \(1, 65, 8\)$"):
        net = create_model("tiny_vit.ft", pretrained=True, img_size=32)
    table = resize_pos_embed(state["pos_embed"], (8, 8), num_prefix=1)
    assert table.shape == (1, 65, 8)
    assert_holds(net, {**state, "pos_embed": table})


def test_overrides_that_make_another_network_are_refused(papers: Card, server: Server) -> None:
    server.files["ft.pth"], _ = checkpoint("tiny_vit")
    with pytest.raises(ZooError, match=r"other shape \(pos_embed \(1, 17, 8\) for \(1, 17, 16\)"):
        create_model("tiny_vit.ft", pretrained=True, dim=16)
    assert pretrained.verify_weights("tiny_vit.ft")  # the file is not to blame, and stays
    with pytest.raises(ZooError, match="unknown option of tiny_vit 'num_clases'; did you mean 'num_classes'"):
        create_model("tiny_vit", num_clases=3)


# ---- what may go wrong on the way -----------------------------------------------------------------------------------


def test_a_cut_connection_is_resumed(papers: Card, server: Server) -> None:
    server.files["ft.pth"], state = checkpoint("tiny_vit")
    server.cuts = 2
    assert_holds(create_model("tiny_vit.ft", pretrained=True), state)
    size = len(server.files["ft.pth"])
    assert [(wanted, status) for _, wanted, status in server.log] == [
        (None, 200),
        (f"bytes={size // 2}-", 206),
        (f"bytes={size // 2 + (size - size // 2) // 2}-", 206),
    ]


def test_an_earlier_process_s_part_is_resumed_unless_the_file_changed(papers: Card, server: Server) -> None:
    content, state = checkpoint("tiny_vit")
    target = cache_dir() / "weights/tiny/tiny_vit.ft/ft.pth"
    server.files["ft.pth"] = content
    for changed in (False, True):
        server.cuts = 1000
        download.ATTEMPTS, attempts = 1, download.ATTEMPTS
        with pytest.raises(ZooError, match="connection ended after"):
            download.fetch([f"{server.url}/ft.pth"], target)
        download.ATTEMPTS, server.cuts = attempts, 0
        kept = target.with_name("ft.pth.part").stat().st_size
        assert 0 < kept < len(content)
        if changed:
            server.files["ft.pth"], state = checkpoint("tiny_vit", seed=1)
        assert_holds(create_model("tiny_vit.ft", pretrained=True), state)
        assert server.log[-1] == ("ft.pth", f"bytes={kept}-", 200 if changed else 206)
        pretrained.forget_weights("tiny_vit.ft")
    assert leftovers() == []


def test_a_wrong_part_does_not_spoil_the_file(papers: Card, server: Server) -> None:
    server.files["ft.pth"], state = checkpoint("tiny_vit")
    papers(sha256=digest(server.files["ft.pth"]))
    folder = cache_dir() / "weights/tiny/tiny_vit.ft"
    for size in (100, len(server.files["ft.pth"]), len(server.files["ft.pth"]) + 100):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ft.pth.part").write_bytes(b"x" * size)
        assert_holds(create_model("tiny_vit.ft", pretrained=True), state)
        pretrained.forget_weights("tiny_vit.ft")


def test_a_busy_server_is_asked_again(papers: Card, server: Server) -> None:
    server.files["ft.pth"], state = checkpoint("tiny_vit")
    server.broken = 2
    assert_holds(create_model("tiny_vit.ft", pretrained=True), state)
    assert [status for *_, status in server.log] == [503, 503, 200]


def test_mirrors_take_over(papers: Card, server: Server) -> None:
    server.files["mirror.pth"], state = checkpoint("tiny_vit")
    papers(urls=[f"{server.url}/gone.pth", "http://127.0.0.1:9/refused.pth", f"{server.url}/mirror.pth"])
    assert_holds(create_model("tiny_vit.ft", pretrained=True), state)
    assert [(name, status) for name, _, status in server.log] == [("gone.pth", 404), ("mirror.pth", 200)]


def test_a_mirror_with_the_wrong_file_is_passed_over(papers: Card, server: Server) -> None:
    server.files["other.pth"], _ = checkpoint("tiny_vit", seed=1)
    server.files["ft.pth"], state = checkpoint("tiny_vit")
    papers(urls=[f"{server.url}/other.pth", f"{server.url}/ft.pth"], sha256=digest(server.files["ft.pth"]))
    assert_holds(create_model("tiny_vit.ft", pretrained=True), state)


def test_not_there_is_one_line(papers: Card, server: Server) -> None:
    with pytest.raises(ZooError, match=r"cannot fetch ft.pth: http://127.*/ft.pth: HTTP 404") as caught:
        create_model("tiny_vit.ft", pretrained=True)
    assert "\n" not in str(caught.value)
    assert len(server.log) == 1
    assert leftovers() == []


@pytest.mark.parametrize("facts", [{"sha256": "0" * 64}, {"md5_prefix": "abcdef"}, {"size": 17}])
def test_a_file_that_is_not_the_published_one_is_refused(papers: Card, server: Server, facts: dict[str, Any]) -> None:
    server.files["ft.pth"], _ = checkpoint("tiny_vit")
    papers(**facts)
    with pytest.raises(ZooError, match=r"sha256 is|md5 is|bytes where 17 are due"):
        create_model("tiny_vit.ft", pretrained=True)
    assert not [path for path in (cache_dir() / "weights").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_the_checksum_of_the_first_use_is_held(papers: Card, server: Server) -> None:
    server.files["ft.pth"], state = checkpoint("tiny_vit")
    create_model("tiny_vit.ft", pretrained=True)
    folder = cache_dir() / "weights/tiny/tiny_vit.ft"
    (folder / "ft.pth").unlink()
    (folder / "converted.safetensors").unlink()
    genuine = server.files["ft.pth"]
    server.files["ft.pth"], _ = checkpoint("tiny_vit", seed=1)
    with pytest.raises(ZooError, match="recorded at first use"):
        create_model("tiny_vit.ft", pretrained=True)
    server.files["ft.pth"] = genuine
    assert_holds(create_model("tiny_vit.ft", pretrained=True), state)


@pytest.mark.parametrize("published", [True, False])
def test_a_truncated_file_is_refused_and_not_kept(papers: Card, server: Server, published: bool) -> None:
    whole, state = checkpoint("tiny_vit")
    server.files["ft.pth"] = whole[: len(whole) // 2]
    if published:
        papers(sha256=digest(whole))
    with pytest.raises(ZooError, match="sha256" if published else "not a whole PyTorch checkpoint"):
        create_model("tiny_vit.ft", pretrained=True)
    server.files["ft.pth"] = whole
    assert_holds(create_model("tiny_vit.ft", pretrained=True), state)


@pytest.mark.parametrize("old_format", [True, False])
def test_a_malicious_pickle_does_not_run(papers: Card, server: Server, tmp_path: Path, old_format: bool) -> None:
    import io

    class Bad:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    buffer = io.BytesIO()
    torch.save({"model": {}, "x": Bad()}, buffer, _use_new_zipfile_serialization=not old_format)
    server.files["ft.pth"] = buffer.getvalue()
    with pytest.raises(ZooError, match=r"refused: x is a (posix|nt)\.system"):
        create_model("tiny_vit.ft", pretrained=True)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", pack([1, 2]), pack({"model": {"epoch": 3}})])
def test_a_file_that_is_no_checkpoint_is_refused(papers: Card, server: Server, content: bytes) -> None:
    server.files["ft.pth"] = content
    with pytest.raises(ZooError, match=r"not a whole|holds no tensors") as caught:
        create_model("tiny_vit.ft", pretrained=True)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_architecture_ends_in_a_key_report(papers: Card, server: Server) -> None:
    server.files["ft.pth"] = pack({"model": {"conv1.weight": torch.ones(3), "head.bias": torch.ones(3)}})
    with pytest.raises(ZooError) as caught:
        create_model("tiny_vit.ft", pretrained=True)
    message = str(caught.value)
    assert message.startswith("tiny_vit.ft does not match tiny_vit: 6 missing (pos_embed, ")
    assert "1 unexpected (conv1.weight)" in message
    assert "1 other shape (head.bias (3,) for (10,))" in message
    server.files["ft.pth"], state = checkpoint("tiny_vit")  # the wrong file was not held on to
    assert_holds(create_model("tiny_vit.ft", pretrained=True), state)


def test_an_encoder_given_for_the_full_model_names_the_right_one(papers: Card, server: Server, tmp_path: Path) -> None:
    content, state = checkpoint("tiny_vit.encoder", dim=4)
    (tmp_path / "encoder.pth").write_bytes(content)
    with pytest.raises(ZooError, match=r"2 missing \(decoder.*these are weights of 'tiny_vit.encoder'"):
        create_model("tiny_mae", weights=tmp_path / "encoder.pth", dim=4)
    with pytest.warns(UserWarning, match="start anew: fc_norm"):
        net = create_model("tiny_vit", weights=tmp_path / "encoder.pth", dim=4)
    assert torch.equal(net.state_dict()["pos_embed"], state["pos_embed"])


# ---- the cache ------------------------------------------------------------------------------------------------------


def test_tampered_cached_files_are_not_loaded(papers: Card, server: Server, capfd: Any) -> None:
    server.files["ft.pth"], state = checkpoint("tiny_vit")
    create_model("tiny_vit.ft", pretrained=True)
    folder = cache_dir() / "weights/tiny/tiny_vit.ft"

    def spoil(name: str) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-5] ^= 1
        (folder / name).write_bytes(content)

    spoil("converted.safetensors")
    with pytest.raises(ZooError, match="changed since it was stored"):
        pretrained.verify_weights("tiny_vit.ft")
    assert_holds(create_model("tiny_vit.ft", pretrained=True), state)  # converted anew from the published file
    assert len(server.log) == 1
    assert "converting anew" in capfd.readouterr().err
    spoil("ft.pth")
    with pytest.raises(ZooError, match=r"sha256|recorded"):
        pretrained.verify_weights("tiny_vit.ft")
    spoil("converted.safetensors")
    assert_holds(create_model("tiny_vit.ft", pretrained=True), state)  # fetched anew
    assert len(server.log) == 2


def test_offline(papers: Card, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["ft.pth"], state = checkpoint("tiny_vit")
    monkeypatch.setenv("ZOO_OFFLINE", "1")
    with pytest.raises(ZooError, match="not in the cache, and ZOO_OFFLINE is set"):
        create_model("tiny_vit.ft", pretrained=True)
    assert server.log == []
    monkeypatch.setenv("ZOO_OFFLINE", "0")
    create_model("tiny_vit.ft", pretrained=True)
    monkeypatch.setenv("ZOO_OFFLINE", "1")
    assert_holds(create_model("tiny_vit.ft", pretrained=True), state)


def test_a_changed_converter_converts_anew(papers: Card, server: Server, tmp_path: Path) -> None:
    server.files["ft.pth"], state = checkpoint("tiny_vit")
    create_model("tiny_vit.ft", pretrained=True)
    code = tmp_path / "papers/tiny.py"
    code.write_text(CODE.replace("value for key, value in state.items()", "value + 1 for key, value in state.items()"))
    sys.modules.pop("zoo_papers_tiny")
    assert_holds(create_model("tiny_vit.ft", pretrained=True), {key: value + 1 for key, value in state.items()})
    assert len(server.log) == 1


def test_processes_that_ask_at_once_load_once(papers: Card, server: Server) -> None:
    server.files["ft.pth"], _ = checkpoint("tiny_vit")
    target, got = cache_dir() / "weights/x/ft.pth", []

    def ask() -> None:
        got.append(download.fetch([f"{server.url}/ft.pth"], target).sha256)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [digest(server.files["ft.pth"])] * 4
    assert len(server.log) == 1


def test_a_cache_that_cannot_be_written_is_one_line(
    papers: Card, server: Server, monkeypatch: Any, tmp_path: Path
) -> None:
    server.files["ft.pth"], _ = checkpoint("tiny_vit")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "file"))
    with pytest.raises(ZooError, match="cannot write") as caught:
        create_model("tiny_vit.ft", pretrained=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("marks", [True, False])
def test_a_stalled_connection_loses_nothing(server: Server, marks: bool, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.files["ft.pth"] = bytes(range(256)) * 100
    server.cuts, server.stall, server.marks = 1, True, marks
    got = download.fetch([f"{server.url}/ft.pth"], tmp_path / "ft.pth")
    assert got.path.read_bytes() == server.files["ft.pth"]
    assert [wanted for _, wanted, _ in server.log] == [None, "bytes=12800-"]


@pytest.mark.parametrize(("asked", "waits"), [("7", 7), ("Thu, 01 Jan 2099 00:00:00 GMT", None), ("soon", 0)])
def test_a_server_s_wish_to_wait_is_granted(
    server: Server, monkeypatch: Any, tmp_path: Path, asked: str, waits: int | None
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    server.files["ft.pth"], server.broken, server.retry_after = b"weights", 1, asked
    if waits is None:
        with pytest.raises(ZooError, match=r"HTTP 503 .*, try again in [\d,]+ s"):
            download.fetch([f"{server.url}/ft.pth"], tmp_path / "ft.pth")
    else:
        download.fetch([f"{server.url}/ft.pth"], tmp_path / "ft.pth")
        assert pauses == [max(waits, download.BACKOFF)]


PAGE = b"<!DOCTYPE html><title>Too many requests</title>"


@pytest.mark.parametrize("spoilt", ["ft.pth.part.json", "ft.pth.json", "converted.json", "ft.pth", "page"])
def test_a_spoilt_cache_mends_itself(papers: Card, server: Server, spoilt: str) -> None:
    """Empty records beside a part, and pages kept as files with their checksum, as older versions left them."""
    server.files["ft.pth"], state = checkpoint("tiny_vit")
    folder = cache_dir() / "weights/tiny/tiny_vit.ft"
    folder.mkdir(parents=True)
    (folder / "ft.pth.part").write_bytes(server.files["ft.pth"][:100])
    if spoilt == "page":
        (folder / "ft.pth").write_bytes(PAGE)
        (folder / "ft.pth.json").write_text(json.dumps({"sha256": digest(PAGE)}))
    else:
        (folder / spoilt).touch()
    assert_holds(create_model("tiny_vit.ft", pretrained=True), state)
    assert leftovers() == []


def test_a_page_in_place_of_the_file_is_not_kept(papers: Card, server: Server) -> None:
    server.files["ft.pth"] = PAGE
    with pytest.raises(ZooError, match=r"cannot fetch ft\.pth: http://.*: an HTML page, not a whole file$"):
        create_model("tiny_vit.ft", pretrained=True)
    server.files["ft.pth"], state = checkpoint("tiny_vit")
    assert_holds(create_model("tiny_vit.ft", pretrained=True), state)


def test_the_hash_in_a_file_s_name_is_checked(server: Server, tmp_path: Path) -> None:
    content = b"weights"
    for name in (f"net-{digest(content)[:8]}.pth", "net-20210831.pth"):  # a date is no hash
        server.files[name] = content
        assert download.fetch([f"{server.url}/{name}"], tmp_path / name).sha256 == digest(content)
    server.files["net-0123abcd.pth"] = content
    with pytest.raises(ZooError, match="does not begin with 0123abcd as the name says"):
        download.fetch([f"{server.url}/net-0123abcd.pth"], tmp_path / "net-0123abcd.pth")


def test_a_read_only_cache_serves_what_it_holds(papers: Card, server: Server, monkeypatch: Any) -> None:
    server.files["ft.pth"], state = checkpoint("tiny_vit")
    create_model("tiny_vit.ft", pretrained=True)
    create_model("tiny_vit", weights=f"{server.url}/ft.pth")
    server.stop()

    def refuse(*_: Any) -> None:
        raise AssertionError("the cache was written to")

    monkeypatch.setattr(download, "writable", lambda folder: False)
    monkeypatch.setattr(download, "lock", refuse)
    assert_holds(create_model("tiny_vit.ft", pretrained=True), state)
    assert_holds(create_model("tiny_vit", weights=f"{server.url}/ft.pth"), state)
    monkeypatch.setattr(pretrained, "_converter", lambda card: "of a later version")
    assert_holds(create_model("tiny_vit.ft", pretrained=True), state)  # converted outside the cache


# ---- raw and averaged weights ---------------------------------------------------------------------------------------

TWO_SETS = {
    "ema": lambda raw, average: {"model": raw, "ema": average, "opt": {"state": {}}},
    "state_dict_ema": lambda raw, average: {"state_dict": raw, "state_dict_ema": average},
    "model_ema": lambda raw, average: {"model": raw, "model_ema": {"module": average}},
    "ema_state_dict": lambda raw, average: {
        "pytorch-lightning_version": "2.6",
        "state_dict": {**{f"network.{key}": value for key, value in raw.items()}, "top1.total": torch.ones(())},
        "ema_state_dict": {f"network.{key}": value for key, value in average.items()},
        "ema_steps": 3,
        "ema_9996_state_dict": {f"network.{key}": value * 0 for key, value in average.items()},
        "ema_9996_steps": 3,
    },
    "slow_state_dict": lambda raw, average: {"state_dict": raw, "slow_state_dict": average, "slow_steps": 3},
}


@pytest.mark.parametrize("kind", TWO_SETS)
def test_of_raw_and_averaged_weights_the_chosen_ones_are_taken(
    papers: Card, tmp_path: Path, capfd: Any, kind: str
) -> None:
    raw, average = checkpoint("tiny_vit")[1], checkpoint("tiny_vit", seed=1)[1]
    torch.save(TWO_SETS[kind](raw, average), tmp_path / "mine.pth")
    assert_holds(create_model("tiny_vit", weights=tmp_path / "mine.pth"), average)
    assert f"mine.pth: the averaged weights ({kind}) are taken; use_ema=False takes the raw" in capfd.readouterr().err
    assert_holds(create_model("tiny_vit", weights=tmp_path / "mine.pth", use_ema=True), average)
    assert_holds(create_model("tiny_vit", weights=tmp_path / "mine.pth", use_ema=False), raw)
    torch.save(TWO_SETS[kind](raw, {}), tmp_path / "raw.pth")
    assert_holds(create_model("tiny_vit", weights=tmp_path / "raw.pth"), raw)
    with pytest.raises(ZooError, match=r"raw\.pth: use_ema: holds no averaged weights"):
        create_model("tiny_vit", weights=tmp_path / "raw.pth", use_ema=True)


@pytest.mark.parametrize(
    "content",
    [
        lambda raw, one, two: {"model": raw, "model_ema1": one, "model_ema2": two},  # JiT
        lambda raw, one, two: {"model": raw, "ema": {"model_ema1": one, "model_ema2": two}},
        lambda raw, one, two: {
            "pytorch-lightning_version": "2.6",
            "state_dict": {f"network.{key}": value for key, value in raw.items()},
            **{
                f"model_ema{k}_state_dict": {f"network.{key}": v for key, v in s.items()}
                for k, s in ((1, one), (2, two))
            },
            **{f"model_ema{k}_steps": 3 for k in (1, 2)},
        },
    ],
)
def test_an_average_is_taken_by_its_name(papers: Card, tmp_path: Path, content: Any) -> None:
    raw, one, two = (checkpoint("tiny_vit", seed=seed)[1] for seed in (0, 1, 2))
    torch.save(content(raw, one, two), tmp_path / "mine.pth")
    for name, state in (("model_ema1", one), ("model_ema2", two)):
        assert_holds(create_model("tiny_vit", weights=tmp_path / "mine.pth", use_ema=name), state)
    with pytest.raises(ZooError, match=r"unknown average 'model_ema3'.*model_ema1"):
        create_model("tiny_vit", weights=tmp_path / "mine.pth", use_ema="model_ema3")
    torch.save({"model": raw}, tmp_path / "raw.pth")
    with pytest.raises(ZooError, match=r"raw\.pth: holds no averages"):
        create_model("tiny_vit", weights=tmp_path / "raw.pth", use_ema="model_ema1")


def test_an_average_alone_and_one_without_buffers(papers: Card, tmp_path: Path) -> None:
    raw, average = checkpoint("tiny_vit")[1], checkpoint("tiny_vit", seed=1)[1]
    torch.save({"ema": average}, tmp_path / "a.pth")
    assert_holds(create_model("tiny_vit", weights=tmp_path / "a.pth"), average)
    with pytest.raises(ZooError, match=r"use_ema=False: holds averaged weights only \(ema\)"):
        create_model("tiny_vit", weights=tmp_path / "a.pth", use_ema=False)
    part = {key: value for key, value in average.items() if key != "pos_embed"}
    torch.save({"model": raw, "ema": part}, tmp_path / "b.pth")
    assert_holds(create_model("tiny_vit", weights=tmp_path / "b.pth"), {**average, "pos_embed": raw["pos_embed"]})


def test_the_card_says_which_weights_are_published(papers: Card, server: Server, tmp_path: Path) -> None:
    raw, average = checkpoint("tiny_vit")[1], checkpoint("tiny_vit", seed=1)[1]
    server.files["ft.pth"] = pack({"model": raw, "ema": average})
    papers(use_ema=False)
    assert_holds(create_model("tiny_vit.ft", pretrained=True), raw)
    (tmp_path / "mine.pth").write_bytes(server.files["ft.pth"])
    assert_holds(create_model("tiny_vit", weights=tmp_path / "mine.pth"), raw)
    with pytest.raises(ZooError, match=r"tiny_vit\.ft is one set"):
        create_model("tiny_vit.ft", pretrained=True, use_ema=True)


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "pkl", "npz"])
def test_weights_that_are_not_numbers_are_refused(papers: Card, tmp_path: Path, suffix: str) -> None:
    import pickle

    from safetensors.torch import save_file

    path = tmp_path / f"mine.{suffix}"

    def save(state: dict[str, Tensor]) -> None:
        arrays = {key: value.numpy() for key, value in state.items()}
        {
            "pth": lambda: torch.save(state, path),
            "safetensors": lambda: save_file(state, path),
            "pkl": lambda: path.write_bytes(pickle.dumps({"model": arrays})),
            "npz": lambda: np.savez(path, **arrays),
        }[suffix]()

    state = checkpoint("tiny_vit")[1]
    save(state)
    assert_holds(create_model("tiny_vit", weights=path), state)
    for value, message in ((float("nan"), "head.bias holds NaN"), (float("inf"), "head.bias is not finite")):
        save({**state, "head.bias": torch.full((10,), value)})
        with pytest.raises(ZooError, match=rf"{suffix}: not usable: {message}"):
            create_model("tiny_vit", weights=path)


# ---- the hub --------------------------------------------------------------------------------------------------------


def test_hub_ids(papers: Card, server: Server, tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its environment when it is imported."""
    content, _ = checkpoint("tiny_vit")
    server.files["org/repo/resolve/main/ft.pth"] = content
    script = """
        import hashlib, os, sys
        from pathlib import Path
        from zoo.weights import download
        from zoo.errors import ZooError
        target = Path(sys.argv[1]) / "ft.pth"
        def get(source):
            try:
                return download.fetch([source], target).sha256
            except ZooError as error:
                return str(error)
        print(get("hf://org/repo/ft.pth"))
        os.environ["ZOO_OFFLINE"] = "1"
        print(get("hf://org/repo/ft.pth"))
        print(get("hf://org/repo/other.pth"))
        print(get("hf://org"))
    """
    environment = {
        **{key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"},
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(download.__file__).parents[2]),
    }
    run = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "cache")]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120, check=True)
    first, again, other, wrong = done.stdout.splitlines()
    assert first == again == digest(content)
    assert other.startswith("cannot fetch ft.pth: hf://org/repo/other.pth: ")
    assert "hf://organisation/repository/file" in wrong


# ---- names and preprocessing ----------------------------------------------------------------------------------------


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def test_wrong_names_are_one_line(papers: Card, tmp_path: Path) -> None:
    for call, message in (
        (lambda: create_model("tiny_vitt"), "unknown model 'tiny_vitt'; did you mean 'tiny_vit'"),
        (lambda: create_model("tiny_vit.ftt"), "unknown weights 'tiny_vit.ftt'; did you mean 'tiny_vit.ft'"),
        (lambda: create_model("tiny_vit", pretrained=True), "name one of tiny_vit.ft, tiny_vit.encoder"),
        (lambda: create_model("tiny_vit", weights="tiny_mae.full"), "another model"),
        (lambda: create_model("tiny_vit", weights=tmp_path / "no.pth"), "no weights file"),
        (lambda: create_model("tiny_vit", weights=tmp_path), "is a folder without a checkpoint of t5x or flax"),
        (lambda: create_model("tiny_vit", weights=_pipe(tmp_path / "pipe.pth")), "is no regular file"),
        (lambda: pretrained.read_source(tmp_path / "pipe.pth"), "is no regular file"),
        (lambda: pretrained.verify_weights("tiny_vit.ft"), "not in the cache"),
    ):
        with pytest.raises(ZooError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_card_without_its_code_is_one_line(papers: Card, tmp_path: Path) -> None:
    (tmp_path / "papers/tiny.py").unlink()
    sys.modules.pop("zoo_papers_tiny", None)
    with pytest.raises(ZooError, match=r"tiny.py must lie beside its card"):
        create_model("tiny_vit")


def test_preprocess_is_that_of_the_weights(papers: Card) -> None:
    from PIL import Image

    picture = Image.new("RGB", (50, 40), (255, 128, 0))
    out = create_preprocess("tiny_vit.ft")(picture)
    assert out.shape == (3, 16, 16)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[:, 5, 5], (torch.tensor([255, 128, 0]) / 255 - 0.5) / 0.25)
    assert create_preprocess("tiny_vit.ft", size=24)(picture).shape == (3, 24, 24)
    torch.testing.assert_close(create_preprocess("tiny_vit")(picture), out)  # both sets of weights agree
    tensor = torch.zeros(3, 40, 50, dtype=torch.uint8)
    torch.testing.assert_close(create_preprocess("tiny_vit.ft")(tensor), torch.full((3, 16, 16), -2.0))
    facts = catalog.weight("tiny_vit.ft")[1].preprocess.model_dump()
    papers(preprocess={**facts, "channels": "bgr"})
    torch.testing.assert_close(create_preprocess("tiny_vit.ft")(picture), out.flip(0))
    with pytest.raises(ZooError, match="differ in preprocessing"):
        create_preprocess("tiny_vit")


def test_preprocess_takes_what_users_have(papers: Card, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "photo.png"
    Image.effect_noise((50, 40), 60).save(path)  # gray
    prepare = create_preprocess("tiny_vit.ft")
    wanted = prepare(path)
    assert wanted.shape == (3, 16, 16)
    tensor = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    for picture in (str(path), path.read_bytes(), tensor, tensor[None]):
        torch.testing.assert_close(prepare(picture), wanted.expand(*prepare(picture).shape))
    torch.testing.assert_close(prepare(Image.open(path)), wanted, atol=0.05, rtol=0)  # Pillow rounds between its passes
    turned = Image.open(path).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 270 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    torch.testing.assert_close(prepare(tmp_path / "turned.png"), wanted)
    for wrong, kind in ((7, "an? int"), (tensor[0], r"a tensor \(40, 50\)"), ([tensor], "a list")):
        with pytest.raises(
            ZooError, match=f"preprocessing takes a path, a PIL image or a uint8 tensor .*, not {kind}$"
        ):
            prepare(wrong)
    with pytest.raises(ZooError, match=r"cannot read .*no\.jpg"):
        prepare("no.jpg")


def test_the_record_says_where_a_file_came_from(papers: Card, server: Server) -> None:
    server.files["ft.pth"], _ = checkpoint("tiny_vit")
    create_model("tiny_vit.ft", pretrained=True)
    record = json.loads((cache_dir() / "weights/tiny/tiny_vit.ft/ft.pth.json").read_text())
    content = server.files["ft.pth"]
    assert record == {"source": f"{server.url}/ft.pth", "sha256": digest(content), "size": len(content)}


# ---- the real thing, small ------------------------------------------------------------------------------------------

SMALL = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}


def test_mae_s_published_layouts_in_small(tmp_path: Path) -> None:
    """Encoder, full and fine-tuned files of MAE, as published but for their size."""
    decoder = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    full = create_model("mae_vit_base_patch16", **SMALL, **decoder)
    torch.save({"model": full.state_dict(), "args": argparse.Namespace(), "epoch": 1}, tmp_path / "full.pth")
    encoder = {k: v for k, v in full.state_dict().items() if "decoder" not in k and k != "mask_token"}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")

    again = create_model("mae_vit_base_patch16", weights=tmp_path / "full.pth", **SMALL, **decoder)
    assert_holds(again, full.state_dict())
    with pytest.raises(
        ZooError, match=r"missing \(mask_token.*these are weights of 'vit_base_patch16.mae_in1k_1600ep'"
    ):
        create_model("mae_vit_base_patch16", weights=tmp_path / "encoder.pth", **SMALL, **decoder)

    with pytest.warns(UserWarning, match=r"start anew: .*fc_norm.*not used: norm"):
        net = create_model("vit_base_patch16", weights=tmp_path / "encoder.pth", num_classes=5, **SMALL)
    assert torch.equal(net.state_dict()["blocks.1.mlp.fc2.bias"], encoder["blocks.1.mlp.fc2.bias"])
    large = {**SMALL, "img_size": 64, "num_classes": 0, "global_pool": "token"}
    with pytest.warns(UserWarning, match=r"resized: pos_embed \(1, 5, 32\) to \(1, 17, 32\)$"):
        net = create_model("vit_base_patch16", weights=tmp_path / "encoder.pth", **large)
    assert net.state_dict()["pos_embed"].shape == (1, 17, 32)
    assert net.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 32)


def test_mae_s_encoder_weights_are_loaded_whole(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`vit_base_patch16.mae_in1k_1600ep` by its published name: no key left over, none new, in a model that runs."""
    card, entry = catalog.weight("vit_base_patch16.mae_in1k_1600ep")
    net = create_model(entry.name, **SMALL)
    assert "norm.weight" in net.state_dict()
    server.files["e.pth"] = pack({"model": net.state_dict()})
    local = entry.model_copy(update={"urls": [f"{server.url}/e.pth"], "md5_prefix": None, "size": None, "sha256": None})
    monkeypatch.setattr(catalog, "weight", lambda name: (card, local))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_holds(create_model(entry.name, pretrained=True, **SMALL), net.state_dict())

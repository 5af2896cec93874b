"""A run handed on: pushed to a folder and to a loopback server with the hub's routes, and read back by name."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import zoo
from tests.conftest import ROOT
from zoo.command.cli import main
from zoo.errors import ZooError
from zoo.weights import hub
from zoo.weights.runs import open_run

TOKEN = "hf_secretsecretsecret"
FILES = [hub.CARD, hub.CONFIG, hub.WEIGHTS]
CLASSES = ["circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "arrow", "hourglass"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a few steps."""
    folder = tmp_path_factory.mktemp("pushed")
    options = ["--data.train_samples", "64", "--data.batch_size", "32", "--model.optim.global_batch", "null"]
    options += ["--trainer.max_epochs", "1", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"]
    options += ["--model.depths", "[1, 1, 1]", "--trainer.num_sanity_val_steps", "0", "--logger", "csv"]
    with contextlib.chdir(folder):
        assert main(["fit", "preact_resnet/pocket", *options]) == 0
    (found,) = (folder / "runs" / "preact_resnet" / "pocket").iterdir()
    return found


def test_a_folder_holds_all_that_is_needed(run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(run), "model", "--licence", "MIT"]) == 0
    assert 'zoo.create_model("model")' in capsys.readouterr().out
    assert sorted(path.name for path in Path("model").iterdir()) == FILES
    mine, theirs = open_run(str(run)), zoo.create_model("model")
    assert mine.network.state_dict().keys() == theirs.state_dict().keys()
    assert all(value.equal(theirs.state_dict()[key]) for key, value in mine.network.state_dict().items())
    picture = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert zoo.create_preprocess("model")(picture).equal(mine.preprocess()(picture))
    assert open_run("model").classes == CLASSES

    text = Path("model", hub.CARD).read_text()
    facts = yaml.safe_load(text.split("---\n")[1])
    assert facts["license"] == "mit"
    assert (facts["pipeline_tag"], facts["datasets"]) == ("image-classification", ["shapes"])
    scores = {row["type"]: row["value"] for row in facts["model-index"][0]["results"][0]["metrics"]}
    assert scores["val/top1"] == pytest.approx(mine.facts["metrics"]["val/top1"], abs=1e-6)
    assert "arxiv.org/abs/1603.05027" in text
    assert "`preact_resnet/pocket`" in text
    assert str(tmp_path) not in text + Path("model", hub.CONFIG).read_text()

    assert main(["push", str(run), "model", "--licence", "MIT"]) == 0  # over itself
    assert main(["push", str(run), "hf://me/model", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert 'zoo.create_model("hf://me/model")' in told
    assert told.endswith("nothing was sent\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["preact_resnet/pocket", "x"], "zoo push takes a run of yours"),
        (["RUN", "hf://me"], "a model on the hub is hf://org/name"),
        (["RUN", "hf://me/x@main"], "a model on the hub is hf://org/name"),
        (["RUN", "."], "holds other things already"),
        (["RUN", "x", "--private"], "--private is of a repository on the hub"),
        (["runs:last", "x"], "`zoo fit RECIPE` first"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], line: str, run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other").touch()
    assert main(["push", *(str(run) if word == "RUN" else word for word in words)]) == 2
    told = capsys.readouterr().err
    assert line in told
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def _change(folder: Path, **facts: Any) -> None:
    content = json.loads((folder / hub.CONFIG).read_text())
    (folder / hub.CONFIG).write_text(json.dumps({**content, **facts}))


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"library": "other"}, "none that zoo push writes: library"),
        ({"format": 2}, "none that zoo push writes: format"),
        ({"surprise": 1}, "none that zoo push writes: surprise"),
        ({"task": "os.system"}, "which is none of the zoo's"),
        ({"task": "zoo.recognition.preact_resnet.os.system"}, "which is none of the zoo's"),
        ({"options": {"depths": [2, 2, 2]}}, "does not match PreActResNetClassification"),
        ({"options": {"depht": 1}}, "PreActResNetClassification cannot be made of its options"),
    ],
)
def test_what_someone_else_wrote_is_checked(facts: dict[str, Any], line: str, run: Path, tmp_path: Path) -> None:
    folder = hub.write(open_run(str(run)), tmp_path / "model")
    _change(folder, **facts)
    with pytest.raises(ZooError, match=line) as told:
        zoo.create_model(str(folder))
    assert "\n" not in str(told.value)


def test_nan_is_refused_and_shown_commands_name_the_folder(run: Path, tmp_path: Path, capsys: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = hub.write(open_run(str(run)), tmp_path / "my model")
    assert main(["show", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"zoo predict '{folder}'" in shown
    assert "zoo test" not in shown  # it has no data
    state = load_file(folder / hub.WEIGHTS)
    save_file({name: value * float("nan") for name, value in state.items()}, folder / hub.WEIGHTS)
    with pytest.raises(ZooError, match="holds NaN"):
        zoo.create_model(str(folder))


class _Hub(BaseHTTPRequestHandler):
    """The routes that a push and a download take: create, preupload, commit, resolve."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    log: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.log.append(f"{self.command} {self.path}")
        name = self.path.partition("?")[0].removeprefix("/me/model/resolve/main/")
        body = self.files.get(name)
        if body is None:
            return self._answer(404, {"X-Error-Code": "EntryNotFound"}, b"{}")
        tag = f'"{hashlib.sha256(body).hexdigest()}"'
        self._answer(200, {"ETag": tag, "X-Repo-Commit": "1" * 40}, body)

    def do_POST(self) -> None:
        self.log.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {}, json.dumps({"error": f"no, {self.headers.get('Authorization')}"}).encode())
        found: Any = {}
        if self.path == "/api/repos/create":
            found = {"url": f"http://{self.headers['Host']}/me/model", "name": "me/model", "id": "me/model"}
        elif self.path == "/api/models/me/model/preupload/main":
            asked = json.loads(body)["files"]
            found = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        elif self.path == "/api/models/me/model/commit/main":
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            found = {"commitUrl": f"http://{self.headers['Host']}/me/model/commit/{'1' * 40}", "commitOid": "1" * 40}
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(found).encode())

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    kind = type("Hub", (_Hub,), {"files": {}, "log": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def test_a_hub_takes_and_gives_it(run: Path, server: Any, tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its environment when it is imported."""
    script = """
        import os, sys
        import zoo
        from zoo.command.cli import main
        os.environ["HF_TOKEN"] = "hf_anotheranother"
        print(main(["push", sys.argv[1], "hf://me/model"]))
        os.environ["HF_TOKEN"] = sys.argv[2]
        print(main(["push", sys.argv[1], "hf://me/model"]))
        net = zoo.create_model("hf://me/model")
        print(type(net).__name__, sum(p.numel() for p in net.parameters()), zoo.create_preprocess("hf://me/model@main"))
        for name in ("hf://me/other", "hf://me"):
            try:
                zoo.create_model(name)
            except zoo.ZooError as error:
                print(error)
    """
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", textwrap.dedent(script), str(run), TOKEN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *_, loaded, missing, unknown = done.stdout.splitlines()
    mine = open_run(str(run)).network
    assert loaded.startswith(f"PreActResNet {sum(p.numel() for p in mine.parameters())} ")
    assert missing.startswith("cannot fetch hf://me/other@main/config.json: ")
    assert "hf://me" in unknown
    assert "the hub does not know you, or gives you no right to write" in done.stderr
    assert "hf_" not in done.stdout + done.stderr
    handler = server.RequestHandlerClass
    assert sorted(handler.files) == FILES
    assert sum("/commit/" in line for line in handler.log) == 1

"""The wheel alone gives a working zoo: declarations inside, nothing but `zoo` installed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("paperzoo-*.whl")
    return path


def test_declarations_travel_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"zoo"}
    for folder, inside, pattern in [
        ("recipes", "zoo/share/recipes", "**/*.yaml"),
        ("data", "zoo/share/data", "*.yaml"),
        ("tests/parity/cases", "zoo/share/parity/cases", "**/*.json"),
        ("zoo", "zoo", "*/*.yaml"),
        ("zoo", "zoo", "pages/*.[cj]s*"),
    ]:
        wanted = {f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" for path in (ROOT / folder).glob(pattern)}
        assert wanted, f"nothing under {folder}"
        assert wanted <= names, sorted(wanted - names)[:5]


def test_installed_wheel_fits_the_pocket_recipe_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    program = (
        f"import sys; sys.path[:] = [{str(site)!r}] + [p for p in sys.path if p not in ('', {str(ROOT)!r})];"
        "import zoo.command.cli, zoo; assert zoo.__file__.startswith(sys.path[0]), zoo.__file__;"
        "sys.exit(zoo.command.cli.main(sys.argv[1:]))"
    )
    tiny = ["--trainer.max_steps", "2", "--data.train_samples", "128", "--trainer.limit_val_batches", "1"]
    done = subprocess.run(
        [sys.executable, "-c", program, "fit", "mae/pocket", *tiny],
        cwd=empty,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert list(empty.glob("runs/mae/pocket/*/checkpoints/last.ckpt"))
    assert list(empty.glob("runs/mae/pocket/*/**/*.png"))

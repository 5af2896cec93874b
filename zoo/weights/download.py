"""Files from elsewhere: http(s) with resume and mirrors, Hugging Face hub ids, and paths, each checked before use.

A file appears under its name only when it is whole and right: it grows as ``<name>.part`` and is renamed at the end.
Its checksum is compared with the published one, or else with the one recorded in ``<name>.json`` at first use.
"""

from __future__ import annotations

import contextlib
import email.utils
import errno
import hashlib
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from zoo.errors import ZooError
from zoo.files import rename

CHUNK = 1 << 20
ATTEMPTS = 5  # tries in a row that bring no byte, for each address
TIMEOUT = 30.0  # seconds without an answer
BACKOFF = 0.5  # seconds before the second try, doubled for each further one
PATIENCE = 300.0  # seconds that a server may ask to wait
# The names that torch.hub gives files end in the beginning of their sha256: resnet50-0676ba61.pth.
_HASHED = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8,64})\.(?:pth|pt|th|tar|pkl)$")


Advance = Callable[[int, int | None], None]  # told the bytes that are there and, where it is known, how many are due


@dataclass(frozen=True)
class Published:
    """What is known of a file beforehand; None where nothing was published."""

    sha256: str | None = None
    md5_prefix: str | None = None
    size: int | None = None
    sha256_prefix: str | None = None


@dataclass(frozen=True)
class Fetched:
    """A file that is there and was checked: where, and its checksum."""

    path: Path
    sha256: str


def offline() -> bool:
    """Whether ``ZOO_OFFLINE`` forbids every use of the network (``HF_HUB_OFFLINE`` forbids the hub's alone)."""
    return _is_set("ZOO_OFFLINE")


def fetch(sources: Sequence[str], target: Path, published: Published = Published()) -> Fetched:
    """The file that the first working one of `sources` gives; nothing is loaded when `target` is there and right.

    Args:
        sources: http(s) addresses, hub ids ``hf://org/repo/file`` (``hf://org/repo@revision/file``), or paths.
            Files of the hub stay in the hub's own cache, and paths where they are; only http(s) writes `target`
            and records the checksum of the first use.
        target: where the file is to lie.
        published: what the file must agree with; a name in torch.hub's way tells the beginning of its sha256.

    Raises:
        ZooError: when no source gives a file that agrees, naming each source and what was wrong with it.
    """
    if published.sha256 is None and (named := _HASHED.search(target.name)):
        published = replace(published, sha256_prefix=named[1])
    if (found := held(target, published)) is not None:  # before the lock: a cache may be read-only
        return found
    with lock(target):
        try:
            return _fetch(sources, target, published)
        except OSError as error:
            raise ZooError(f"cannot write {target}: {_one_line(error)}") from error


def held(target: Path, published: Published) -> Fetched | None:
    """The file that lies at `target`, if it is right; nothing is written."""
    if not target.is_file():
        return None
    recorded = None if published.sha256 else _read_record(target).get("sha256")
    sha256, problem = check(target, replace(published, sha256=published.sha256 or recorded))
    return None if problem else Fetched(target, sha256)


def _fetch(sources: Sequence[str], target: Path, published: Published) -> Fetched:
    recorded = None if published.sha256 else _read_record(target).get("sha256")
    if target.is_file():
        if (found := held(target, published)) is not None:  # another process was first
            return found
        sha256, problem = check(target, published)
        if sha256 == recorded:  # it was wrong when it came: what was recorded of it counts for nothing
            forget(target)
            recorded = None
        target.unlink(missing_ok=True)
        problem = problem or f"sha256 is {sha256}, not {recorded}"
        say(f"{target} is not what is due ({problem}); fetching it anew")
    wanted = replace(published, sha256=published.sha256 or recorded)
    problems = []
    for source in sources:
        try:
            if urlsplit(source).scheme in ("http", "https"):
                return _from_web(source, target, wanted)
            path = _from_hub(source) if urlsplit(source).scheme == "hf" else _from_disk(source)
            sha256, problem = check(path, published)
            if problem is None:
                return Fetched(path, sha256)
            problems.append(f"{source}: {problem}")
        except _Failed as error:
            problems.append(f"{source}: {error}")
    note = f" (recorded at first use in {_record(target)})" if recorded and "sha256" in "".join(problems) else ""
    raise ZooError(f"cannot fetch {target.name}: {'; '.join(problems)}{note}")


def check(path: Path, published: Published) -> tuple[str, str | None]:
    """The file's sha256, and what is wrong with it (None if nothing is)."""
    size = path.stat().st_size
    if published.size is not None and size != published.size:
        return "", f"{size:,} bytes where {published.size:,} are due"
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        head = file.read(512)
        kind = page(head) if path.suffix.lower() not in (".html", ".htm", ".xml") else None
        file.seek(0)
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            if published.md5_prefix:
                md5.update(chunk)
    if not size or kind:
        return sha256.hexdigest(), f"{kind or 'empty'}, not a whole file"
    if published.sha256 and sha256.hexdigest() != published.sha256:
        return sha256.hexdigest(), f"sha256 is {sha256.hexdigest()}, not {published.sha256}"
    if published.sha256_prefix and not sha256.hexdigest().startswith(published.sha256_prefix):
        return sha256.hexdigest(), (
            f"sha256 is {sha256.hexdigest()}, which does not begin with {published.sha256_prefix} as the name says"
        )
    if published.md5_prefix and not md5.hexdigest().startswith(published.md5_prefix):
        return sha256.hexdigest(), f"md5 is {md5.hexdigest()}, which does not begin with {published.md5_prefix}"
    return sha256.hexdigest(), None


def page(head: bytes) -> str | None:
    """What servers give in place of a file, told by its first bytes; None for anything else."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:64].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<!--", b"<body")):
        return "an HTML page"
    if start.startswith((b"<?xml", b"<error")):
        return "an XML page"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS (`git lfs pull` fetches the file itself)"
    return None


def forget(target: Path) -> None:
    """Removes a fetched file and what was recorded of it, so that the next use fetches it anew."""
    for path in (target, _record(target), _part(target), _validator(target)):
        path.unlink(missing_ok=True)


def say(message: str) -> None:
    """A line for the user, from the first process of a run; on standard error, so that programs can read the output."""
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
        print(message, file=sys.stderr, flush=True)


def writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, which need not be there yet."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    return there.is_dir() and os.access(there, os.W_OK)


@contextlib.contextmanager
def lock(target: Path) -> Iterator[None]:
    """Holds `target` against other processes of this machine (the ranks of a run all ask for the same file)."""
    from filelock import FileLock

    held = FileLock(f"{target}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except OSError as error:
        raise ZooError(f"cannot write {target}: {_one_line(error)}") from error
    try:
        yield
    finally:
        held.release()


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to; it takes `target`'s place when the block ends well, and vanishes when it does not."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        rename(temporary, target)
    except OSError as error:
        raise ZooError(f"cannot write {target}: {_one_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


# ---- the kinds of source --------------------------------------------------------------------------------------------


class _Failed(Exception):
    """This source gives no file; the next one may."""


def _from_web(url: str, target: Path, wanted: Published) -> Fetched:
    """`target`, loaded from `url`; a resumed file that comes out wrong is loaded once more from its first byte."""
    if offline():
        raise _Failed("not in the cache, and ZOO_OFFLINE is set")
    part = _part(target)
    resumed = part.exists()
    _download(url, target, wanted)
    sha256, problem = check(part, wanted)
    if problem and resumed:
        _drop_part(target)
        _download(url, target, wanted)
        sha256, problem = check(part, wanted)
    if problem:
        _drop_part(target)
        raise _Failed(problem)
    with replacing(_record(target)) as file:
        file.write_text(json.dumps({"source": url, "sha256": sha256, "size": part.stat().st_size}, indent=1))
    rename(part, target)
    _drop_part(target)
    return Fetched(target, sha256)


def _from_disk(source: str) -> Path:
    parts = urlsplit(source)
    path = Path(unquote(parts.path) if parts.scheme == "file" else source).expanduser()
    if not path.is_file():
        raise _Failed("no such file")
    return path


def from_hub(source: str) -> Path:
    """A file of a hub, ``hf://org/repo/file`` or ``hf://org/repo@revision/file``, in the hub's own cache.

    Raises:
        ZooError: it cannot be had.
    """
    try:
        return _from_hub(source)
    except _Failed as error:
        raise ZooError(f"cannot fetch {source}: {error}") from error


def _from_hub(source: str) -> Path:
    address = source.removeprefix("hf://")
    org, _, rest = address.partition("/")
    repository, _, file = rest.partition("/")
    if not file:
        raise _Failed("a hub id is hf://organisation/repository/file")
    repository, _, revision = repository.partition("@")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise _Failed("needs the package huggingface_hub: pip install huggingface_hub") from error
    try:
        path = hf_hub_download(
            f"{org}/{repository}",
            file,
            revision=revision or None,
            endpoint=os.environ.get("HF_ENDPOINT"),
            local_files_only=offline() or _is_set("HF_HUB_OFFLINE"),
        )
    except Exception as error:  # the hub's errors have many roots (its own, the HTTP client's, ValueError)
        raise _Failed(_one_line(error)) from error
    return Path(path)


def _download(url: str, target: Path, wanted: Published) -> None:
    """Loads `url` into ``<target>.part``, beginning where an earlier try of it stopped."""
    part = _part(target)
    tries = 0
    length: int | None = None  # the file's, once a try of this process has heard it
    while True:
        before = part.stat().st_size if part.exists() else 0
        pause = 0.0
        try:
            with _progress(target.name) as advance:

                def heard(done: int, total: int | None, advance: Advance = advance) -> None:
                    nonlocal length
                    length = total
                    advance(done, total)

                _load(url, part, _validator(target), wanted, heard, length)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part is as long as the file, or longer: begin anew
                _drop_part(target)
            elif error.code < 500 and error.code not in (408, 425, 429):
                raise _Failed(f"HTTP {error.code} {error.reason}") from error
            pause = _retry_after(error.headers.get("Retry-After"))
            if pause > PATIENCE:
                raise _Failed(f"HTTP {error.code} {error.reason}, try again in {pause:,.0f} s") from error
            problem: Exception = error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise ZooError(f"cannot write {part}: {error.strerror}") from error
            problem = error
        except ValueError as error:  # an address that is none
            raise _Failed(_one_line(error)) from error
        after = part.stat().st_size if part.exists() else 0
        tries = 1 if after > before else tries + 1
        if tries >= ATTEMPTS:
            raise _Failed(_one_line(problem)) from problem
        time.sleep(max(pause, BACKOFF * 2 ** (tries - 1)))


def _retry_after(value: str | None) -> float:
    """The seconds that a server asks to wait: it says a number of them, or a date."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _load(
    url: str,
    part: Path,
    validator: Path,
    wanted: Published,
    advance: Advance,
    due: int | None,
) -> None:
    """One try, which goes on where the part ends; `due` is the file's length as the server said it a try before."""
    start = part.stat().st_size if part.exists() else 0
    known = read_json(validator) if start else {}
    mark = known.get("mark") if known.get("url") == url else None
    if start and not mark and not wanted.sha256 and not due:  # nothing tells whether the rest would belong to this
        start = 0
    headers = {"User-Agent": "zoo", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if mark:
            headers["If-Range"] = mark
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
        if answer.status != 206:
            start = 0
        elif _first_byte(answer.headers.get("Content-Range")) != start:
            raise http.client.HTTPException(f"asked for bytes from {start}, got {answer.headers.get('Content-Range')}")
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        if start and not mark and not wanted.sha256 and total != due:
            part.unlink()
            raise http.client.HTTPException(f"the file has become another: {total} bytes where it had {due}")
        marks = (answer.headers.get("ETag"), answer.headers.get("Last-Modified"))
        mark = next((one for one in marks if one and not one.startswith("W/")), None)
        if mark:
            validator.write_text(json.dumps({"url": url, "mark": mark}))
        else:
            validator.unlink(missing_ok=True)
        done = start
        advance(done, total)
        with part.open("ab" if start else "wb") as file:
            while chunk := answer.read1(CHUNK):  # what has come, so that a connection that stalls loses nothing
                file.write(chunk)
                done += len(chunk)
                advance(done, total)
    if total is not None and done < total:
        raise http.client.HTTPException(f"the connection ended after {done:,} of {total:,} bytes")


def _first_byte(content_range: str | None) -> int | None:
    """The first position that a ``Content-Range: bytes 10-99/100`` names."""
    first = (content_range or "").removeprefix("bytes").strip().partition("-")[0]
    return int(first) if first.isdigit() else None


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Advance]:
    """A rich progress bar on a terminal; elsewhere one line at the start."""
    if not sys.stderr.isatty():
        told = False

        def tell(done: int, total: int | None) -> None:
            nonlocal told
            if not told:
                size = f" ({total / 1e6:,.1f} MB)" if total else ""
                say(f"fetching {name}{size}{f' from byte {done:,}' if done else ''}")
            told = True

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# ---- records --------------------------------------------------------------------------------------------------------


def _read_record(target: Path) -> dict[str, str]:
    return read_json(_record(target))


def read_json(path: Path) -> dict[str, str]:
    """What a record says; nothing where it is missing, empty or spoilt."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in record.items() if isinstance(value, str)} if isinstance(record, dict) else {}


def _record(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _validator(target: Path) -> Path:
    """Where the server's mark of the version that ``.part`` belongs to is kept."""
    return target.with_name(f"{target.name}.part.json")


def _drop_part(target: Path) -> None:
    _part(target).unlink(missing_ok=True)
    _validator(target).unlink(missing_ok=True)


def _one_line(error: BaseException) -> str:
    reason = getattr(error, "reason", None)
    return " ".join(str(reason if isinstance(reason, Exception) else error).split()) or type(error).__name__


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")

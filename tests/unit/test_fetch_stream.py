"""Fetching a stream's data, from a local server that answers the few requests that the hub's client makes."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml

from mllm_keeplora.commands.fetch import main as fetch
from mllm_keeplora.commands.main import main
from mllm_keeplora.data import fetch_stream as fetching
from mllm_keeplora.data.fetch_stream import FetchError, fetch_stream, left_to_do, unpack
from mllm_keeplora.data.stream import Stream, StreamError, load_stream

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "somebody/birds"
CUT = 40_000  # a broken or stalling server gives this many bytes of a file


class Hub(ThreadingHTTPServer):
    """A hub with one dataset repository."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        # Or "dropping" (cuts a file once), "broken" (each time), "stalling" (stops there, no end), "gone".
        self.mode = "sound"
        self.ranges: list[str] = []
        self.downloads: list[str] = []

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Stays quiet."""

    def do_HEAD(self) -> None:
        """The same without a body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Repository, tree, or a file."""
        path = unquote(urlsplit(self.path).path)
        prefix = f"/datasets/{REPO}/resolve/{COMMIT}/"
        if self.server.mode == "gone" or REPO not in path:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith(f"/api/datasets/{REPO}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in self.server.files.items()
            ]
            self._answer(200, json.dumps(tree).encode())
        elif path == f"/api/datasets/{REPO}/revision/nowhere":
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"/api/datasets/{REPO}"):
            self._answer(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": []}).encode())
        else:
            self._send(path.removeprefix(prefix))

    def _send(self, name: str) -> None:
        data = self.server.files[name]
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-").split("-")[0]) if asked else 0
        tag = f'"{hashlib.sha1(data).hexdigest()}"'
        headers = {"ETag": tag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET":
            self.server.downloads.append(name)
            self.server.ranges += [asked] if asked else []
        first = self.server.downloads.count(name) == 1
        cut = self.server.mode in ("broken", "stalling") or (self.server.mode == "dropping" and first)
        whole = not cut or self.command == "HEAD" or len(data) <= CUT
        self._answer(206 if asked else 200, data[start:], headers, None if whole else max(0, CUT - start))

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, only: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if only is None else body[:only])
            self.wfile.flush()
        if only is not None:
            if self.server.mode == "stalling":
                threading.Event().wait(600)  # `online` leaves pauses of `time.sleep` out
            self.close_connection = True
            self.connection.close()


def zipped(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


NOISE = os.urandom(100_000)  # no compressor makes it smaller than CUT


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub(
        {
            "README.md": b"read me",
            "birds.tar.gz": tarred({"birds/train.json": b"[1]", "birds/images/0.png": NOISE}),
            "tools.zip": zipped({"train.json": b"[2]", "images/0.png": b"tool"}),  # no folder of its own
            "other/unwanted.bin": b"x",
            "lists/birds/test.json": b"[3]",
        }
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def online(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub's client in this process asks the local server; its pauses between attempts are left out."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is not a whole chunk is not kept
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return hub


def write_stream(tmp_path: Path, **hub: object) -> Path:
    tasks = [
        {"name": name, "train": f"{name}/train.json", "test": f"{name}/test.json", "media_root": name}
        for name in ("birds", "tools")
    ]
    stream: dict[str, Any] = {
        "name": "s",
        "data_root": str(tmp_path / "data"),
        "tasks": [{**task, "metric": "exact"} for task in tasks],
        "hub": {"repo_id": REPO, "files": ["birds*", "tools*", "lists/*"], **hub},
    }
    path = tmp_path / "stream.yaml"
    path.write_text(yaml.safe_dump(stream))
    return path


def load(tmp_path: Path, **hub: object) -> Stream:
    return load_stream(write_stream(tmp_path, **hub), check_files=False)


def test_the_named_files_are_fetched_and_archives_unpacked(online: Hub, tmp_path: Path) -> None:
    stream = load(tmp_path)
    fetched = fetch_stream(stream)
    root = tmp_path / "data"
    assert fetched.commit == COMMIT
    assert sorted(path.name for path in fetched.files) == ["birds.tar.gz", "test.json", "tools.zip"]
    assert (root / "birds/train.json").read_bytes() == b"[1]"
    assert (root / "birds/images/0.png").read_bytes() == NOISE
    assert (root / "tools/train.json").read_bytes() == b"[2]"  # gets the archive's name as its folder
    assert not (root / "other").exists()
    assert not (root / "README.md").exists()


def test_fetching_again_loads_and_unpacks_nothing(online: Hub, tmp_path: Path) -> None:
    stream = load(tmp_path)
    fetch_stream(stream)
    changed = tmp_path / "data/birds/train.json"
    changed.write_bytes(b"mine")
    online.downloads.clear()
    fetch_stream(stream)
    assert online.downloads == []
    assert changed.read_bytes() == b"mine"


def test_a_dropped_connection_is_continued_where_it_stopped(online: Hub, tmp_path: Path) -> None:
    online.mode = "dropping"
    fetch_stream(load(tmp_path))
    assert online.ranges == [f"bytes={CUT}-"]
    assert (tmp_path / "data/birds/images/0.png").read_bytes() == NOISE


def test_after_a_broken_download_only_what_is_missing_is_loaded(online: Hub, tmp_path: Path) -> None:
    stream = load(tmp_path)
    online.mode = "broken"
    with pytest.raises(FetchError, match=r"somebody/birds.*have arrived are kept.*run the same command again"):
        fetch_stream(stream)
    assert not (tmp_path / "data/birds").exists()
    online.mode = "sound"
    online.downloads.clear()
    fetch_stream(stream)
    assert online.downloads == ["birds.tar.gz"]
    assert (tmp_path / "data/birds/images/0.png").read_bytes() == NOISE


def test_a_killed_command_is_continued_by_the_same_command(
    online: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_stream(tmp_path)
    environment = {**os.environ, "HF_ENDPOINT": online.url, "HF_HUB_OFFLINE": "0"}
    arguments = ["fetch", str(path), "--data_root", str(tmp_path / "data")]
    online.mode = "stalling"
    command = [sys.executable, "-m", "mllm_keeplora.commands.main", *arguments]
    stalled = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    pause, deadline = threading.Event(), time.monotonic() + 300  # a busy machine imports slowly
    while not (partial := list(tmp_path.rglob("*.incomplete"))) and time.monotonic() < deadline:
        pause.wait(0.05)
    with pytest.raises(FetchError, match="another command is fetching"):
        fetch(arguments[1:])
    stalled.kill()
    stalled.wait()
    assert partial
    online.mode = "sound"
    assert main(arguments) == 1  # tools has no test.json
    assert not list(tmp_path.rglob("*.incomplete"))
    assert (tmp_path / "data/birds/images/0.png").read_bytes() == NOISE
    said = capsys.readouterr().out
    assert f"'revision: {COMMIT}' pins it" in said
    assert f"move it there from {tmp_path / 'data/lists/birds/test.json'}" in said
    assert f"{tmp_path / 'data/tools/test.json'} is missing" in said
    assert f"keeplora check {path} --data_root {tmp_path / 'data'}" in said


def test_nothing_is_left_to_do_where_all_is_there(
    online: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_stream(tmp_path, revision=COMMIT)
    for name in ("birds", "tools"):
        online.files[f"{name}/test.json"] = b"[]"
    assert main(["fetch", str(path)]) == 0
    assert left_to_do(load(tmp_path)) == []
    assert "pins it" not in capsys.readouterr().out


def test_what_other_places_have_is_named(tmp_path: Path) -> None:
    stream = load(tmp_path, elsewhere={"birds/images": "the zoo", "tools": "the shed"})
    lines = left_to_do(stream)
    assert any("birds/images is missing" in line and "the zoo" in line for line in lines)
    # Once, though records' pictures are relative to it as well.
    assert [line for line in lines if "data/tools is missing" in line] == [
        f"{tmp_path / 'data/tools'} is missing; the repository does not have it, get it from the shed"
    ]


@pytest.mark.parametrize("top", ["", "img", "img/all"])
def test_pictures_that_were_unpacked_to_another_folder_are_found(tmp_path: Path, top: str) -> None:
    stream = load_stream(write_stream(tmp_path), check_files=False)
    data, records = tmp_path / "data", tmp_path / "data/lists"
    stream = replace(
        stream,
        tasks=tuple(
            replace(task, train=f"lists/{task.name}.json", test=f"lists/{task.name}.json", media_root="pictures")
            for task in stream.tasks
        ),
    )
    records.mkdir(parents=True)
    record = {"question_id": 1, "image": "zoo/birds/0.png", "text": "Which bird?", "answer": "robin"}
    (records / "birds.json").write_text(json.dumps([record]))
    (records / "tools.json").write_text("cut")  # cannot be read, and does not stop the others
    assert left_to_do(stream) == [f"{data / 'pictures'} is missing"]
    lying = data / top / "zoo/birds/0.png"
    for path in (lying, data / "other/0.png"):
        path.parent.mkdir(parents=True)
        path.write_bytes(NOISE)
    assert left_to_do(stream) == [
        f"{data / 'pictures'} is missing; move the images or clips so that {lying} becomes "
        f"{data / 'pictures/zoo/birds/0.png'}, and the others likewise"
    ]
    lying.parents[1].rename(tmp_path / "zoo")
    (data / "pictures").mkdir()
    assert left_to_do(stream) == []


@pytest.mark.parametrize(
    "hub_entry, mode, message",
    [
        ({"files": ["fish*"]}, "sound", r"no file like fish\*; at its top there are README.md, birds.tar.gz"),
        ({"revision": "nowhere"}, "sound", "no such revision"),
        ({}, "gone", "no such dataset, or it is private"),
    ],
)
def test_a_wrong_entry_is_said(
    online: Hub, tmp_path: Path, hub_entry: dict[str, object], mode: str, message: str
) -> None:
    online.mode = mode
    with pytest.raises(FetchError, match=message):
        fetch_stream(load(tmp_path, **hub_entry))


def test_without_a_network_it_says_so(online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_stream(load(tmp_path))  # old data must not pass for an answer
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE forbids the hub; unset it"):
        fetch_stream(load(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FetchError, match="it cannot be read.*see to the network"):
        fetch_stream(load(tmp_path))


def test_a_full_disk_is_foreseen(online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = fetching.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FetchError, match=r"[\d.]+ kB are to be downloaded to .* has 1 kB free.*make room"):
        fetch_stream(load(tmp_path))
    assert online.downloads == []


def test_a_stream_without_a_hub_is_refused(tmp_path: Path) -> None:
    path = write_stream(tmp_path)
    stream = yaml.safe_load(path.read_text())
    del stream["hub"]
    path.write_text(yaml.safe_dump(stream))
    with pytest.raises(StreamError, match="names no 'hub'"):
        fetch_stream(load_stream(path, check_files=False))


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_an_interrupted_archive_is_unpacked_anew(tmp_path: Path, name: str) -> None:
    make = zipped if name.endswith(".zip") else tarred
    archive = tmp_path / name
    archive.write_bytes(make({"a/0": b"first", "a/1": b"second"}))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/0").write_bytes(b"fir")  # as an interruption leaves it
    unpack(archive)
    assert [(tmp_path / f"a/{n}").read_bytes() for n in (0, 1)] == [b"first", b"second"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_a_damaged_archive_is_named(tmp_path: Path, name: str) -> None:
    make = zipped if name.endswith(".zip") else tarred
    archive = tmp_path / name
    archive.write_bytes(make({"a/0": NOISE})[:60_000])
    with pytest.raises(FetchError, match=f"{name} is damaged .*delete it and run the same command again"):
        unpack(archive)
    assert not list(tmp_path.glob(".*.unpacked"))


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
@pytest.mark.parametrize("member", ["../out", "/tmp/out", "a/../../out"])
def test_no_archive_writes_outside(tmp_path: Path, name: str, member: str) -> None:
    make = zipped if name.endswith(".zip") else tarred
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(make({"a/0": b"x", member: b"y"}))
    with pytest.raises(FetchError, match="would be written outside"):
        unpack(folder / name)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [name]

"""Downloads from our own test server, which ignores ranges, breaks off, or sends the wrong file."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastmaml.tasks.download import ATTEMPTS, download_file

CONTENT = bytes(range(256)) * 2000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    content = CONTENT
    understands_range = True
    sends_at_most = len(CONTENT)  # bytes in one answer
    ranges: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        start = 0
        if wanted and self.server.understands_range:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
            if start >= len(self.server.content):
                self.send_error(416)
                return
        if self.path == "/missing":
            self.send_error(404)
            return
        rest = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.server.sends_at_most])

    def log_message(self, *_: object) -> None:
        """Keep the test output clean."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.ranges = []
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def url(server: Server, path: str = "/file.zip") -> str:
    return f"http://127.0.0.1:{server.server_port}{path}"


def test_a_download_appears_whole_and_says_so(server, tmp_path, capsys):
    target = tmp_path / "new" / "file.zip"
    download_file(url(server), target, MD5)
    assert target.read_bytes() == CONTENT and [p.name for p in target.parent.iterdir()] == ["file.zip"]
    assert "downloading file.zip 100 %" in capsys.readouterr().err


def test_an_earlier_part_is_resumed(server, tmp_path):
    (tmp_path / "file.zip.part").write_bytes(CONTENT[:1000])
    download_file(url(server), tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT and server.ranges == ["bytes=1000-"]


def test_a_whole_part_needs_no_more(server, tmp_path):
    (tmp_path / "file.zip.part").write_bytes(CONTENT)
    download_file(url(server), tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_a_server_that_cannot_resume_sends_it_all_again(server, tmp_path):
    server.understands_range = False
    (tmp_path / "file.zip.part").write_bytes(CONTENT[:1000])
    download_file(url(server), tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_a_connection_that_breaks_is_taken_up_again(server, tmp_path):
    server.sends_at_most = len(CONTENT) // 3 + 1
    download_file(url(server), tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT and len(server.ranges) == 3


def test_a_connection_that_keeps_breaking_fails_and_keeps_what_came(server, tmp_path):
    server.sends_at_most = 1000
    with pytest.raises(ConnectionError, match=f"the server stopped after {1000 * ATTEMPTS} of {len(CONTENT)} bytes"):
        download_file(url(server), tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip.part").read_bytes() == CONTENT[: 1000 * ATTEMPTS] and not (
        tmp_path / "file.zip"
    ).exists()


def test_a_missing_page_fails_at_once(server, tmp_path):
    with pytest.raises(ConnectionError, match="/missing failed .*Not Found"):
        download_file(url(server, "/missing"), tmp_path / "file.zip", MD5)
    assert len(server.ranges) == 1 and not list(tmp_path.iterdir())


def test_no_server_fails_in_one_sentence(tmp_path):
    with pytest.raises(ConnectionError, match="^downloading it from http://127.0.0.1:9/file.zip failed .*refused"):
        download_file("http://127.0.0.1:9/file.zip", tmp_path / "file.zip", MD5)


def test_the_wrong_file_is_refused_and_deleted(server, tmp_path):
    server.content = b"something else"
    with pytest.raises(ValueError, match=f"not the published {MD5}, and was deleted"):
        download_file(url(server), tmp_path / "file.zip", MD5)
    assert not list(tmp_path.iterdir())

"""Only segments are fetched, politely, and what is gone is listed: against a server on this machine."""

import json
import signal
import socket
import subprocess
import sys
import threading
import types
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from datasets_scripts import download as module
from datasets_scripts.clips import Segment
from datasets_scripts.decode import read_clip
from datasets_scripts.download import Media, Unavailable, YtDlp, download, main, read_segments
from tests.datasets_scripts.videos import lag, make_video, number

REPOSITORY = Path(__file__).resolve().parents[2]
A, B, C = "AAAAAAAAAAA", "BBBBBBBBBBB", "CCCCCCCCCCC"


class Handler(BaseHTTPRequestHandler):
    """Serves files with ranges, counts bytes, and fails as often as it is told."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        if server.failures > 0:
            server.failures -= 1
            self.send_error(503)
            return
        server.agents.add(self.headers.get("X-Test"))
        data = (server.folder / self.path.strip("/")).read_bytes()
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Connection", "close")
        self.send_header("Content-Length", str(len(data) - first))
        self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        try:
            for offset in range(first, len(data), 1 << 14):
                server.sent += self.wfile.write(data[offset : offset + (1 << 14)])
        except ConnectionError:
            self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.failures, server.sent, server.agents = folder, 0, 0, set()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()


def quick(waits=None):
    return {"wait": (waits if waits is not None else []).append, "progress": False}


@pytest.mark.parametrize("case", ["together", "apart", "webm"])
def test_a_segment_begins_and_ends_where_it_should(tmp_path, server, case):
    if case == "apart":
        times = make_video(server.folder / "v.mp4", 20, audio=None, options={"movflags": "faststart"})
        make_video(server.folder / "a.mp4", 20, video=None, options={"movflags": "faststart"})
        media = [Media(f"{server.url}/v.mp4"), Media(f"{server.url}/a.mp4", (("X-Test", "seen"),))]
    else:
        shape = {"video": "libvpx-vp9", "audio": "libopus", "rate": 48_000} if case == "webm" else {}
        name = "v.webm" if case == "webm" else "v.mp4"
        times = make_video(server.folder / name, 20, **shape)
        media = [Media(f"{server.url}/{name}", (("X-Test", "seen"),))]
    counts = download([Segment(A, 6.3, 11.3, ())], tmp_path / "out", lambda name: media, **quick())
    assert counts == {"downloaded": 1, "present": 0, "unavailable": 0, "failed": 0}
    assert "seen" in server.agents
    clip = read_clip(tmp_path / "out" / f"{A}_6.300.mp4", 0, 5, frames=5)
    assert np.abs(times[[number(image) for image in clip.frames]] - (6.3 + np.arange(5))).max() <= 0.0515
    assert abs(lag(clip.waveform, 6.3)) < 0.02
    assert abs(len(clip.waveform) / 16_000 - 5) < 0.1


def test_only_the_segment_is_fetched(tmp_path, server):
    path = server.folder / "v.mp4"
    make_video(path, 120, fps=1, video="mpeg4", audio="flac", layout="5.1")
    size = path.stat().st_size
    assert size > 8 << 20
    download([Segment(A, 60, 64, ())], tmp_path / "out", lambda name: [Media(f"{server.url}/v.mp4")], **quick())
    assert server.sent < size / 2  # the segment is a thirtieth; the buffers of sockets take more
    assert len(read_clip(tmp_path / "out" / f"{A}_60.000.mp4", frames=2).waveform) == pytest.approx(64_000, abs=800)


def test_faults_that_pass_are_tried_again(tmp_path, server):
    make_video(server.folder / "v.mp4", 3)
    waits = []
    server.failures = 2
    media = [Media(f"{server.url}/v.mp4")]
    counts = download([Segment(A, 1, 2, ())], tmp_path, lambda name: media, sleep=1, **quick(waits))
    assert counts["downloaded"] == 1
    assert 1 <= waits[0] <= 1.5 and 2 <= waits[1] <= 3  # then the pause between clips
    assert 0.5 <= waits[2] <= 1.5 and len(waits) == 3


def test_gone_videos_are_listed_and_not_asked_for_again(tmp_path, server):
    make_video(server.folder / "v.mp4", 3)
    asked = []

    def extract(name):
        asked.append(name)
        if name == A:
            raise Unavailable("Private video")
        if name == B:
            raise TimeoutError("slow")
        return [Media(f"{server.url}/v.mp4")]

    segments = [Segment(name, 0, 2, ()) for name in (A, B, C)]
    counts = download(segments, tmp_path, extract, attempts=2, **quick())
    assert counts == {"downloaded": 1, "present": 0, "unavailable": 1, "failed": 1}
    assert asked == [A, B, B, C]
    assert json.loads((tmp_path / "unavailable.jsonl").read_text()) == {"id": f"{A}_0.000", "reason": "Private video"}
    assert (tmp_path / "archive.txt").read_text() == f"{C}_0.000\n"
    asked.clear()
    with (tmp_path / "archive.txt").open("a") as file:
        file.write("half a li")  # as a kill may leave it
    counts = download(segments, tmp_path, extract, attempts=1, **quick())
    assert counts == {"downloaded": 0, "present": 1, "unavailable": 1, "failed": 1} and asked == [B]
    assert (tmp_path / "archive.txt").read_text() == f"{C}_0.000\n"
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == [f"{C}_0.000.mp4"]
    assert not list(tmp_path.glob(".*"))


def test_a_site_that_blocks_ends_the_run(tmp_path):
    def extract(name):
        raise OSError("HTTP Error 429: Too Many Requests")

    segments = [Segment(f"AAAAAAAAA{i:02d}", 0, 2, ()) for i in range(50)]
    with pytest.raises(RuntimeError, match="20 clips in a row failed, last AAAAAAAAA19"):
        download(segments, tmp_path, extract, attempts=1, **quick())


@pytest.mark.parametrize(("start", "end"), [(30, 40), (3, 4)])
def test_a_segment_that_is_not_there_leaves_nothing(tmp_path, server, start, end):
    make_video(server.folder / "v.mp4", 3)
    media = [Media(f"{server.url}/v.mp4")]
    assert download([Segment(A, start, end, ())], tmp_path, lambda name: media, attempts=1, **quick())["failed"] == 1
    assert [path.name for path in tmp_path.iterdir() if path.name != "site"] == []


def test_names_that_lead_elsewhere_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is no YouTube id"):
        download([Segment("../../../x/", 0, 1, ())], tmp_path, lambda name: [], **quick())


KILLED = """
import os, signal, sys
from datasets_scripts import download
from datasets_scripts.clips import Segment
replace = download.Path.replace
def dying(self, target):
    if len(list(target.parent.glob("[!.]*.mp4"))) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
download.Path.replace = dying
media = [download.Media(sys.argv[1])]
segments = [Segment(f"AAAAAAAAAA{i}", 0, 2, ()) for i in range(4)]
download.download(segments, sys.argv[2], lambda name: media, wait=lambda seconds: None, progress=False)
"""


def test_a_killed_run_goes_on(tmp_path, server):
    make_video(server.folder / "v.mp4", 3)
    output = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, f"{server.url}/v.mp4", str(output)]
    assert subprocess.run(command, cwd=REPOSITORY).returncode == -signal.SIGKILL
    segments = [Segment(f"AAAAAAAAAA{i}", 0, 2, ()) for i in range(4)]
    counts = download(segments, output, lambda name: [Media(f"{server.url}/v.mp4")], **quick())
    assert counts == {"downloaded": 2, "present": 2, "unavailable": 0, "failed": 0}
    names = [f"AAAAAAAAAA{i}_0.000.mp4" for i in range(4)]
    assert sorted(path.name for path in output.iterdir()) == [*names, "archive.txt"]


def test_tables(tmp_path):
    (tmp_path / "a.csv").write_text('# x\nAAAAAAAAAAA, 1.000, 3.000, "/m/1,/m/2"\n')
    assert read_segments("audioset", tmp_path / "a.csv") == [Segment(A, 1, 3, ())]
    rows = "".join(f"{i},{B},30,caption {i}\n" for i in range(5))
    (tmp_path / "b.csv").write_text("audiocap_id,youtube_id,start_time,caption\n" + rows)
    assert read_segments("audiocaps", tmp_path / "b.csv") == [Segment(B, 30, 40, ())]
    (tmp_path / "c.csv").write_text(f"{C},7,dog barking,test\n")
    assert read_segments("vggsound", tmp_path / "c.csv") == [Segment(C, 7, 17, ())]
    with pytest.raises(ValueError, match=r"a\.csv, line 2"):
        (tmp_path / "a.csv").write_text("# x\nAAAAAAAAAAA, 1.000\n")
        read_segments("audioset", tmp_path / "a.csv")
    with pytest.raises(ValueError, match="none of"):
        read_segments("clotho", tmp_path / "a.csv")


class Client:
    """What yt-dlp's client does, offline."""

    url = ""

    def __init__(self, options):
        self.options = options

    def extract_info(self, url, download):
        assert not download
        if A in url:
            raise yt_dlp.utils.DownloadError(
                "ERROR: [youtube] AAAAAAAAAAA: Private video. Sign in if you've been granted access"
            )
        if B in url:
            raise yt_dlp.utils.DownloadError("ERROR: [youtube] B: Sign in to confirm you're not a bot")
        return {"requested_formats": [{"url": self.url, "http_headers": {"X-Test": "stub"}}, {"url": self.url}]}


yt_dlp = types.ModuleType("yt_dlp")
yt_dlp.YoutubeDL = Client
yt_dlp.utils = types.SimpleNamespace(DownloadError=type("DownloadError", (Exception,), {}))


def test_the_command_line(tmp_path, server, monkeypatch, capsys):
    make_video(server.folder / "v.mp4", 12, fps=2, video="mpeg4")
    monkeypatch.setitem(sys.modules, "yt_dlp", yt_dlp)
    monkeypatch.setattr(Client, "url", f"{server.url}/v.mp4")
    monkeypatch.setattr(module, "download", partial(download, wait=lambda seconds: None))
    (tmp_path / "c.csv").write_text("".join(f"{name},1,dog barking,test\n" for name in (A, B, C)))
    arguments = ["vggsound", str(tmp_path / "c.csv"), "--output", str(tmp_path / "out"), "--quiet"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == "1 downloaded, 0 present, 1 unavailable, 1 failed\n"
    assert "not a bot" in captured.err and "stub" in server.agents
    assert read_clip(tmp_path / "out" / f"{C}_1.000.mp4", 0, 10).frame_times[0] < 0.3
    monkeypatch.setitem(sys.modules, "yt_dlp", None)
    assert main(arguments) == 1
    assert "pip install 'dali-audio[download]'" in capsys.readouterr().err


def test_the_options_are_yt_dlps():
    real = pytest.importorskip("yt_dlp")
    client = YtDlp()._client
    assert isinstance(client, real.YoutubeDL)

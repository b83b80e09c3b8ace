"""What the child processes of the tests are told to do; importable by name, as they must be."""

import os
import signal
import time

from datasets_scripts.records import failure


def misbehave(what):
    """Does what a hostile file may make a decoder do."""
    if what == "hang":
        while True:
            time.sleep(1)
    if what == "spin":
        while True:
            pass
    if what == "eat":
        return len(bytearray(8 << 30))
    if what == "crash":
        os.abort()
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise ValueError("of this item")
    return what


def small_record(item):
    """A record without a video, for what does not depend on one."""
    request, _ = item
    if request.id.endswith("7"):
        return {"file": None, **failure(request.id, "silent", "")}
    data = request.id.encode() * 100
    return {
        "file": None,
        "id": request.id,
        "audio": {"bytes": data, "path": None},
        "frames": [{"bytes": data, "path": None}],
        "frame_times": [0.0],
        "labels": list(request.labels),
        "source": "",
        "start": 0.0,
        "duration": 1.0,
    }


def by_start(rows):
    """A score."""
    return [row["start"] for row in rows]

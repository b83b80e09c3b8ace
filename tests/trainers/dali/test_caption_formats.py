"""Formats of captions, read back by what others use: FFmpeg for subtitles, csv, json, an HTML parser."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.dali.caption_formats import Line, chosen_format, distinct_names, write_captions

LINES = [
    Line("a/bell.wav", 0.0, 10.24, "a bell rings"),
    Line("a/bell.wav", 10.24, 20.48, "a dog barks <loudly> & often --> then stops"),
    Line("b/broken.wav", error="b/broken.wav: holds no sound"),
]


def cues(path: Path) -> list[tuple[float, float, str]]:
    """Start, end and text of each cue, as FFmpeg reads them."""
    found = []
    with av.open(str(path)) as file:
        for packet in file.demux(subtitles=0):
            if packet.size:
                start = float(packet.pts * packet.time_base)
                end = start + float(packet.duration * packet.time_base)
                found.append((start, end, bytes(packet).decode()))
    return found


@pytest.mark.parametrize("kind", ["srt", "vtt"])
def test_ffmpeg_reads_the_subtitles(kind, tmp_path):
    (path,) = write_captions(LINES[:2], str(tmp_path / f"bell.{kind}"), kind)
    found = cues(path)
    assert [(start, end) for start, end, _ in found] == [(0.0, 10.24), (10.24, 20.48)]
    assert found[0][2].strip() == "a bell rings"
    assert "-->" not in found[1][2]


@pytest.mark.parametrize("kind", ["srt", "vtt"])
@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=30), min_size=1, max_size=4)
)
def test_no_caption_breaks_the_subtitles(kind, texts, tmp_path_factory):
    lines = [Line("x.wav", number, number + 0.5, text.strip() or "rain") for number, text in enumerate(texts)]
    (path,) = write_captions(lines, str(tmp_path_factory.mktemp("cues") / f"x.{kind}"), kind)
    assert [start for start, _, _ in cues(path)] == list(range(len(lines)))


def test_long_sounds_have_hours(tmp_path):
    (path,) = write_captions([Line("x.wav", 3661.5, 3671.25, "rain")], str(tmp_path / "x.srt"), "srt")
    assert "01:01:01,500 --> 01:01:11,250" in path.read_text()


def test_subtitles_of_several_files_need_a_folder(tmp_path):
    lines = [Line("a/x.wav", 0, 1, "rain"), Line("b/x.mp4", 0, 1, "wind")]
    with pytest.raises(ValueError, match="folder"):
        write_captions(lines, str(tmp_path / "all.srt"), "srt")
    written = write_captions(lines, str(tmp_path / "subtitles"), "srt")
    assert [path.name for path in written] == ["a_x.srt", "b_x.srt"]
    assert "wind" in written[1].read_text()


def test_csv_holds_everything(tmp_path):
    (path,) = write_captions(LINES, str(tmp_path / "x.csv"), "csv")
    rows = list(csv.DictReader(path.open(newline="")))
    assert [row["caption"] for row in rows] == [line.caption for line in LINES]
    assert rows[2]["error"] == LINES[2].error and float(rows[1]["end"]) == 20.48


def test_json_lines_hold_everything(tmp_path):
    (path,) = write_captions(LINES, str(tmp_path / "x.jsonl"), "jsonl")
    first, _, last = map(json.loads, path.read_text().split("\n")[:-1])
    assert first == {"file": "a/bell.wav", "start": 0.0, "end": 10.24, "caption": "a bell rings"}
    assert last == {"file": "b/broken.wav", "error": LINES[2].error}


def test_the_page_links_its_sounds_and_escapes_captions(tmp_path):
    class Reader(HTMLParser):
        sources, text = (), ""

        def handle_starttag(self, tag, attributes):
            if tag in ("audio", "video"):
                self.sources += (dict(attributes)["src"],)

        def handle_data(self, data):
            self.text += data

    sound = tmp_path / "sounds" / "a bell.wav"
    lines = [Line(str(sound), 0, 1, "a <b>bell</b> & a dog"), Line("https://host/x.mp4", 0, 1, "rain")]
    (path,) = write_captions(lines, str(tmp_path / "pages" / "x.html"), "html")
    reader = Reader()
    reader.feed(path.read_text())
    assert reader.sources == ("../sounds/a%20bell.wav", "https://host/x.mp4")
    assert "a <b>bell</b> & a dog" in reader.text


@given(st.lists(st.sampled_from(["a/x.wav", "b/x.wav", "x.wav", "x.mp4", "/a/x.wav", "c/a/x.wav"]), unique=True))
def test_no_two_files_share_a_name(files):
    names = distinct_names(files)
    assert len(set(names.values())) == len(files)
    assert all("/" not in name and name for name in names.values())


def test_the_suffix_says_the_format():
    assert chosen_format("x.vtt", None) == "vtt" and chosen_format(None, None) == "text"
    assert chosen_format("x.out", "csv") == "csv"
    with pytest.raises(ValueError, match=r"\.srt"):
        chosen_format("x.doc", None)

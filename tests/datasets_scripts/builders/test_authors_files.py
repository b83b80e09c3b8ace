"""The files that the authors of VIP-ANT, CAV-MAE and DALI release, in their formats."""

import json
import logging
from pathlib import Path

import pytest

from datasets_scripts.build import build
from datasets_scripts.builders.cav_mae import cav_mae
from datasets_scripts.builders.llava_chat import llava_chat
from datasets_scripts.builders.tables import find_moved
from datasets_scripts.builders.vipant_index import vipant_index
from tests.datasets_scripts.builders.test_builders import touch, write


def clip(name: str, **fields) -> dict:
    return {
        "dir": "all_0_35000",
        "aclip": ["p0.mp3"],
        "frame": [f"p0.4_0{i}.jpg" for i in range(1, 5)],
        "aclip_128": "p0.npz",
        "frame_224": "p0.npz",
        "id": name,
        "bos": "130.000",
        "eos": "140.000",
        "labels": ["/m/09x0r", "/m/012xff"],
    } | fields


def test_vipant_index(tmp_path, caplog):
    clips = [clip("vfY_TJq7n_U", captions=["Ducks quack", "A man speaks"]), clip("aaaaaaaaaaa"), clip("bbbbbbbbbbb")]
    clips[1] = {name: value for name, value in clips[1].items() if name != "aclip"} | {"clip": ["p0.mp3"], "dir": ""}
    index = write(tmp_path / "src_audiocaps_val.csv", *map(json.dumps, clips))
    media = tmp_path / "audioset"
    touch(media / "all_0_35000" / "aclip" / "vfY_TJq7n_U.p0.mp3")
    touch(media / "clip" / "aaaaaaaaaaa.p0.mp3")
    for i in (1, 2, 4):
        touch(media / "all_0_35000" / "frame" / f"vfY_TJq7n_U.p0.4_0{i}.jpg")
    with caplog.at_level(logging.WARNING):
        dataset = vipant_index(index, media)
    assert "1 of 3 listed clips are not in" in caplog.text
    first, second = dataset
    assert first["id"] == "vfY_TJq7n_U_130.000" and (first["start"], first["end"]) == (130.0, 140.0)
    assert first["captions"] == ["Ducks quack", "A man speaks"] and second["captions"] == []
    assert [Path(frame["path"]).name[-5:] for frame in first["frames"]] == ["1.jpg", "2.jpg", "4.jpg"]
    assert second["audio"]["path"].endswith("clip/aaaaaaaaaaa.p0.mp3") and second["frames"] == []
    assert first["labels"] == first["label_ids"] == ["/m/09x0r", "/m/012xff"] and dataset.split == "src_audiocaps_val"


@pytest.mark.parametrize("wrong", [{"bos": "soon"}, {"aclip": []}, {"id": 3}, {"frame": None}])
def test_vipant_index_names_the_first_wrong_line(tmp_path, wrong):
    index = write(tmp_path / "index.csv", json.dumps(clip("aaaaaaaaaaa")), json.dumps(clip("b") | wrong))
    with pytest.raises(ValueError, match=r"index\.csv, line 2: is no clip of VIP-ANT's index"):
        vipant_index(index, tmp_path)


def cav_list(folder: Path, root: str, names: list[str]) -> Path:
    clips = [
        {
            "video_id": name,
            "wav": f"{root}/audio/{name}.flac",
            "video_path": f"{root}/frames/",
            "labels": "/m/1,/m/a",
        }
        for name in names
    ]
    return write(folder / "list.json", json.dumps({"data": clips}))


@pytest.mark.parametrize("moved", [False, True])
def test_cav_mae(tmp_path, moved, caplog):
    media = tmp_path / "media"
    table = cav_list(tmp_path, "/data/of/others" if moved else str(media), ["--4gqARaEJE", "-0nqfRcnAYE"])
    touch(media / "audio" / "--4gqARaEJE.flac")
    for i in (9, 0, 3):
        touch(media / "frames" / f"frame_{i}" / "--4gqARaEJE.jpg")
    with caplog.at_level(logging.WARNING):
        dataset = cav_mae(table, media if moved else None)
    assert "1 of 2 listed clips" in caplog.text and dataset["id"] == ["--4gqARaEJE"]
    frames = [Path(frame["path"]).parent.name for frame in dataset[0]["frames"]]
    assert frames == ["frame_0", "frame_3", "frame_9"]
    assert dataset[0]["label_ids"] == ["/m/1", "/m/a"]


def test_cav_mae_lists_are_checked(tmp_path):
    with pytest.raises(ValueError, match="no list of CAV-MAE"):
        cav_mae(write(tmp_path / "list.json", "[]"))
    table = write(tmp_path / "list.json", json.dumps({"data": [{"video_id": "a", "wav": "a.wav"}]}))
    with pytest.raises(ValueError, match=r"clip 1: it lacks, or does not know, KeyError\('video_path'\)"):
        cav_mae(table)


def chat(name: str, answer: str, **files) -> dict:
    turns = [{"from": "human", "value": "<image>\nDescribe the sound."}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, "sim": 0.8} | files


def test_llava_chat_of_pictures(tmp_path):
    """As `prefixDS.json`: 16 pairs with paths of the authors' machine, and sounds that nobody needs in stage 1a."""
    chats = [
        chat(f"id{i}", f"A dog barks {i}", image=f"/tsi/data/frame_5/id{i}.jpg", audio=f"/tsi/wav/id{i}.wav")
        for i in range(16)
    ]
    table = write(tmp_path / "prefixDS.json", json.dumps(chats))
    for i in range(16):
        touch(tmp_path / "frames" / "frame_5" / f"id{i}.jpg")
    touch(tmp_path / "frames" / "id3.wav")
    dataset = build("llava_chat", tmp_path / "built", table=table, media=tmp_path / "frames")
    assert len(dataset) == 16 and dataset[7]["captions"] == ["A dog barks 7"]
    assert dataset[3]["audio"]["path"].endswith("id3.wav") and dataset[4]["audio"] is None
    assert dataset[4]["image"]["path"].endswith("frame_5/id4.jpg")


def test_llava_chat_of_sounds(tmp_path, caplog):
    chats = [chat("a", "Rain", audio=str(touch(tmp_path / "a.wav"))), chat("b", "Wind", audio="/nowhere/b.wav")]
    with caplog.at_level(logging.WARNING):
        dataset = llava_chat(write(tmp_path / "chats.json", json.dumps(chats)))
    assert "1 of 2 listed clips" in caplog.text
    assert dataset["id"] == ["a"] and dataset[0]["image"] is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"id": "a"}, "entry 2: expected an id, and one question with one answer"),
        (chat("a", "b"), "entry 2: it has neither image nor audio"),
    ],
)
def test_llava_chat_names_the_first_wrong_entry(tmp_path, wrong, message):
    good = chat("x", "Rain", audio=str(touch(tmp_path / "a.wav")))
    with pytest.raises(ValueError, match=message):
        llava_chat(write(tmp_path / "chats.json", json.dumps([good, wrong])))


def test_moved_files_are_found_by_the_longest_end_of_their_path(tmp_path):
    near, far = touch(tmp_path / "frame_5" / "a.jpg"), touch(tmp_path / "a.jpg")
    assert find_moved("/old/frame_5/a.jpg", tmp_path) == str(near)
    assert find_moved("/old/frame_4/a.jpg", tmp_path) == str(far)
    assert find_moved("frame_5/a.jpg", tmp_path) == str(near)
    assert find_moved("/old/b.jpg", tmp_path) is None
    assert find_moved(str(far), None) == str(far) and find_moved("/old/a.jpg", None) is None

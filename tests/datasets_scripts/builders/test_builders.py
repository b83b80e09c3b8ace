"""Builders read the official formats, name the first wrong line, and say what is missing."""

import json
import logging
import shutil

import numpy as np
import pytest
import soundfile
from PIL import Image

from datasets_scripts.builders.audiocaps import audiocaps
from datasets_scripts.builders.audioset import audioset, label_names
from datasets_scripts.builders.audiotxt import audiotxt
from datasets_scripts.builders.av_folder import av_folder
from datasets_scripts.builders.clotho import clotho
from datasets_scripts.builders.esc50 import esc50
from datasets_scripts.builders.urbansound8k import urbansound8k
from datasets_scripts.builders.vggsound import vggsound
from datasets_scripts.check import check
from datasets_scripts.check import main as check_main
from datasets_scripts.prepare import main as prepare_main
from tests.datasets_scripts.videos import make_video


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"RIFF")
    return path


INDEX = (
    "# Segments csv created Sun Mar  5 10:54:31 2017",
    "# num_ytids=3, num_segs=3, num_unique_labels=3, num_positive_labels=4",
    "# YTID, start_seconds, end_seconds, positive_labels",
    '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"',
    '--ZhevVpy1s, 50.000, 60.000, "/m/012xff"',
    '--aE2O5G5WE, 0.000, 10.000, "/m/09x0r"',
)


@pytest.fixture
def labels(tmp_path):
    lines = ["index,mid,display_name", "0,/m/09x0r,Speech", '1,/t/dd00088,"Gush, spurt"', "2,/m/012xff,Toothbrush"]
    return write(tmp_path / "class_labels_indices.csv", *lines)


def test_audioset(tmp_path, labels, caplog):
    index = write(tmp_path / "eval_segments.csv", *INDEX)
    touch(tmp_path / "media" / "--PJHxphWEs_30.000.flac")
    touch(tmp_path / "media" / "--aE2O5G5WE_000000.mp4")
    with caplog.at_level(logging.WARNING):
        dataset = audioset(index, tmp_path / "media", labels)
    assert "1 of 3 listed clips are not in" in caplog.text
    assert dataset["id"] == ["--PJHxphWEs_30.000", "--aE2O5G5WE_0.000"]
    assert dataset[0]["labels"] == ["Speech", "Gush, spurt"]
    assert dataset[0]["label_ids"] == ["/m/09x0r", "/t/dd00088"]
    assert dataset[1]["audio"]["path"].endswith("000000.mp4")
    assert dataset.split == "eval" and "527" in dataset.info.description
    ontology = [{"id": "/m/09x0r", "name": "Speech"}, {"id": "/t/dd00088", "name": "Gush"}]
    (tmp_path / "ontology.json").write_text(json.dumps(ontology))
    assert label_names(tmp_path / "ontology.json") == {"/m/09x0r": "Speech", "/t/dd00088": "Gush"}
    with pytest.raises(ValueError, match=r"line 5: .*does not know the label '/m/012xff'"):
        audioset(index, tmp_path / "media", tmp_path / "ontology.json")
    with pytest.raises(FileNotFoundError, match="3 of 3"):
        audioset(index, tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../../etc/x, 0.000, 10.000, /m/09x0r", r"line 5: .* is no YouTube id"),
        ("--ZhevVpy1s, 50.000, 40.000, /m/012xff", "line 5: the segment ends at 40 s"),
        ("--ZhevVpy1s, x, 40.000, /m/012xff", "line 5: 'x' is no time"),
        ("--ZhevVpy1s, nan, 40.000, /m/012xff", "line 5: 'nan' is no time"),
        ("--ZhevVpy1s, 50.000, 60.000", "line 5: expected YTID, .* 3 fields"),
        ("# gone", "has 2 clips, its header says 3"),
    ],
)
def test_audioset_names_the_first_wrong_line(tmp_path, line, message):
    index = write(tmp_path / "eval_segments.csv", *INDEX[:4], line, INDEX[5])
    touch(tmp_path / "--PJHxphWEs_30.000.flac")
    with pytest.raises(ValueError, match=message):
        audioset(index, tmp_path)


def test_audiocaps(tmp_path):
    lines = [f'{i},--PJHxphWEs,30,"A dog barks, {i} times"' for i in range(5)] + ["9,--ZhevVpy1s,50,Water runs"]
    table = write(tmp_path / "test.csv", "audiocap_id,youtube_id,start_time,caption", *lines)
    touch(tmp_path / "--PJHxphWEs.wav")
    dataset = audiocaps(table, tmp_path)
    assert dataset["id"] == ["--PJHxphWEs_30.000"]
    assert dataset[0]["captions"] == [f"A dog barks, {i} times" for i in range(5)]
    write(table, "audiocap_id,youtube_id,start_time,caption", *lines, "9,--ZhevVpy1s,50,Water")
    with pytest.raises(ValueError, match="line 8: the audiocap_id 9 occurs twice"):
        audiocaps(table, tmp_path)
    write(table, "audiocap_id,youtube_id,start_time,caption", "1,--PJHxphWEs,30,")
    with pytest.raises(ValueError, match=r"test\.csv, line 2: caption: is empty"):
        audiocaps(table, tmp_path)
    write(table, "id,caption", "1,x")
    with pytest.raises(ValueError, match="line 1: there is no column audiocap_id, youtube_id, start_time"):
        audiocaps(table, tmp_path)


def test_captions_join_prepared_clips(tmp_path):
    (tmp_path / "videos").mkdir()
    for name in ("--PJHxphWEs_30.000", "--ZhevVpy1s_50.000", "AAAAAAAAAAA_0.000"):
        make_video(tmp_path / "videos" / f"{name}.mp4", 1, video="mpeg4")
    prepare_main([str(tmp_path / "videos"), "--output", str(tmp_path / "shards"), "--frames", "2", "--quiet"])
    lines = ["1,--ZhevVpy1s,50,Water runs", "2,--ZhevVpy1s,50,A tap is open", "3,GoneGoneGon,0,Nothing"]
    table = write(tmp_path / "val.csv", "audiocap_id,youtube_id,start_time,caption", *lines)
    dataset = audiocaps(table, tmp_path / "shards")
    assert dataset["id"] == ["--ZhevVpy1s_50.000"]
    assert dataset[0]["captions"] == ["Water runs", "A tap is open"]
    assert dataset[0]["audio"]["bytes"][:4] == b"fLaC" and len(dataset[0]["frames"]) == 2
    index = write(tmp_path / "index.jsonl", '["--ZhevVpy1s.p0.2_1", [7, 8]]', '["--ZhevVpy1s.p0.2_2", [9, 7]]')
    captions = write(tmp_path / "captions.jsonl", '[7, "seven"]', '[8, "eight"]', '[9, "nine"]')
    curated = audiotxt(index, captions, tmp_path / "shards")
    assert curated["id"] == ["--ZhevVpy1s_50.000"] and curated[0]["captions"] == ["seven", "nine", "eight"]
    assert audiotxt(index, captions, tmp_path / "videos")[0]["audio"]["path"].endswith("--ZhevVpy1s_50.000.mp4")
    reports = check("audiocaps", tmp_path, tmp_path / "shards")
    assert [report.missing for report in reports] == [["GoneGoneGon_0.000"]]
    assert check("shards", tmp_path / "shards")[0].complete
    shard = tmp_path / "shards" / "shards" / "shard-000000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert check("shards", tmp_path / "shards")[0].damaged == ["shards/shard-000000.parquet"]


@pytest.mark.parametrize(
    ("index", "captions", "message"),
    [
        ('["a.p0.2_1", [5]]', '[7, "seven"]', r"index\.jsonl, line 1: .* has no caption 5"),
        ('["a", [7]]', '[7, "seven"]', r"index\.jsonl, line 1: expected"),
        ('["../a.p0.2_1", [7]]', '[7, "seven"]', r"index\.jsonl, line 1: expected"),
        ('["a.p0.2_1", [7]]', '[7, "seven"]\n[7, "again"]', r"captions\.jsonl, line 2: expected"),
        ("nonsense", '[7, "seven"]', r"index\.jsonl, line 1: is not JSON"),
    ],
)
def test_audiotxt_names_the_first_wrong_line(tmp_path, index, captions, message):
    with pytest.raises(ValueError, match=message):
        audiotxt(write(tmp_path / "index.jsonl", index), write(tmp_path / "captions.jsonl", captions), tmp_path)


def test_clotho(tmp_path):
    header = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5"
    lines = ["rain 1.wav,a,b,c,d,e", '"dog, far.wav",f,g,h,i,j']
    table = write(tmp_path / "clotho_captions_evaluation.csv", header, *lines)
    touch(tmp_path / "evaluation" / "rain 1.wav")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 clips of clotho .* first 'dog, far'"):
        clotho(tmp_path)
    touch(tmp_path / "evaluation" / "dog, far.wav")
    dataset = clotho(tmp_path)
    assert dataset[1]["id"] == "dog, far" and dataset[1]["captions"] == list("fghij")
    with pytest.raises(ValueError, match="split must be one of"):
        clotho(tmp_path, "test")
    write(table, header, "../x.wav,a,b,c,d,e")
    with pytest.raises(ValueError, match=r"line 2: file_name: '\.\./x\.wav' is not the name of a file"):
        clotho(tmp_path)
    write(table, header, "x.wav,a,b,c,d")
    with pytest.raises(ValueError, match="line 2: expected 6 fields, found 5"):
        clotho(tmp_path)


def test_vggsound(tmp_path):
    lines = ["---g-f_I2yQ,1,people marching,test", '--0PQM4-hqg,30,"waterfall burbling, far",train']
    table = write(tmp_path / "vggsound.csv", *lines)
    touch(tmp_path / "---g-f_I2yQ_000001.mp4")
    touch(tmp_path / "--0PQM4-hqg_30_40.mp4")
    dataset = vggsound(table, tmp_path)
    assert dataset["id"] == ["---g-f_I2yQ_1.000"] and dataset[0]["labels"] == ["people marching"]
    assert vggsound(table, tmp_path, "train")[0]["labels"] == ["waterfall burbling, far"]
    write(table, *lines, "--0PQM4-hqg,30,x,validation")
    with pytest.raises(ValueError, match="line 3: split: split must be train or test"):
        vggsound(table, tmp_path)


def test_esc50(tmp_path, capsys):
    header = "filename,fold,target,category,esc10,src_file,take"
    names = [f"{fold}-{100 + target}-A-{target}.wav" for fold in (1, 2) for target in (0, 36)]
    lines = [f"{name},{name[0]},{name.split('-')[3][:-4]},class_{i % 2},False,1,A" for i, name in enumerate(names)]
    table = write(tmp_path / "meta" / "esc50.csv", header, *lines)
    for name in names:
        touch(tmp_path / "audio" / name)
    dataset = esc50(tmp_path)
    assert dataset["fold"] == [1, 1, 2, 2] and dataset["target"] == [0, 36, 0, 36]
    assert dataset[1]["labels"] == ["class_1"]
    (tmp_path / "audio" / names[2]).unlink()
    assert check_main(["esc50", str(tmp_path), "--output", str(tmp_path / "report.json")]) == 2
    assert "3 of 2000 clips are there" in (output := capsys.readouterr().out) and "2-100-A-0" in output
    assert json.loads((tmp_path / "report.json").read_text())[0]["missing"] == ["2-100-A-0"]
    write(table, header, "1-100-A-0.wav,2,0,dog,True,1,A")
    with pytest.raises(ValueError, match=r"line 2: 1-100-A-0.wav is of fold 1"):
        esc50(tmp_path)
    write(table, header, "6-100-A-0.wav,6,0,dog,True,1,A")
    with pytest.raises(ValueError, match=r"line 2: .* is not like FOLD-CLIP-TAKE-TARGET"):
        esc50(tmp_path)
    assert check_main(["esc50", str(tmp_path / "none")]) == 1
    assert "get them from https" in capsys.readouterr().err
    assert check_main(["esc51", str(tmp_path)]) == 1


def test_urbansound8k(tmp_path):
    header = "slice_file_name,fsID,start,end,salience,fold,classID,class"
    lines = ["100032-3-0-0.wav,100032,0.0,0.317551,1,5,3,dog_bark", "7061-6-0-0.wav,7061,0,3,1,10,6,gun_shot"]
    table = write(tmp_path / "metadata" / "UrbanSound8K.csv", header, *lines)
    touch(tmp_path / "audio" / "fold5" / "100032-3-0-0.wav")
    touch(tmp_path / "audio" / "fold10" / "7061-6-0-0.wav")
    dataset = urbansound8k(tmp_path)
    assert dataset["fold"] == [5, 10] and dataset["labels"] == [["dog_bark"], ["gun_shot"]]
    write(table, header, lines[0].replace(",3,dog", ",4,dog"))
    with pytest.raises(ValueError, match=r"line 2: .* is of target 3 by its name, not 4"):
        urbansound8k(tmp_path)


def test_av_folder(tmp_path):
    soundfile.write(tmp_path / "bell.ogg", np.zeros(1000), 16_000)
    Image.new("RGB", (8, 8)).save(tmp_path / "bell.png")
    soundfile.write(tmp_path / "rain.flac", np.zeros(1000), 16_000)
    (tmp_path / "rain").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "rain" / f"{i}.jpg")
    write(tmp_path / "captions.csv", "name,caption", "bell,A bell rings.", "bell.ogg,It rings.")
    dataset = av_folder(tmp_path)
    assert dataset["id"] == ["bell", "rain"]
    assert dataset[0]["captions"] == ["A bell rings.", "It rings."] and dataset[1]["captions"] == []
    assert [len(row["frames"]) for row in dataset] == [1, 3]
    write(tmp_path / "captions.csv", "name,caption", "bell,A bell rings.", "drum,It drums.")
    with pytest.raises(ValueError, match="line 3: there is no file 'drum'"):
        av_folder(tmp_path)
    (tmp_path / "captions.csv").unlink()
    shutil.copy(tmp_path / "bell.ogg", tmp_path / "rain.ogg")
    with pytest.raises(ValueError, match="have one name"):
        av_folder(tmp_path)
    (tmp_path / "videos").mkdir()
    touch(tmp_path / "videos" / "a.mp4")
    with pytest.raises(ValueError, match="prepare"):
        av_folder(tmp_path / "videos")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no sound"):
        av_folder(tmp_path / "empty")


def test_av_folder_of_real_stamps(shared_data):
    dataset = av_folder(shared_data / "stamps")
    assert len(dataset) > 20 and all(row["captions"] for row in dataset)
    assert sum(len(row["frames"]) == 1 for row in dataset) > 20

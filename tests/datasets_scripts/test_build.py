"""Data sets are saved for the trainers by one command."""

import re

import datasets
import numpy as np
import pytest
import soundfile

from datasets_scripts.build import BUILDERS, builder, main


@pytest.fixture
def table(tmp_path):
    for name in ("bell", "rain"):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(800), 16_000)
    (tmp_path / "clips.csv").write_text(
        "number,file,text,kind\n1,bell.wav,A bell rings.,bell\n2,bell.wav,It rings.,bell\n"
        '3,rain.wav,"Rain, falling",rain\n4,gone.wav,Nothing.,rain\n'
    )
    return tmp_path / "clips.csv"


def test_any_table_becomes_a_data_set(table, tmp_path, capsys, caplog):
    arguments = ["csv_table", str(table), "--columns", "audio=file", "caption=text", "label=kind"]
    assert main([*arguments, "--output", str(tmp_path / "data")]) == 0
    assert capsys.readouterr().out == f"2 rows (id, audio, captions, labels): {tmp_path / 'data'}\n"
    assert "1 of 3 listed clips are not in" in caplog.text
    rows = datasets.load_from_disk(str(tmp_path / "data"))
    assert rows["id"] == ["bell", "rain"] and rows["labels"] == [["bell"], ["rain"]]
    assert rows["captions"] == [["A bell rings.", "It rings."], ["Rain, falling"]]
    assert rows[0]["audio"] == {"bytes": (tmp_path / "bell.wav").read_bytes(), "path": "bell.wav"}
    assert main([*arguments, "--output", str(tmp_path / "data")]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert datasets.load_from_disk(str(tmp_path / "data")).to_list() == rows.to_list()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["caption=text"], "is known to hold the sound"),
        (["audio=file", "sound=file"], "a column can hold .*, not 'sound'"),
        (["audio=path"], "there is no column path in number, file, text, kind"),
        (["audio"], "takes pairs such as audio=file"),
        (["audio=file", "fold=kind"], "line 2: kind: invalid literal"),
    ],
)
def test_wrong_columns_are_named_in_one_line(table, tmp_path, capsys, columns, message):
    assert main(["csv_table", str(table), "--columns", *columns, "--output", str(tmp_path / "data")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(message, error), error
    with pytest.raises(ValueError):
        main(["--debug", "csv_table", str(table), "--columns", *columns, "--output", str(tmp_path / "data")])


def test_columns_of_known_names_are_found(tmp_path):
    soundfile.write(tmp_path / "bell.wav", np.zeros(800), 16_000)
    (tmp_path / "clips.csv").write_text("audio,caption,speaker\nbell.wav,A bell rings.,x\n")
    rows = builder("csv_table")(tmp_path / "clips.csv")
    assert rows.column_names == ["id", "audio", "captions"] and rows["captions"] == [["A bell rings."]]


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_is_a_command(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0 and "--output" in capsys.readouterr().out

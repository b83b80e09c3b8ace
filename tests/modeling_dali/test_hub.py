"""A saved folder loads with `trust_remote_code` where this project does not exist."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.tiny import tiny_dali

FRESH = """
import json, sys

class Absent:  # the project is not installed for whoever loads from the Hub
    def find_spec(self, name, *args):
        if name.split(".")[0] in ("modeling_dali", "trainers", "datasets_scripts", "modeling_vipant"):
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, Absent())
from transformers import (
    AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
)

folder, wav, again = sys.argv[1:]
trust = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(folder, **trust)
classes = [AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM]
result = {
    "config": type(AutoConfig.from_pretrained(folder, **trust)).__name__,
    "extractor": AutoFeatureExtractor.from_pretrained(folder, **trust).num_frames,
    "captions": [],
}

def caption(model, processor):
    inputs = processor(
        text=[processor.caption_prompt("audio")] * 2, audio=[wav, wav], sampling_rate=16000, return_tensors="pt"
    )
    return processor.decode_captions(model.generate(**inputs, max_new_tokens=8), inputs)

for auto in classes:
    model = auto.from_pretrained(folder, **trust)
    result["captions"].append(caption(model, processor))
model.save_pretrained(again)
processor.save_pretrained(again)
model = AutoModel.from_pretrained(again, **trust)
result["captions"].append(caption(model, AutoProcessor.from_pretrained(again, **trust)))
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "tiny-dali"
    model, processor = tiny_dali(prefix=3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


def test_a_fresh_interpreter_loads_it_and_says_the_same(saved, tmp_path):
    folder, model, processor = saved
    waveform = (np.random.default_rng(0).standard_normal(8_000) * 0.1).astype(np.float32)
    wav = tmp_path / "a.wav"
    soundfile.write(wav, waveform, 16_000, subtype="FLOAT")
    inputs = processor(
        text=[processor.caption_prompt("audio")] * 2, audio=[str(wav)] * 2, sampling_rate=16_000, return_tensors="pt"
    )
    expected = processor.decode_captions(model.generate(**inputs, max_new_tokens=8), inputs)
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, folder, wav, tmp_path / "again"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == {"config": "DaliConfig", "extractor": 64, "captions": [expected] * 4}
    assert expected[0]


def test_what_is_in_the_folder(saved):
    folder = saved[0]
    names = {path.name for path in folder.iterdir()}
    code = {"modeling_dali.py", "configuration_dali.py", "processing_dali.py", "feature_extraction_kaldi_fbank.py"}
    files = {"model.safetensors", "config.json", "generation_config.json", "processor_config.json", "README.md"}
    assert code | files <= names
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"}
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 64


def test_hub_files_import_nothing_from_the_project(saved):
    for path in saved[0].glob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["from"], ["import"]):
                module = words[1]
                assert module.split(".")[0] not in ("modeling_dali", "trainers", "datasets_scripts", "tests"), line
                if module.startswith("."):  # one level, flat
                    assert (saved[0] / f"{module[1:]}.py").is_file(), line


def test_the_code_of_the_card_runs(saved, tmp_path, monkeypatch, capsys):
    code = re.findall(r"```python\n(.*?)```", (saved[0] / "README.md").read_text(), flags=re.DOTALL)
    soundfile.write(tmp_path / "sound.wav", np.random.default_rng(0).standard_normal(20_000) * 0.1, 44_100)
    (tmp_path / saved[0].name).symlink_to(saved[0])
    monkeypatch.chdir(tmp_path)
    for block in code:
        exec(block, {})
    assert len(code) == 2 and len(capsys.readouterr().out.splitlines()) == 2


def test_model_card(saved):
    from huggingface_hub import ModelCard

    card = ModelCard.load(saved[0] / "README.md")
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "any-to-any"
    for heading in ("## Use", "## Limits", "## Metrics"):
        assert heading in card.text


def test_a_card_that_is_there_is_kept(saved, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    saved[1].save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("where", [{}, {"create_pr": True}, {"revision": "trial"}])
def test_push_to_hub_uploads_code_weights_and_card_in_one_commit(saved, monkeypatch, where):
    """With the Hub replaced by what it is asked for."""
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import EntryNotFoundError
    from transformers import PreTrainedModel

    commits = []

    class Repo:
        repo_id = "someone/tiny-dali"

    def uploaded(self, folder, repo_id, files_timestamps, create_pr=False, revision=None, **kwargs):
        card = ModelCard.load(Path(folder) / "README.md")
        commits.append(({path.name for path in Path(folder).iterdir()}, card, create_pr, revision))

    def no_card(cls, name, **kwargs):
        if name != "someone/tiny-dali":
            return load(name, **kwargs)
        raise EntryNotFoundError("README.md")

    load = ModelCard.load
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: Repo)
    monkeypatch.setattr(HfApi, "file_exists", lambda *args, **kwargs: False)
    monkeypatch.setattr(ModelCard, "load", classmethod(no_card))
    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", uploaded)
    saved[1].push_to_hub("someone/tiny-dali", tags=["mine"], **where)
    ((files, card, create_pr, revision),) = commits
    assert {"modeling_dali.py", "ear_dali.py", "model.safetensors", "README.md", "config.json"} <= files
    assert "DALI: someone/tiny-dali" in card.text and {"dali", "mine"} <= set(card.data.tags)
    assert (create_pr, revision) == (where.get("create_pr", False), where.get("revision"))

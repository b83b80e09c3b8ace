"""A saved model is all that a stranger needs: it loads, and runs in pipelines, where the project is not installed."""

import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from modeling_vipant import VipAntForAudioClassification, VipAntModel
from tests.tiny_vipant import NUM_BINS, NUM_FRAMES, tiny_processor, tiny_vipant

STRANGER = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_vipant", "modeling_dali", "trainers", "datasets_scripts"):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Blocked())
import numpy as np, torch, transformers
folder, waveform = sys.argv[1], np.load(sys.argv[2])
"""


def run_as_a_stranger(tmp_path, code: str, *arguments, path: str | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {} if path is None else {"PATH": path}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "mods")}
    result = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER + code, *map(str, arguments)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vipant")
    tiny_vipant(seed=5).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    waveform = 0.1 * np.random.default_rng(0).standard_normal(9_000).astype(np.float32)
    np.save(folder / "waveform.npy", waveform)
    soundfile.write(folder / "waveform.wav", waveform, 16_000, subtype="FLOAT")
    return folder


def test_auto_model_and_processor_with_trust_remote_code(saved, tmp_path):
    run_as_a_stranger(
        tmp_path,
        """
model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__name__ == "VipAntModel" and type(processor).__name__ == "VipAntProcessor"
inputs = processor(audio=[waveform], text=["rain", "a dog"], sampling_rate=16_000, return_tensors="pt")
with torch.no_grad():
    np.save(sys.argv[3], model(**inputs).logits_per_audio.numpy())
extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
assert extractor.num_frames == 64
classifier = transformers.AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
assert classifier(inputs["input_features"]).logits.shape == (1, 3)
# A model loaded from its folder saves into another one that loads as well.
model.save_pretrained(sys.argv[4]); processor.save_pretrained(sys.argv[4])
again = transformers.AutoModel.from_pretrained(sys.argv[4], trust_remote_code=True)
for name, value in model.state_dict().items():
    assert torch.equal(again.state_dict()[name], value), name
transformers.AutoProcessor.from_pretrained(sys.argv[4], trust_remote_code=True)
""",
        saved,
        saved / "waveform.npy",
        tmp_path / "logits.npy",
        tmp_path / "again",
    )
    processor = tiny_processor()
    inputs = processor(
        audio=[np.load(saved / "waveform.npy")], text=["rain", "a dog"], sampling_rate=16_000, return_tensors="pt"
    )
    with torch.no_grad():
        expected = tiny_vipant(seed=5)(**inputs).logits_per_audio
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-5)


def test_zero_shot_pipeline(saved, tmp_path):
    output = run_as_a_stranger(
        tmp_path,
        """
pipe = transformers.pipeline("zero-shot-audio-classification", model=folder, trust_remote_code=True)
ask = {"candidate_labels": ["rain", "dog", "bell"], "hypothesis_template": "the sound of {}"}
by_path, by_array = pipe(sys.argv[3], **ask), pipe({"array": waveform, "sampling_rate": 16_000}, **ask)
assert by_path == by_array
for scores in pipe([sys.argv[3]] * 2, batch_size=2, **ask):
    for one, other in zip(scores, by_path, strict=True):
        assert one["label"] == other["label"] and abs(one["score"] - other["score"]) < 1e-6, (scores, by_path)
for score in by_path:
    print(score["label"], score["score"])
pipe.model.save_pretrained(sys.argv[4])  # a loaded pipeline leaves its model fit to be saved
""",
        saved,
        saved / "waveform.npy",
        saved / "waveform.wav",
        tmp_path / "again",
        path="/nonexistent",  # no ffmpeg
    )
    got = {label: float(score) for label, score in (line.split() for line in output.splitlines())}
    inputs = tiny_processor()(
        audio=[np.load(saved / "waveform.npy")],
        text=[f"the sound of {label}" for label in ("rain", "dog", "bell")],
        sampling_rate=16_000,
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = tiny_vipant(seed=5)(**inputs).logits_per_audio.softmax(-1)[0]
    assert got == pytest.approx(dict(zip(("rain", "dog", "bell"), expected.tolist(), strict=True)), abs=1e-5)


def test_audio_classification_pipeline(saved, tmp_path):
    folder = tmp_path / "classifier"
    model = VipAntForAudioClassification.from_pretrained(
        saved, num_labels=3, id2label={0: "rain", 1: "dog", 2: "bell"}, problem_type="multi_label_classification"
    )
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    output = run_as_a_stranger(
        tmp_path,
        """
pipe = transformers.pipeline("audio-classification", model=folder, trust_remote_code=True)
print(sorted(score["label"] for score in pipe(waveform)))
""",
        folder,
        saved / "waveform.npy",
    )
    assert "['bell', 'dog', 'rain']" in output


def test_save_and_load_keeps_every_tensor(saved):
    state, again = tiny_vipant(seed=5).state_dict(), VipAntModel.from_pretrained(saved).state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_hub_files_import_nothing_of_the_project(saved):
    files = sorted(path.name for path in saved.glob("*.py"))
    assert files == [
        "audio_io.py",
        "configuration_vipant.py",
        "feature_extraction_kaldi_fbank.py",
        "modeling_vipant.py",
        "pipeline_vipant.py",
        "processing_vipant.py",
    ]


def test_half_precision(saved):
    model = VipAntModel.from_pretrained(saved, dtype=torch.bfloat16)
    features = model.get_audio_features(torch.randn(2, NUM_FRAMES, NUM_BINS)).pooler_output
    assert features.dtype == torch.bfloat16 and features.isfinite().all()

"""
What vLLM's Transformers backend asks of a model and its processor, in its order, on a stand-in for it.

The stand-in follows `vllm/model_executor/models/transformers/multimodal.py` of commit 03e3bc8. It runs where
the project is not installed, as vLLM does.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.tiny import tiny_dali

STAND_IN = '''
import sys

class Absent:
    def find_spec(self, name, *args):
        if name.split(".")[0] in ("modeling_dali", "modeling_vipant", "trainers", "datasets_scripts"):
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, Absent())
import numpy as np, torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor

folder, media = sys.argv[1:]
trust = {"trust_remote_code": True}
MM_KWARGS = {"max_windows": 1, "truncation": True}  # --mm-processor-kwargs
AUTO_MAP = {"AutoConfig": "configuration_dali.DaliConfig", "AutoModel": "modeling_dali.DaliModel"}  # --hf-overrides

# The model is asked for as AutoModel: of a DALI folder that is the class which writes text; the backend wants the one
# below it, and has its own head.
config = AutoConfig.from_pretrained(folder, **trust)
config.update({"auto_map": AUTO_MAP})
processor = AutoProcessor.from_pretrained(folder, **trust)
with torch.device("meta"):
    model = AutoModel.from_config(config, **trust)
assert type(model).__name__ == "DaliModel" and type(model).is_backend_compatible()
assert model.language_model is not None and config.get_text_config() is not config
weights = load_file(f"{folder}/model.safetensors")
model = AutoModel.from_config(config, **trust).eval()
names = {name: name.removeprefix("model.") for name in weights if name.startswith("model.")}
missing, unexpected = model.load_state_dict({new: weights[old] for old, new in names.items()}, strict=False)
assert not missing and not unexpected, (missing, unexpected)

# Which media there are, and how many tokens they may take.
assert processor.image_processor is not None and not hasattr(processor, "video_processor")
rate = processor.feature_extractor.sampling_rate
assert config.audio_config.max_source_positions == 32
counts = [
    processor._get_num_multimodal_tokens(image_sizes=([side, side],), **MM_KWARGS)["num_image_tokens"][0]
    for side in (16, 10_000)
]
assert counts == [16, 16]


def process(audios, images):
    """Media alone, with placeholders as their text; sounds of unequal length one by one."""
    text = " ".join([processor.audio_token] * len(audios)) + processor.image_token * len(images)
    inputs = processor(
        text=text,
        **({"audio": audios} if audios else {}),
        **({"images": images} if images else {}),
        return_text_replacement_offsets=True,
        return_tensors="pt",
        **MM_KWARGS,
    )
    if len({len(audio) for audio in audios}) > 1:
        inputs["input_features"] = [
            processor(text=processor.audio_token, audio=[audio], return_tensors="pt", **MM_KWARGS)["input_features"][0]
            for audio in audios
        ]
    replacements = {"audio": [], "image": []}
    for entry in inputs.pop("text_replacement_offsets")[0]:
        ids = processor.tokenizer.encode(entry["replacement"], add_special_tokens=False)
        assert len(set(ids)) == 1  # every token of a replacement holds an embedding
        replacements[entry["type"]].append(ids)
    assert len(replacements["audio"]) == len(audios) and len(replacements["image"]) == len(images)
    if audios:
        assert len(inputs["input_features"]) == len(audios)  # a row for each sound
    if images:
        patches = processor._get_num_multimodal_tokens(
            image_sizes=[(image.height, image.width) for image in images], **MM_KWARGS
        )["num_image_patches"]
        assert len(inputs["pixel_values"]) == sum(patches)
    return inputs, replacements


# Profiling: thirty seconds of silence, since the extractor names no length, and a white picture.
dummy, _ = process([np.zeros(30 * rate)], [Image.new("RGB", (16, 16), 255)])
assert model.get_audio_features(dummy["input_features"], return_dict=True).pooler_output.shape == (1, 32, 32)

# A request: the prompt is tokenised as it stands, its placeholders make room, features take their places.
given = np.load(media)
audios, image = [given["first"], given["second"]], Image.fromarray(given["image"])
inputs, replacements = process(audios, [image])
ids, waiting = [], {name: iter(blocks) for name, blocks in replacements.items()}
marks = {processor.tokenizer.convert_tokens_to_ids(getattr(processor, f"{name}_token")): name for name in waiting}
for token in processor.tokenizer(str(given["prompt"]))["input_ids"]:
    ids += next(waiting[marks[token]]) if token in marks else [token]
ids = torch.tensor(ids)
with torch.no_grad():
    embeds = model.get_input_embeddings()(ids[None])[0]
    features = {
        "audio": torch.cat([
            model.get_audio_features(row[None], return_dict=True).pooler_output.reshape(-1, embeds.shape[-1])
            for row in inputs["input_features"]
        ]),
        "image": torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output)),
    }
    for token, name in marks.items():
        embeds[ids == token] = features[name].reshape(-1, embeds.shape[-1])
    hidden = model(
        inputs_embeds=embeds[None], position_ids=torch.arange(len(ids))[None], use_cache=False, return_dict=False
    )[0][0]
np.savez(media, ids=ids, logits=hidden @ weights["lm_head.weight"].T)
'''


@pytest.mark.parametrize("lengths", [(6_000, 6_000), (5_000, 9_000)], ids=["equal", "unequal"])
def test_the_backend_gets_what_it_asks_for(tmp_path, lengths):
    model, processor = tiny_dali()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    audios = [(0.1 * rng.standard_normal(length)).astype(np.float32) for length in lengths]
    image = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
    items = [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "a dog and"}, {"type": "audio"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": items}], add_generation_prompt=True)
    np.savez(tmp_path / "media.npz", first=audios[0], second=audios[1], image=image, prompt=prompt)
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STAND_IN, tmp_path / "model", tmp_path / "media.npz"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    got = np.load(tmp_path / "media.npz")
    inputs = processor(
        text=prompt, audio=audios, images=[Image.fromarray(image)], sampling_rate=16_000, return_tensors="pt"
    )
    assert got["ids"].tolist() == inputs["input_ids"][0].tolist()
    with torch.no_grad():
        expected = model(**inputs).logits[0]
    np.testing.assert_allclose(got["logits"], expected, atol=1e-4)
    assert "lm_head.weight" in load_file(tmp_path / "model/model.safetensors")

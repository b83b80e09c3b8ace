"""
What hearing costs, against stock LLaVA and against the plain way of doing the same. Run:

    python benchmarks/bench_model.py

(a) forward and generate of DALI on sound against LLaVA on an image with as many tokens (aim: ratio <= 1.03);
(b) captions per second in batches of 8 against one at a time with the image encoded although unused, as the released
    code does it (aim: >= 2x);
(c) the front end for 16 clips of ten seconds against a loop of one clip at a time, the plain way: filter bank and
    window made for each clip, frames padded and transformed op by op (aim: >= 2x).

Both sides of a row run in turn in one process, after warm-up; medians.
"""

import statistics
import time

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from modeling_dali import DaliAudioConfig, DaliForConditionalGeneration, KaldiFbankFeatureExtractor
from modeling_dali.feature_extraction_kaldi_fbank import mel_filter_bank

IMAGE, AUDIO, PROMPT, ANSWER = 4, 5, 24, 64  # at most 64 new tokens, as in the released code


def in_turn(ours, plain, repeats=15, warm_up=3):
    """Median seconds of two functions that are called in turn."""
    times = [], []
    for i in range(repeats + warm_up):
        for function, kept in zip((ours, plain), times, strict=True):
            start = time.perf_counter()
            function()
            if i >= warm_up:
                kept.append(time.perf_counter() - start)
    return tuple(statistics.median(kept) for kept in times)


def models():
    """A LLaVA with 128 image tokens, and a DALI on it with 128 audio tokens from an encoder of the same size."""
    size = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**size, image_size=(128), patch_size=8)  # 256 patches
    text = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, vocab_size=999
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    llava = LlavaForConditionalGeneration(config).eval()
    audio = DaliAudioConfig(**size, num_frames=256, num_mel_bins=64, patch_size=8)  # 8 x 32 = 256 patches
    dali = DaliForConditionalGeneration.from_llava(llava, audio_config=audio).eval()
    dali.config.audio_token_index = AUDIO
    for model in (llava, dali):
        model.generation_config.update(eos_token_id=None, pad_token_id=0, max_new_tokens=ANSWER, do_sample=False)
    return llava, dali


def prompt(token, count, batch=1):
    ids = torch.randint(10, 900, (batch, PROMPT + count))
    ids[:, 4 : 4 + count] = token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def against_llava(llava, dali):
    pixels, features = torch.randn(1, 3, 128, 128), torch.randn(1, 256, 64)
    image = prompt(IMAGE, 256) | {"pixel_values": pixels}
    sound = prompt(AUDIO, 256) | {"input_features": features}
    for name in ("forward", "generate"):
        ours, plain = in_turn(
            lambda: dali(**sound) if name == "forward" else dali.generate(**sound),  # noqa: B023
            lambda: llava(**image) if name == "forward" else llava.generate(**image),  # noqa: B023
        )
        print(f"(a) {name:9} DALI {ours * 1e3:7.1f} ms   LLaVA {plain * 1e3:7.1f} ms   ratio {ours / plain:.3f}")


@torch.no_grad()
def captions_per_second(dali):
    features, pixels = torch.randn(8, 256, 64), torch.randn(8, 3, 128, 128)
    batch = prompt(AUDIO, 256, batch=8)

    def batched():
        dali.generate(**batch, input_features=features)

    def one_at_a_time():
        for i in range(8):
            dali.get_image_features(pixels[i : i + 1])
            row = {name: tensor[i : i + 1] for name, tensor in batch.items()}
            dali.generate(**row, input_features=features[i : i + 1])

    ours, plain = in_turn(batched, one_at_a_time, repeats=5, warm_up=1)
    print(f"(b) captions/s   batch of 8 {8 / ours:6.1f}   one by one {8 / plain:6.1f}   ratio {plain / ours:.2f}")


def plain_fbank(waveform):
    """Kaldi's fbank op by op, everything made anew."""
    window = torch.hann_window(400, periodic=False)
    waveform = waveform - waveform.mean()
    frames = waveform.unfold(0, 400, 160)
    frames = frames - frames.mean(1, keepdim=True)
    before = torch.nn.functional.pad(frames[None], (1, 0), mode="replicate")[0, :, :-1]
    frames = (frames - 0.97 * before) * window
    frames = torch.nn.functional.pad(frames, (0, 112))
    power = torch.fft.rfft(frames).abs().pow(2.0)
    log_mel = (power @ mel_filter_bank(128, 512, 16_000)).clamp(min=1.1920929e-07).log()
    log_mel = torch.nn.functional.pad(log_mel, (0, 0, 0, 1024 - len(log_mel)))
    return (log_mel + 5.081) / 4.4849


def front_end():
    clips = [torch.randn(160_000) * 0.1 for _ in range(16)]
    extractor = KaldiFbankFeatureExtractor()

    def batch():
        return extractor(clips, sampling_rate=16_000).input_features

    def loop():
        return torch.stack([plain_fbank(clip) for clip in clips])

    def own_loop():
        return torch.cat([extractor(clip, sampling_rate=16_000).input_features for clip in clips])

    torch.testing.assert_close(batch(), loop(), atol=2e-3, rtol=0)
    for name, other in (("plain loop", loop), ("own loop", own_loop)):
        ours, plain = in_turn(batch, other)
        figures = f"batch of 16 {ours * 1e3:5.1f} ms   {name} {plain * 1e3:5.1f} ms   ratio {plain / ours:.2f}"
        print(f"(c) front end    {figures}")


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    llava, dali = models()
    against_llava(llava, dali)
    captions_per_second(dali)
    front_end()

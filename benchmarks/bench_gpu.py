"""What one GPU does: stage 1b at the paper's shapes, and captions per second of a 7B model, with random weights.

    python benchmarks/bench_gpu.py [--tiny] [--device cuda]

Stage 1b: CLIP ViT-L/14-336 frozen, the audio encoder of 86M parameters trained, batches of 32 pairs of 512 x 576
tokens of width 1024: each loss with bfloat16 encoders, the same with the image tower in each step, and in float32.
Captioning: LLaVA-1.5-7B's shapes in bfloat16, prompts of 560 tokens, 64 new tokens, batches of 1 to 64.
Medians of steps after a warm-up, memory as the allocator's peak. `--tiny` tries the same out on small models.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_dali import DaliAudioConfig, DaliForConditionalGeneration
from trainers.losses import mmd, optimal_transport

GIB = 2**30
LOSSES: dict[str, Callable] = {
    "mmd": mmd,
    "exact transport": optimal_transport,
    "sinkhorn": lambda audio, image: optimal_transport(audio, image, solver="sinkhorn"),
}


def new_model(tiny: bool, device: str, dtype: torch.dtype) -> DaliForConditionalGeneration:
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision = CLIPVisionConfig(**sizes, image_size=56, patch_size=14)
        text, audio = LlamaConfig(**sizes, vocab_size=300), DaliAudioConfig(**sizes, num_frames=256)
    else:
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision = CLIPVisionConfig(**sizes, image_size=336, patch_size=14)
        text, audio = LlamaConfig(vocab_size=32_064), DaliAudioConfig()  # Vicuna-7B's and the paper's sizes
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=text.vocab_size - 1)
    torch.manual_seed(0)
    with torch.device(device):
        llava = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
        model = DaliForConditionalGeneration.from_llava(llava, audio_config=audio)
    return model.to(device).eval()


def measure(step: Callable[[], object], device: str, repeats: int) -> tuple[float, float]:
    """Median seconds of a step, and the peak GiB of the device (0 on a CPU)."""
    cuda = device.startswith("cuda")

    def timed() -> float:
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        timed()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(timed() for _ in range(repeats))
    return seconds, torch.cuda.max_memory_allocated() / GIB if cuda else 0.0


def alignment(model: DaliForConditionalGeneration, tiny: bool, device: str, repeats: int) -> None:
    batch = 2 if tiny else 32
    model.requires_grad_(False)
    trained = [*model.model.audio_tower.parameters(), *model.model.audio_projection.parameters()]
    for parameter in trained:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    audio_config, vision = model.config.audio_config, model.config.vision_config
    features = torch.randn(batch, audio_config.num_frames, audio_config.num_mel_bins, device=device)
    pixels = torch.randn(batch, 3, vision.image_size, vision.image_size, device=device, dtype=model.dtype)
    image_tokens = model.get_image_tokens(pixels).detach().float()
    print(f"\n| stage 1b, {batch} pairs | pairs/s, bfloat16 | with the image tower | float32 | GiB |")
    print("|---|---|---|---|---|")
    for name, loss in LOSSES.items():

        def step(bf16: bool, tower: bool, loss: Callable = loss) -> None:
            with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16):
                audio = model.model.get_audio_tokens(features)
                image = model.get_image_tokens(pixels) if tower else image_tokens
            loss(audio.float(), image.float()).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        kinds = ((True, False), (True, True), (False, False))
        sides = [measure(partial(step, *kind), device, repeats) for kind in kinds]
        speeds = " | ".join(f"{batch / seconds:.1f}" for seconds, _ in sides)
        print(f"| {name} | {speeds} | {sides[0][1]:.1f} |", flush=True)


@torch.inference_mode()
def captioning(model: DaliForConditionalGeneration, tiny: bool, device: str, repeats: int) -> None:
    audio_config = model.config.audio_config
    shape = audio_config.num_frames, audio_config.num_mel_bins
    silence = torch.zeros(1, *shape, device=device, dtype=model.dtype)
    count = model.model.get_audio_tokens(silence).shape[1]
    print("\n| batch | captions/s | with static cache, compiled | GiB |\n|---|---|---|---|")
    for batch in (1, 2) if tiny else (1, 4, 16, 64):
        ids = torch.randint(10, 200, (batch, count + 48), device=device)
        ids[:, 8 : 8 + count] = model.config.audio_token_index
        features = torch.randn(batch, *shape, device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": features.to(model.dtype)}
        length = {"max_new_tokens": 8 if tiny else 64, "min_new_tokens": 8 if tiny else 64, "do_sample": False}
        plain, memory = measure(partial(model.generate, **inputs, **length), device, repeats)
        row = f"| {batch} | {batch / plain:.2f} |"
        if device.startswith("cuda"):  # on a CPU compilation takes longer than it saves
            generate = partial(model.generate, **inputs, **length, cache_implementation="static")
            row += f" {batch / measure(generate, device, repeats)[0]:.2f}"
        row += " |"
        print(f"{row} {memory:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small models, to try the benchmark out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if given.device == "cpu" and not given.tiny:
        raise SystemExit("There is no GPU here. --tiny tries the benchmark out on the CPU.")
    name = torch.cuda.get_device_name() if given.device.startswith("cuda") else "CPU"
    print(f"{name}, torch {torch.__version__}, random weights")
    model = new_model(given.tiny, given.device, torch.float32 if given.tiny else torch.bfloat16)
    captioning(model, given.tiny, given.device, given.repeats)
    alignment(model, given.tiny, given.device, given.repeats)


if __name__ == "__main__":
    main()

"""Samples per second and peak memory of each stage, beside the same step written naively.

    python benchmarks/bench_stages.py

The model: images 168 x 168 in patches of 14 (144 tokens), a ViT of width 256 and 8 layers; 256 frames x 128 bins of
sound in patches of 16 (128 tokens), width 192, 4 layers: forward of the image tower against forward and backward of
the audio encoder as 1.3 to 1 in FLOPs, as at full size. A Llama of width 256 and 4 layers. Random weights: nothing of
what is measured depends on them. The naive side: image tower in every step, a loop over pairs around the loss, a batch
of one for captioning and for the losses on captions, gradients for all weights where only a part trains.

Both sides run in turn in one process, after a warm-up; medians. Memory: growth of the peak resident size in a process
of its own.
"""

import argparse
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import ot
import soundfile
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_dali import DaliAudioConfig, DaliForConditionalGeneration, DaliProcessor, KaldiFbankFeatureExtractor
from tests.tiny import tiny_tokenizer
from trainers.dali.alignment import AlignmentConfig, AlignmentTrainer
from trainers.dali.data_collator import DaliDataCollator
from trainers.dali.distillation import DistillationConfig, DistillationTrainer
from trainers.dali.prefix_tuning import PrefixTuningConfig, PrefixTuningTrainer
from trainers.dali.pseudo_captions import PseudoCaptionConfig, caption_shard

BATCH = 32
CAPTION = "a dog barks loudly and a bell rings far away"


def build() -> tuple[DaliForConditionalGeneration, DaliProcessor]:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4, image_size=168,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=4))
    llava.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    audio = DaliAudioConfig(
        num_frames=256, num_mel_bins=128, hidden_size=192, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=4,
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    model = DaliForConditionalGeneration.from_llava(llava, audio_config=audio, tokenizer=tokenizer)
    images = CLIPImageProcessorPil(size={"shortest_edge": 168}, crop_size={"height": 168, "width": 168})
    extractor = KaldiFbankFeatureExtractor(feature_size=128, num_frames=256)
    return model, DaliProcessor.for_model(model.config, images, tokenizer, extractor)


def rows(count: int = BATCH * 4) -> list[dict]:
    rng = np.random.default_rng(0)
    made = []
    for index in range(count):
        sound, picture = io.BytesIO(), io.BytesIO()
        soundfile.write(sound, rng.normal(0, 0.1, 40_000).astype(np.float32), 16_000, format="WAV")
        Image.fromarray(rng.integers(0, 255, (256, 256, 3), dtype=np.uint8)).save(picture, format="JPEG")
        row = {"id": str(index), "audio": {"bytes": sound.getvalue()}, "image": {"bytes": picture.getvalue()}}
        made.append(row | {"caption": CAPTION})
    return made


def options(folder: str) -> dict:
    return {
        "output_dir": folder, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
        "per_device_train_batch_size": BATCH,
    }  # fmt: skip


def steps_of(trainer) -> Callable[[], None]:
    """One training step at a time, as the trainer does it: batch, loss, gradients, optimizer."""
    trainer.create_optimizer()
    data = trainer.train_dataset
    keys = cycle([(0, index) for index in range(len(data))])

    def step():
        batch = trainer.data_collator.collator([data[key] for key in islice(keys, BATCH)])
        trainer.training_step(trainer.model, batch)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    trainer.current_gradient_accumulation_steps = 1
    return step


def alignment(folder: str, cached: bool = True) -> Callable[[], None]:
    model, processor = build()
    cache = {"cache_image_tokens": f"{folder}/tokens"} if cached else {}
    config = AlignmentConfig(**options(folder), uniform_epochs=0.0, **cache)
    return steps_of(AlignmentTrainer(model, config, processor, rows()))


def naive_alignment(folder: str) -> Callable[[], None]:
    model, processor = build()
    trainer = AlignmentTrainer(model, AlignmentConfig(**options(folder)), processor, rows())
    optimizer = trainer.create_optimizer()
    data = trainer.train_dataset
    keys = cycle([(0, index) for index in range(len(data))])

    def step():
        batch = trainer.data_collator.collator([data[key] for key in islice(keys, BATCH)])
        total = 0.0
        audio = model.model.get_audio_tokens(batch["input_features"])
        with torch.no_grad():
            image = model.get_image_tokens(batch["pixel_values"])
        for a, i in zip(audio, image, strict=True):
            alpha, beta = trainer.model.scorer(a[None], i[None])
            transport = ot.emd2(alpha[0], beta[0], ot.dist(a, i))
            entropies = -(alpha * alpha.log()).sum() - (beta * beta.log()).sum()
            total = total + transport - 100 * entropies
        (total / BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def on_captions(stage: str, folder: str) -> Callable[[], None]:
    model, processor = build()
    kinds = {
        "prefix": (PrefixTuningConfig, PrefixTuningTrainer),
        "distillation": (DistillationConfig, DistillationTrainer),
    }
    config_class, trainer_class = kinds[stage]
    return steps_of(trainer_class(model, config_class(**options(folder)), processor, rows()))


def naive_on_captions(stage: str, folder: str) -> Callable[[], None]:
    model, processor = build()
    if stage == "prefix":
        model.add_prefix(16)
        processor.follow(model.config)
        weights = [model.model.prefix]
    else:
        weights = list(model.model.audio_projector.parameters())
    optimizer = torch.optim.AdamW(weights)
    collator = DaliDataCollator(processor, "image" if stage == "prefix" else "audio")
    data = cycle(rows())

    def step():
        for row in islice(data, BATCH):
            (model(**collator([row])).loss / BATCH).backward()
        optimizer.step()
        model.zero_grad()

    return step


def captioning(folder: str, batch_size: int = BATCH) -> Callable[[], None]:
    model, processor = build()
    model.eval()
    config = PseudoCaptionConfig(output=folder, batch_size=batch_size)  # at most 64 new tokens
    collator = DaliDataCollator(processor, "audio_image", captions=False)
    data = rows(BATCH)

    @torch.no_grad()
    def step():
        torch.manual_seed(0)
        caption_shard(model, processor, collator, data, config)

    return step


VARIANTS: dict[str, tuple[Callable[[str], Callable[[], None]], Callable[[str], Callable[[], None]]]] = {
    "prefix tuning": (lambda d: on_captions("prefix", d), lambda d: naive_on_captions("prefix", d)),
    "alignment": (lambda d: alignment(d, cached=False), naive_alignment),
    "alignment, cached": (alignment, naive_alignment),
    "pseudo-captions": (captioning, lambda d: captioning(d, batch_size=1)),
    "distillation": (lambda d: on_captions("distillation", d), lambda d: naive_on_captions("distillation", d)),
}


def timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak() -> float:
    """Peak resident MiB of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peak_memory(name: str, side: int) -> float:
    """MiB by which the steps raise the peak, in a process of its own."""
    command = [sys.executable, __file__, "--memory", name, "--side", str(side)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stages", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--memory", choices=VARIANTS)
    parser.add_argument("--side", type=int, default=0)
    given = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        if given.memory:
            step = VARIANTS[given.memory][given.side](folder)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
            before = peak()
            step(), step()
            print(peak() - before)
            return
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH}")
        print("| stage | samples/s | naive | ratio | peak MiB | naive |\n|---|---|---|---|---|---|")
        for name in given.stages:
            sides = [build_side(f"{folder}/{name}{k}") for k, build_side in enumerate(VARIANTS[name])]
            for step in sides:
                step()
            times = [[timed(step) for step in sides] for _ in range(given.repeats)]
            ours, naive = (statistics.median(side) for side in zip(*times, strict=True))
            ratio = statistics.median(plain / own for own, plain in times)
            memory = [peak_memory(name, side) for side in (0, 1)]
            speeds = f"{BATCH / ours:.1f} | {BATCH / naive:.1f} | {ratio:.1f}x"
            print(f"| {name} | {speeds} | {memory[0]:.0f} | {memory[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()

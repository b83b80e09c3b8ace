"""Captions for videos without any pair: each frame gets the captions of a pool that CLIP finds nearest.

    python -m trainers.vipant.curate_captions --model openai/clip-vit-base-patch32 --dataset shards/train \
        --captions pool.txt --output runs/curated --top_k 10
    accelerate launch -m trainers.vipant.curate_captions ...   # clips are shared among processes

Writes `captions.jsonl`, lines of `[id, "caption"]`, and `index.jsonl`, lines of `["CLIP.p0.N_i", [caption ids]]` for
frame i of N, best first: the format of VIP-ANT's released files. Memory is bounded by the block sizes. Finished blocks
are kept in `OUTPUT/blocks`, so that an interrupted run goes on where it stopped.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, CLIPImageProcessorPil

import modeling_vipant  # noqa: F401 (makes AutoModel know VIP-ANT)
from trainers.recipes import load_rows
from trainers.rows import read_image, without_decoding


def read_captions(path: str | Path) -> list[tuple[int, str]]:
    """Reads a caption pool.

    Args:
        path: A text file of one caption a line, or JSON lines of `[id, "caption"]`.

    Returns:
        Ids and captions, in the order of the file.

    Raises:
        ValueError: Naming the first line that is empty or of another form, or a repeated id.
    """
    captions: list[tuple[int, str]] = []
    seen = set()
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        identifier, caption = number - 1, line.strip()
        if str(path).endswith((".jsonl", ".json")):
            try:
                identifier, caption = json.loads(line)
            except (ValueError, TypeError):
                raise ValueError(f'{path}, line {number}: expected [id, "caption"], found {line[:80]!r}') from None
        if not isinstance(caption, str) or not caption.strip() or not isinstance(identifier, int):
            raise ValueError(f"{path}, line {number}: no caption in {line[:80]!r}")
        if identifier in seen:
            raise ValueError(f"{path}, line {number}: the id {identifier} occurs twice")
        seen.add(identifier)
        captions.append((identifier, caption))
    if not captions:
        raise ValueError(f"{path} holds no captions")
    return captions


def top_captions(
    frames: torch.Tensor, caption_blocks: Sequence[np.ndarray], top_k: int, columns: int = 16_384
) -> torch.Tensor:
    """Nearest captions of each frame by exact search over blocks of captions.

    Args:
        frames: `[frames, dim]` unit vectors.
        caption_blocks: `[captions_b, dim]` unit vectors each, memory-mapped; their rows are numbered through.
        top_k: Captions wanted, at most as many as there are.
        columns: Captions compared at once; bounds memory to `frames x columns` scores.

    Returns:
        `[frames, top_k]` caption numbers, best first.
    """
    scores = frames.new_empty(len(frames), 0)
    numbers = torch.empty(len(frames), 0, dtype=torch.long, device=frames.device)
    offset = 0
    for block in caption_blocks:
        for start in range(0, len(block), columns):
            piece = torch.from_numpy(np.array(block[start : start + columns])).to(frames)
            new_scores = frames @ piece.T
            new_numbers = offset + start + torch.arange(len(piece), device=frames.device).expand(len(frames), -1)
            scores, best = torch.cat([scores, new_scores], dim=1).topk(min(top_k, scores.shape[1] + len(piece)), dim=1)
            numbers = torch.cat([numbers, new_numbers], dim=1).gather(1, best)
        offset += len(block)
    return numbers


@dataclass
class Encoder:
    """A CLIP (or VIP-ANT) model with its tokenizer and image processor; gives unit vectors."""

    model: Any
    tokenizer: Any
    image_processor: Any

    @classmethod
    def load(cls, name: str, device: torch.device) -> "Encoder":
        """Loads all three from a folder or Hub name."""
        model = AutoModel.from_pretrained(name).eval().to(device)
        return cls(model, AutoTokenizer.from_pretrained(name), CLIPImageProcessorPil.from_pretrained(name))

    @torch.no_grad()
    def texts(self, texts: list[str], batch_size: int) -> torch.Tensor:
        """`[texts, dim]`."""
        parts = []
        for start in range(0, len(texts), batch_size):
            inputs = self.tokenizer(
                texts[start : start + batch_size], padding=True, truncation=True, return_tensors="pt"
            ).to(self.model.device)
            parts.append(self.model.get_text_features(**inputs).pooler_output)
        return F.normalize(torch.cat(parts).float(), dim=-1)

    @torch.no_grad()
    def images(self, images: list, batch_size: int) -> torch.Tensor:
        """`[images, dim]`."""
        parts = []
        for start in range(0, len(images), batch_size):
            inputs = self.image_processor(images[start : start + batch_size], return_tensors="pt").to(
                self.model.device
            )
            parts.append(self.model.get_image_features(**inputs).pooler_output)
        return F.normalize(torch.cat(parts).float(), dim=-1)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is there either whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def curate(
    encoder: Encoder,
    rows: datasets.Dataset,
    captions: list[tuple[int, str]],
    output: Path,
    top_k: int = 10,
    *,
    batch_size: int = 64,
    clips_per_block: int = 256,
    captions_per_block: int = 65_536,
    random_control: bool = False,
    identity: str = "",
) -> Path:
    """Finds the captions of all frames and writes the released format (see the module's docstring).

    Args:
        encoder: Of images and texts.
        rows: With `id`, and `frames` or `image`.
        captions: From `read_captions`.
        output: Folder to write to.
        top_k: Captions a frame.
        batch_size: Images or texts that are encoded at once.
        clips_per_block: Clips whose frames are searched and written at once.
        captions_per_block: Captions that are encoded and written at once.
        random_control: Whether to draw captions at random instead, the paper's control.
        identity: Names model and data; a run resumes only blocks of the same identity and settings.

    Returns:
        The path of `index.jsonl`.

    Raises:
        ValueError: If columns are missing, `top_k` is out of range, or `output` holds another run's blocks.
    """
    column = next((name for name in ("frames", "image") if name in rows.column_names), None)
    if column is None or "id" not in rows.column_names:
        raise ValueError(f"columns id and frames or image are needed; there are {', '.join(rows.column_names)}")
    if not 1 <= top_k <= len(captions):
        raise ValueError(f"top_k={top_k} must be between 1 and the number of captions, {len(captions)}")
    state, blocks = PartialState(), output / "blocks"
    if state.is_main_process:
        blocks.mkdir(parents=True, exist_ok=True)
        pool = hashlib.sha256(json.dumps(captions).encode()).hexdigest()
        settings = [identity, len(rows), pool, top_k, clips_per_block, captions_per_block, random_control]
        _claim(blocks / "settings.json", settings)
    state.wait_for_everyone()

    starts = range(0, len(captions), captions_per_block)
    caption_files = [blocks / f"captions-{i:06d}.npy" for i in range(len(starts))]
    for i, path in _unfinished(caption_files, state, "captions"):
        texts = [caption for _, caption in captions[starts[i] : starts[i] + captions_per_block]]
        embeds = encoder.texts(texts, batch_size).cpu().numpy()
        temporary = path.with_suffix(f".{os.getpid()}.tmp.npy")
        np.save(temporary, embeds)
        temporary.replace(path)
    state.wait_for_everyone()

    caption_blocks = [np.load(path, mmap_mode="r") for path in caption_files]
    rows = without_decoding(rows)
    starts = range(0, len(rows), clips_per_block)
    index_files = [blocks / f"index-{i:06d}.jsonl" for i in range(len(starts))]
    for i, path in _unfinished(index_files, state, "frames"):
        names, images, failures = [], [], []
        for row in rows.select(range(starts[i], min(starts[i] + clips_per_block, len(rows)))):
            frames = row["frames"] if column == "frames" else [row["image"]]
            for number, frame in enumerate(frames):
                try:
                    images.append(read_image(frame))
                    names.append(f"{row['id']}.p0.{len(frames)}_{number}")
                except (OSError, ValueError) as error:
                    failures.append({"id": row["id"], "frame": number, "reason": str(error)})
        lines = []
        if images:
            if random_control:
                generator = torch.Generator().manual_seed(i)
                best = torch.stack([torch.randperm(len(captions), generator=generator)[:top_k] for _ in names])
            else:
                best = top_captions(encoder.images(images, batch_size), caption_blocks, top_k).cpu()
            lines = [
                json.dumps([name, [captions[n][0] for n in row]])
                for name, row in zip(names, best.tolist(), strict=True)
            ]
        # Failures first: the index block marks this block as done.
        write_atomically(path.with_name(f"failures-{i:06d}.jsonl"), _text([json.dumps(f) for f in failures]))
        write_atomically(path, _text(lines))
    state.wait_for_everyone()

    if state.is_main_process:
        write_atomically(
            output / "captions.jsonl", _text([json.dumps([n, c], ensure_ascii=False) for n, c in captions])
        )
        _concatenate(
            [path.with_name(path.name.replace("index", "failures")) for path in index_files], output / "failures.jsonl"
        )
        _concatenate(index_files, output / "index.jsonl")
        shutil.rmtree(blocks)
    state.wait_for_everyone()
    return output / "index.jsonl"


def _claim(path: Path, settings: list) -> None:
    """Notes what the blocks beside `path` were made with, or checks that it was the same."""
    if not path.exists():
        write_atomically(path, json.dumps(settings).encode())
    elif json.loads(path.read_text()) != settings:
        raise ValueError(
            f"{path.parent} holds the blocks of an interrupted run with another model, data or settings: "
            "finish that run, delete the folder, or choose another --output"
        )


def _unfinished(files: list[Path], state: PartialState, what: str) -> Iterator[tuple[int, Path]]:
    """This process's blocks that are not on disk yet, with a progress bar over all of them."""
    own = [(i, path) for i, path in enumerate(files) if i % state.num_processes == state.process_index]
    bar = tqdm(own, desc=what, unit="block", disable=not state.is_main_process)
    yield from ((i, path) for i, path in bar if not path.exists())


def _text(lines: list[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode()


def _concatenate(parts: list[Path], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as whole:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, whole)
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="CLIP or VIP-ANT model: folder or Hub name")
    parser.add_argument("--dataset", required=True, help="folder, file or Hub name with id and frames or image")
    parser.add_argument("--split", default="train")
    parser.add_argument("--captions", required=True, help='.txt of one caption a line, or .jsonl of [id, "caption"]')
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--top_k", type=int, default=10, help="captions a frame")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--random_control", action="store_true", help="random captions, the paper's control")
    args = parser.parse_args(arguments)
    try:
        index = curate(
            Encoder.load(args.model, PartialState().device),
            load_rows(args.dataset, args.split),
            read_captions(args.captions),
            args.output,
            args.top_k,
            batch_size=args.batch_size,
            random_control=args.random_control,
            identity=json.dumps([args.model, args.dataset, args.split]),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if PartialState().is_main_process:
        failures = sum(1 for _ in (args.output / "failures.jsonl").open())
        print(f"wrote {index}; {failures} frames could not be read" + (" (failures.jsonl)" if failures else ""))


if __name__ == "__main__":
    main()

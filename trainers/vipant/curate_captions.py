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
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
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
from datasets_scripts.commands import run_command
from datasets_scripts.files import claim, locked, sweep, write_whole
from trainers.fingerprints import rows_hash, weights_hash
from trainers.recipes import load_rows
from trainers.rows import read_image, without_decoding


def read_caption_pool(path: str | Path) -> list[tuple[int, str]]:
    """Reads a pool of captions.

    Args:
        path: A text file of one caption a line, or JSON lines of `[id, "caption"]`.

    Returns:
        Ids and captions, in the order of the file.

    Raises:
        ValueError: Naming the first line that is empty or of another form, or a repeated id.
    """
    captions: list[tuple[int, str]] = []
    seen = set()
    with Path(path).open(encoding="utf-8") as file:
        lines = [line.strip() for line in file]
    for number, line in enumerate(lines, start=1):
        identifier, caption = number - 1, line
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
) -> Path:
    """Finds the captions of all frames and writes the released format (see the module's docstring).

    Args:
        encoder: Of images and texts.
        rows: With `id`, and `frames` or `image`.
        captions: From `read_caption_pool`.
        output: Folder to write to.
        top_k: Captions a frame.
        batch_size: Images or texts that are encoded at once.
        clips_per_block: Clips whose frames are searched and written at once.
        captions_per_block: Captions that are encoded and written at once.
        random_control: Whether to draw captions at random instead, the paper's control.

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
    with locked(output) if state.is_main_process else nullcontext():
        if state.is_main_process:
            pool = hashlib.sha256(json.dumps(captions).encode()).hexdigest()
            settings: dict[str, Any] = {
                "weights": weights_hash(encoder.model),
                "rows": rows_hash(rows),
                "captions": pool,
            }
            settings |= {"clips_per_block": clips_per_block, "captions_per_block": captions_per_block}
            claim(blocks, settings | {"top_k": top_k, "random_control": random_control})
            sweep(output)
        state.wait_for_everyone()
        caption_blocks = _encode_captions(encoder, captions, blocks, state, batch_size, captions_per_block)
        state.wait_for_everyone()
        rows = without_decoding(rows)
        starts = range(0, len(rows), clips_per_block)
        index_files = [blocks / f"index-{i:06d}.jsonl" for i in range(len(starts))]
        for i, path in _unfinished(index_files, state, "frames"):
            block = rows.select(range(starts[i], min(starts[i] + clips_per_block, len(rows))))
            names, images, failures = _read_frames(block, column)
            best = torch.empty(0, top_k, dtype=torch.long)
            if images and random_control:
                generator = torch.Generator().manual_seed(i)
                best = torch.stack([torch.randperm(len(captions), generator=generator)[:top_k] for _ in names])
            elif images:
                best = top_captions(encoder.images(images, batch_size), caption_blocks, top_k).cpu()
            found = [[name, [captions[n][0] for n in row]] for name, row in zip(names, best.tolist(), strict=True)]
            _write_lines(path.with_name(f"failures-{i:06d}.jsonl"), failures)
            _write_lines(path, found)  # last: it marks this block as done
        state.wait_for_everyone()

        if state.is_main_process:
            _write_lines(output / "captions.jsonl", map(list, captions))
            failed = [path.with_name(path.name.replace("index", "failures")) for path in index_files]
            _concatenate(failed, output / "failures.jsonl")
            _concatenate(index_files, output / "index.jsonl")
            shutil.rmtree(blocks)
        state.wait_for_everyone()
    return output / "index.jsonl"


def _encode_captions(
    encoder: Encoder,
    captions: list[tuple[int, str]],
    blocks: Path,
    state: PartialState,
    batch_size: int,
    captions_per_block: int,
) -> list[np.ndarray]:
    """Embeddings of all captions `[captions_b, dim]` by block, memory-mapped; makes this process's share of them."""
    starts = range(0, len(captions), captions_per_block)
    files = [blocks / f"captions-{i:06d}.npy" for i in range(len(starts))]
    for i, path in _unfinished(files, state, "captions"):
        texts = [caption for _, caption in captions[starts[i] : starts[i] + captions_per_block]]
        with write_whole(path) as partial:
            np.save(partial, encoder.texts(texts, batch_size).cpu().numpy())
    state.wait_for_everyone()
    return [np.load(path, mmap_mode="r") for path in files]


def _read_frames(rows: datasets.Dataset, column: str) -> tuple[list[str], list, list[dict]]:
    """Names and pictures of the frames of some clips, and which could not be read, and why."""
    names, images, failures = [], [], []
    for row in rows:
        frames = row["frames"] if column == "frames" else [row["image"]]
        for number, frame in enumerate(frames):
            try:
                images.append(read_image(frame))
                names.append(f"{row['id']}.p0.{len(frames)}_{number}")
            except (OSError, ValueError, SyntaxError) as error:
                failures.append({"id": row["id"], "frame": number, "reason": str(error)})
    return names, images, failures


def _unfinished(files: list[Path], state: PartialState, what: str) -> Iterator[tuple[int, Path]]:
    """This process's blocks that are not on disk yet, with a progress bar over all of them."""
    own = [(i, path) for i, path in enumerate(files) if i % state.num_processes == state.process_index]
    bar = tqdm(own, desc=what, unit="block", disable=not state.is_main_process)
    yield from ((i, path) for i, path in bar if not path.exists())


def _write_lines(path: Path, values: Iterable) -> None:
    with write_whole(path) as partial:
        partial.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")


def _concatenate(parts: list[Path], path: Path) -> None:
    with write_whole(path) as partial, partial.open("wb") as whole:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, whole)


def curate_data_set(options: argparse.Namespace) -> int:
    """Curates as the command line says."""
    index = curate(
        Encoder.load(options.model, PartialState().device),
        load_rows(options.dataset, options.split),
        read_caption_pool(options.captions),
        options.output,
        options.top_k,
        batch_size=options.batch_size,
        random_control=options.random_control,
    )
    if PartialState().is_main_process:
        failures = sum(1 for _ in (options.output / "failures.jsonl").open())
        print(f"wrote {index}; {failures} frames could not be read" + (" (failures.jsonl)" if failures else ""))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="CLIP or VIP-ANT model: folder or Hub id")
    parser.add_argument("--dataset", required=True, help="folder, file or Hub id with id and frames or image")
    parser.add_argument("--split", help="split of the data, where there are several")
    parser.add_argument("--captions", required=True, help='.txt of one caption a line, or .jsonl of [id, "caption"]')
    parser.add_argument("--output", required=True, type=Path, help="folder of the results")
    parser.add_argument("--top_k", type=int, default=10, help="captions a frame")
    parser.add_argument("--batch_size", type=int, default=64, help="images or texts that are encoded at once")
    parser.add_argument("--random_control", action="store_true", help="random captions, the paper's control")
    return run_command(parser, curate_data_set, arguments)


if __name__ == "__main__":
    sys.exit(main())

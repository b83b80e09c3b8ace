"""Image tokens of a frozen image tower, kept on disk so that it runs once per frame and not once per step.

A folder holds `tokens.npy` (fp8 [frames of all rows, tokens, width], memory-mapped), `scales.npy` (float32 [frames of
all rows, tokens], what each token is multiplied by), `state.npy` (which frames are done), `offsets.npy` (where each
row's frames begin) and `cache.json` (what the tokens belong to). Writing may be killed at any time: what is marked as
done is done, and the rest is made by the next run.

fp8 (e4m3) takes half of fp16's bytes. Its error is relative, 2.4 % of each value, so that the few channels by which
CLIP's tokens stand out cost the others nothing, as they would with int8.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from datasets_scripts.files import claim, write_whole
from trainers.rows import UnreadableSampleError, pick_frame, read_image, sample_id

logger = logging.get_logger(__name__)

MISSING, DONE, UNREADABLE = 0, 1, 2
NOTE = "cache.json"
LARGEST = torch.finfo(torch.float8_e4m3fn).max
# A look-up is thirty times as fast as torch's conversion on a CPU.
VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).half().numpy()


def compress(tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """
    Tokens as fp8 with a scale for each.

    Args:
        tokens (`torch.Tensor`): [..., tokens, width].

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the bits of the fp8 values, of the same shape, and the scales [..., tokens],
        float32.
    """
    tokens = tokens.float().cpu()
    scales = (tokens.abs().amax(-1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    bits = (tokens / scales[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    return bits.numpy(), scales.numpy()


def expand(bits: np.ndarray, scales: np.ndarray) -> torch.Tensor:
    """The tokens [..., tokens, width] of [`compress`], float32."""
    return torch.from_numpy(np.take(VALUES, bits, mode="wrap") * scales[..., None])


class ImageTokenCache:
    """
    Image tokens of the frames of a data set, read row by row.

    Args:
        folder: A folder that `build` has filled.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.offsets, self.tokens, self.scales, self.state = _open(self.folder)

    def __reduce__(self):
        return ImageTokenCache, (self.folder,)  # dataloader workers map the files by themselves

    def read(self, row: int, rng: np.random.Generator | None, first_frame: bool = False) -> torch.Tensor:
        """
        Tokens of a random frame of a row, or without randomness of the middle one.

        Args:
            row: Index of the row in its data set.
            rng: Randomness of the sample.
            first_frame: Whether the first frame is always taken.

        Returns:
            [tokens, width], float32.

        Raises:
            UnreadableSampleError: if that frame could not be decoded.
        """
        first, end = self.offsets[row], self.offsets[row + 1]
        if first == end:
            raise UnreadableSampleError("the row has no frames")
        frame = first + pick_frame(int(end - first), rng, first_frame)
        if self.state[frame] != DONE:
            raise UnreadableSampleError(f"frame {frame - first} could not be decoded when image tokens were cached")
        return expand(self.tokens[frame], self.scales[frame])

    def blank(self) -> torch.Tensor:
        """Tokens of nothing [tokens, width]."""
        return torch.zeros(self.tokens.shape[1:])


def build(
    folder: str | os.PathLike,
    rows,
    encode: Callable[[list], torch.Tensor],
    identity: dict,
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> ImageTokenCache:
    """
    Fills a cache, or what is missing of one.

    Args:
        folder: Where it is kept.
        rows: The data set, with `image` or `frames`.
        encode: Image tokens [B, tokens, width] of a list of pictures.
        identity: What makes the tokens what they are (weights, preprocessing).
        batch_size: Pictures per call of `encode`.
        process_index, num_processes: Which share of the rows this process does.
        barrier: Waits for the other processes.

    Raises:
        ValueError: if the folder holds tokens of another data set or model, or tokens are not finite.
        OSError: if the disk has no room for them; says how much is needed.
    """
    folder = Path(folder)
    identity = identity | {"length": len(rows)}
    if process_index == 0 and not (folder / "offsets.npy").exists():
        claim(folder, identity, NOTE)
        _allocate(folder, rows, encode)
    barrier()
    claim(folder, identity, NOTE)
    offsets, tokens, scales, state = _open(folder, "r+")
    share = (row for row in range(process_index, len(rows), num_processes))
    todo = ((row, range(offsets[row], offsets[row + 1])) for row in share)
    pictures = _pictures(rows, ((row, frames) for row, frames in todo if (state[frames] == MISSING).any()), state)
    for places, batch in _batches(pictures, batch_size):
        values = encode(batch)
        if not values.isfinite().all():
            raise ValueError("The image tower gives tokens that are not finite: its weights are damaged.")
        tokens[places], scales[places] = compress(values)
        state[places] = DONE  # after the tokens: a kill between the two loses nothing
    for array in (tokens, scales, state):
        array.flush()
    barrier()
    return ImageTokenCache(folder)


def _open(folder: Path, mode: Literal["r", "r+"] = "r") -> tuple[np.ndarray, np.memmap, np.memmap, np.memmap]:
    """Offsets, tokens, scales and state; raises ValueError if a file is cut short."""
    first, *files = [folder / f"{name}.npy" for name in ("offsets", "tokens", "scales", "state")]
    try:
        for file in files:
            np.load(file, mmap_mode="r")  # "r+" would lengthen a file that is cut short
        tokens, scales, state = (np.load(file, mmap_mode=mode) for file in files)
        return np.load(first), tokens, scales, state
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"The image tokens in {folder} are damaged ({error}): delete the folder.") from error


def _allocate(folder: Path, rows, encode) -> None:
    """Makes the files; `offsets.npy` comes last and says that they are there."""
    counts = [len(row["frames"] or []) if "frames" in row else 1 for row in _only_pictures(rows)]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    shape = (int(offsets[-1]), *encode([Image.new("RGB", (32, 32))]).shape[1:])
    tokens = np.lib.format.open_memmap(folder / "tokens.npy", mode="w+", dtype=np.uint8, shape=shape)
    needed = tokens.nbytes
    with (folder / "tokens.npy").open("r+b") as file:
        try:  # memory-mapped writes to a full disk would kill the process
            os.posix_fallocate(file.fileno(), 0, needed + tokens.offset)
        except OSError as error:
            (folder / "tokens.npy").unlink()
            raise OSError(f"Image tokens need {needed / 2**30:.1f} GiB in {folder}: {error}.") from error
    np.save(folder / "scales.npy", np.zeros(shape[:2], dtype=np.float32))
    np.save(folder / "state.npy", np.zeros(shape[0], dtype=np.uint8))
    with write_whole(folder / "offsets.npy") as path:
        np.save(path, offsets)
    logger.warning(f"Image tokens of {shape[0]} frames take {needed / 2**30:.2f} GiB in {folder}.")


def _only_pictures(rows) -> Iterator[dict]:
    """Rows without their sound, so that counting frames does not read it."""
    if hasattr(rows, "select_columns"):
        rows = rows.select_columns(["frames" if "frames" in rows.column_names else "image"])
    return (rows[index] for index in range(len(rows)))


def _pictures(rows, todo: Iterator[tuple[int, range]], state: np.ndarray) -> Iterator[tuple[int, object]]:
    """Places and pictures of the frames that are missing; marks those that cannot be decoded."""
    for index, frames in todo:
        row = rows[index]
        values = row["frames"] if "frames" in row else [row["image"]]
        for place, value in zip(frames, values, strict=True):
            if state[place] != MISSING:
                continue
            try:
                yield place, read_image(value)
            except (ValueError, OSError, SyntaxError) as error:
                logger.warning(f"A frame of {sample_id(row | {'index': index})} is skipped: {error}")
                state[place] = UNREADABLE


def _batches(pictures: Iterator[tuple[int, object]], size: int) -> Iterator[tuple[list[int], list]]:
    places: list[int] = []
    batch: list = []
    for place, picture in pictures:
        places.append(place)
        batch.append(picture)
        if len(batch) == size:
            yield places, batch
            places, batch = [], []
    if batch:
        yield places, batch

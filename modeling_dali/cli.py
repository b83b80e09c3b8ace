"""
The command line: `dali caption FILE... --model DIR_OR_ID` and `dali explain FILE... --model DIR_OR_ID`.

`caption` writes one line per window of sound, with its start time; `explain` a picture per file that shows where in
the frame the sound is. A file that cannot be read is reported and the others go on; the exit code is 1 then, 0 if all
went well, 2 if nothing could be started.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

from .audio_io import ClipError, read_audio, read_middle_frame
from .explain import draw, explain, find_scorers
from .pipeline_dali import Window, caption_windows, cut_windows


@dataclass
class Failure:
    """A file that could not be read, and why."""

    file: str
    reason: str


def caption_files(
    files: Iterable[str], model, processor, image=None, with_video: bool = False, batch_size: int = 8
) -> Iterator[tuple[str, Window, str] | Failure]:
    """
    Captions files, window by window and batch by batch; only one batch and one file are in memory at a time.

    Args:
        files: Sound or video files.
        model, processor: As loaded.
        image: A picture that goes with every file.
        with_video: Take each file's own middle frame as its picture.
        batch_size: Windows that are captioned together; they may come from several files.

    Yields:
        Each file with a window of it and its caption, and each file that failed, in the order of the files.
    """

    def read() -> Iterator[tuple[str, Window] | Failure]:
        for file in files:
            try:
                picture = read_middle_frame(file) if with_video else image
                yield from ((file, window) for window in cut_windows(processor, file, image=picture))
            except ValueError as error:
                yield Failure(file, str(error))

    items = read()
    while batch := list(islice(items, batch_size)):
        windows = [item[1] for item in batch if not isinstance(item, Failure)]
        captions = iter(caption_windows(model, processor, windows) if windows else [])
        for item in batch:
            yield item if isinstance(item, Failure) else (*item, next(captions))


def run_caption(given: argparse.Namespace) -> int:
    """`dali caption`."""
    try:
        image = None if given.image is None else Image.open(given.image).convert("RGB")
        processor = AutoProcessor.from_pretrained(given.model)
        model = AutoModel.from_pretrained(given.model, dtype="auto").to(given.device).eval()
    except (OSError, ValueError, UnidentifiedImageError) as error:
        print(f"dali caption: cannot start: {error}", file=sys.stderr)
        return 2
    if given.max_new_tokens is not None:
        model.generation_config.max_new_tokens = given.max_new_tokens
    failed, done = 0, set()
    # The bar shows on a terminal only.
    with tqdm(total=len(given.files), unit="file", disable=None) as bar:
        results = caption_files(given.files, model, processor, image, given.with_video, given.batch_size)
        for result in results:
            if isinstance(result, Failure):
                failed += 1
                file = result.file
                line: dict[str, object] = {"file": file, "error": result.reason}
                bar.write(f"dali caption: {result.reason}", file=sys.stderr)
            else:
                file, window, text = result
                line = {"file": file, "start": round(window.start, 3), "end": round(window.end, 3), "caption": text}
                if not given.json:
                    bar.write(f"{file}  {window.start:7.2f} s  {text}", file=sys.stdout)
            if given.json:
                bar.write(json.dumps(line, ensure_ascii=False), file=sys.stdout)
            if file not in done:
                done.add(file)
                bar.update()
    if failed:
        print(f"dali caption: {failed} of {len(given.files)} files could not be captioned.", file=sys.stderr)
    return 1 if failed else 0


def explain_file(file: str, model, processor, scorers, image: Image.Image | None, start: float) -> Image.Image:
    """
    Shows where in a picture the sound of a file is.

    Args:
        file: A video, or with `image` any sound.
        model, processor: As loaded.
        scorers: Learned ones, or None.
        image: The picture; by default the middle frame of the file.
        start: Seconds from which on one window of sound is taken.

    Raises:
        ValueError: if sound or picture cannot be read, or the sound ends before `start`.
    """
    picture = read_middle_frame(file) if image is None else image
    extractor = processor.feature_extractor
    waveform, rate = read_audio(file, target_rate=extractor.sampling_rate)
    waveform = waveform[round(start * rate) :]
    if len(waveform) == 0:
        raise ClipError("too_short", f"the sound ends before {start:g} s", file)
    windows, _ = processor.split_windows([waveform], rate, max_windows=sys.maxsize)
    samples = windows[0].numpy()
    features = extractor([samples], sampling_rate=extractor.sampling_rate, return_tensors="pt")
    features = features[extractor.model_input_names[0]][0].numpy()
    return draw(picture, features, explain(model, processor, samples, picture, scorers))


def run_explain(given: argparse.Namespace) -> int:
    """`dali explain`."""
    try:
        image = None if given.image is None else Image.open(given.image).convert("RGB")
        processor = AutoProcessor.from_pretrained(given.model)
        model = AutoModel.from_pretrained(given.model, dtype="auto").to(given.device).eval()
        scorers = find_scorers(given.model)
        given.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, UnidentifiedImageError) as error:
        print(f"dali explain: cannot start: {error}", file=sys.stderr)
        return 2
    if scorers is None:
        print(
            "dali explain: no scorer.safetensors beside the model: weights follow from which image tokens the audio "
            "tokens lie nearest to.",
            file=sys.stderr,
        )
    failed = 0
    for file in given.files:
        try:
            sheet = explain_file(file, model, processor, scorers, image, given.start)
        except ValueError as error:
            failed += 1
            print(f"dali explain: {error}", file=sys.stderr)
            continue
        target = given.output / f"{Path(file).stem}.where.png"
        sheet.save(target)
        print(target)
    if failed:
        print(f"dali explain: {failed} of {len(given.files)} files could not be explained.", file=sys.stderr)
    return 1 if failed else 0


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1 is needed, not {value}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    parser = argparse.ArgumentParser(prog="dali", description="Captions for sound.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("caption", help="caption sound and video files")
    command.add_argument("files", nargs="+", metavar="FILE", help="wav, flac, ogg, mp3, m4a, mp4, webm, ...")
    command.add_argument("--model", required=True, metavar="DIR_OR_ID", help="a DALI model: folder or Hub id")
    picture = command.add_mutually_exclusive_group()
    picture.add_argument("--image", metavar="FILE", help="a picture of the scene, used with every file")
    picture.add_argument("--with-video", action="store_true", help="use the middle frame of each (video) file")
    command.add_argument("--batch-size", type=positive, default=8, metavar="N", help="windows at a time (default 8)")
    command.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest caption (default: the model's)")
    command.add_argument("--json", action="store_true", help="write JSON lines")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.set_defaults(run=run_caption)

    command = commands.add_parser("explain", help="show where in a video's picture its sound is")
    command.add_argument("files", nargs="+", metavar="FILE", help="mp4, webm, ...; with --image any sound")
    command.add_argument("--model", required=True, metavar="DIR_OR_ID", help="a DALI model: folder or Hub id")
    command.add_argument("--image", metavar="FILE", help="a picture in place of the middle frame")
    command.add_argument(
        "--start", type=float, default=0.0, metavar="SECONDS", help="where the sound begins (default 0)"
    )
    command.add_argument(
        "--output", type=Path, default=Path(), metavar="DIR", help="folder of the pictures FILE.where.png (default: .)"
    )
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.set_defaults(run=run_explain)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    given = build_parser().parse_args(arguments)
    return given.run(given)


if __name__ == "__main__":
    sys.exit(main())

"""`dali caption` and `dali explain`: what is heard in files, and where in the picture it is.

A file that cannot be read, or captioned, is reported and the others go on.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor

import modeling_dali  # noqa: F401 (makes the Auto classes know DALI)
from datasets_scripts.clips import AUDIO_EXTENSIONS, VIDEO_EXTENSIONS
from modeling_dali.audio_io import ClipError, read_audio, read_middle_frame
from modeling_dali.explain import draw, explain, find_scorers
from modeling_dali.pipeline_dali import Window, caption_windows, cut_windows
from trainers.dali.caption_formats import Line, as_json, as_text, chosen_format, distinct_names, write_captions
from trainers.processes import writing_threads
from trainers.rows import read_image

MEDIA = AUDIO_EXTENSIONS + VIDEO_EXTENSIONS
UNUSABLE = (ValueError, OSError, SyntaxError, MemoryError)  # SyntaxError: Pillow's, for broken pictures


def caption_files(
    files: Iterable[str],
    model,
    processor,
    image: Image.Image | None = None,
    with_video: bool = False,
    batch_size: int = 8,
    **generate_kwargs,
) -> Iterator[Line]:
    """
    Captions files, window by window and batch by batch; only one batch and one file are in memory at a time.

    Args:
        files (`Iterable[str]`): Sound or video files, or URLs.
        model: A DALI model.
        processor: The model's.
        image (`Image`, *optional*): A picture that goes with every file.
        with_video (`bool`, *optional*, defaults to `False`): Take each file's own middle frame as its picture.
        batch_size (`int`, *optional*, defaults to 8): Windows that are captioned together, of one file or several.
        generate_kwargs: For the model's `generate`.

    Yields:
        `Line`: each window with its caption, and each file that failed, in the order of the files.
    """
    windows = cut_files(files, processor, image, with_video)
    while batch := list(islice(windows, batch_size)):
        yield from caption_batch(model, processor, batch, **generate_kwargs)


def cut_files(files, processor, image, with_video) -> Iterator[tuple[str, Window] | Line]:
    """The windows of each file, or why it has none."""
    for file in files:
        try:
            picture = read_middle_frame(file) if with_video else image
            yield from ((file, window) for window in cut_windows(processor, file, image=picture))
        except UNUSABLE as error:
            yield Line(file, error=str(error))


def caption_batch(model, processor, batch: Sequence[tuple[str, Window] | Line], **generate_kwargs) -> Iterator[Line]:
    """Captions of a batch; where one window breaks it, the others are captioned one by one."""
    good = [item for item in batch if not isinstance(item, Line)]
    try:
        with writing_threads(model):
            captions = iter(caption_windows(model, processor, [w for _, w in good], **generate_kwargs) if good else [])
    except UNUSABLE as error:
        if len(batch) == 1:
            yield Line(good[0][0], error=str(error))
            return
        for item in batch:
            yield from caption_batch(model, processor, [item], **generate_kwargs)
        return
    for item in batch:
        if isinstance(item, Line):
            yield item
        else:
            file, window = item
            yield Line(file, window.start, window.end, next(captions))


def run_caption(
    files: Sequence[str],
    model: str,
    image: str | None = None,
    with_video: bool = False,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    output: str | None = None,
    kind: str | None = None,
    device: str | None = None,
) -> int:
    """
    Captions files and folders on the terminal, or into a file.

    Args:
        files (`Sequence[str]`): Files, URLs, and folders, of which all sounds and videos are taken.
        model (`str`): Folder or Hub id.
        image (`str`, *optional*): A picture that goes with every file.
        with_video (`bool`, *optional*, defaults to `False`): Take each file's own middle frame.
        batch_size (`int`, *optional*, defaults to 8): Windows at a time.
        max_new_tokens (`int`, *optional*): Longest caption; by default the model's own.
        output (`str`, *optional*): File, or folder of subtitles; by default the terminal.
        kind (`str`, *optional*): See [`chosen_format`].
        device (`str`, *optional*): By default a GPU where there is one.

    Returns:
        `int`: 1 if a file could not be captioned, else 0.
    """
    kind = chosen_format(output, kind)
    if output is None and kind not in ("text", "jsonl"):
        raise ValueError(f"--format {kind} needs --output")
    if output is not None and kind not in ("srt", "vtt") and Path(output).is_dir():
        raise ValueError(f"{output} is a folder; --output names the file to write")
    files = list(expand(files))
    picture = None if image is None else read_image(image)
    captioner, processor = open_model(model, device)
    generate_kwargs = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    lines: list[Line] = []
    done: set[str] = set()
    with tqdm(total=len(files), unit="file", disable=None) as bar:  # shows on a terminal only
        for line in caption_files(files, captioner, processor, picture, with_video, batch_size, **generate_kwargs):
            lines.append(line)
            if line.error:
                bar.write(f"error: {line.error}", file=sys.stderr)
            if output is None and (kind == "jsonl" or not line.error):
                bar.write(as_json(line) if kind == "jsonl" else as_text(line), file=sys.stdout)
            if line.file not in done:
                done.add(line.file)
                bar.update()
    if output is not None:
        for path in write_captions(lines, output, kind):
            print(path)
    return report_failures("captioned", {line.file for line in lines if line.error}, files)


def run_explain(
    files: Sequence[str],
    model: str,
    image: str | None = None,
    start: float = 0.0,
    output: str = ".",
    device: str | None = None,
) -> int:
    """
    Draws where in a picture the sound of each file is, into `FILE.where.png`.

    Args:
        files (`Sequence[str]`): Videos; with `image` any sounds.
        model (`str`): Folder or Hub id.
        image (`str`, *optional*): The picture; by default the middle frame of each file.
        start (`float`, *optional*, defaults to 0): Seconds from which on one window of sound is taken.
        output (`str`, *optional*, defaults to `"."`): Folder of the pictures.
        device (`str`, *optional*): By default a GPU where there is one.

    Returns:
        `int`: 1 if a file could not be explained, else 0.
    """
    if start < 0:
        raise ValueError(f"--start {start:g}: sounds begin at 0 s")
    if Path(output).is_file():
        raise ValueError(f"{output} is a file; --output names the folder of the pictures")
    files = list(expand(files))
    picture = None if image is None else read_image(image)
    captioner, processor = open_model(model, device)
    scorers = find_scorers(model)
    if scorers is None:
        print("No scorer.safetensors beside the model: weights follow from the nearest tokens.", file=sys.stderr)
    Path(output).mkdir(parents=True, exist_ok=True)
    failed = set()
    names = distinct_names(files)
    for file in files:
        try:
            sheet = explain_file(file, captioner, processor, scorers, picture, start)
        except UNUSABLE as error:
            failed.add(file)
            print(f"error: {error}", file=sys.stderr)
            continue
        target = Path(output) / f"{names[file]}.where.png"
        sheet.save(target)
        print(target)
    return report_failures("explained", failed, files)


def explain_file(file: str, model, processor, scorers, image: Image.Image | None, start: float) -> Image.Image:
    """
    Shows where in a picture the sound of a file is.

    Args:
        file (`str`): A video, or with `image` any sound.
        model: A DALI model.
        processor: The model's.
        scorers: Learned ones, or None.
        image (`Image`, *optional*): The picture; by default the middle frame of the file.
        start (`float`): Seconds from which on one window of sound is taken.

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
    features = extractor([samples], sampling_rate=rate, return_tensors="pt")
    features = features[extractor.model_input_names[0]][0].numpy()
    return draw(picture, features, explain(model, processor, samples, picture, scorers))


def expand(files: Iterable[str]) -> Iterator[str]:
    """The files, and in place of a folder the sounds and videos in it."""
    for file in files:
        if "://" not in file and Path(file).is_dir():
            found = sorted(str(path) for path in Path(file).rglob("*") if path.suffix.lower() in MEDIA)
            if not found:
                raise ValueError(f"{file} holds no sounds or videos")
            yield from found
        else:
            yield file


def open_model(model: str, device: str | None) -> tuple:
    """
    A model in eval mode on a device, and its processor.

    Raises:
        ValueError: if there is no such model or device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device}: there is no such device; say cpu, cuda or cuda:1") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: there is no usable GPU here; leave --device out to use the CPU")
    if not Path(model).exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ValueError(f"--model {model}: there is no such folder, and it is not a Hub id")
    kind = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
    if kind not in ("dali", "dali_captioner"):
        raise ValueError(f"{model} is a {kind} model, which does not hear: give a DALI model or an ear")
    captioner = AutoModel.from_pretrained(model, dtype="auto", trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    return captioner.to(place).eval(), processor


def report_failures(what: str, failed: set[str], files: Sequence[str]) -> int:
    """Says how many files failed; the exit code."""
    if failed:
        print(f"{len(failed)} of {len(files)} files could not be {what}.", file=sys.stderr)
    return 1 if failed else 0

"""Kaldi's log-mel filter bank features, computed for a whole batch of clips in torch.

From sound to features:

1. mean of the channels, resampled to `sampling_rate`, cut to one clip, its mean removed;
2. frames of 25 ms every 10 ms (Kaldi's `snip_edges`), each with its own mean removed, pre-emphasised, windowed;
3. power spectrum -> triangular mel filters -> log;
4. zero-padded or cut to `num_frames` *after* the log, then normalised with one mean and one standard deviation.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import TensorType, logging

from .audio_io import ClipError, check_rate, list_sounds, read_batch

logger = logging.get_logger(__name__)

PREEMPHASIS = 0.97
LOW_FREQUENCY = 20.0  # Hz; the highest filter ends at half the sampling rate
BLOCK_SAMPLES = 1 << 18  # of padded frames that are worked on at a time
BINS_PER_BAND = 32
CROPS = ("start", "center", "random")


def mel_filter_bank(num_bins: int, fft_length: int, sampling_rate: int) -> torch.Tensor:
    """Kaldi's triangular filters, `[fft_length // 2 + 1, num_bins]`, evenly spaced on the scale 1127 ln(1 + f/700)."""

    def to_mel(hertz):
        return 1127.0 * np.log1p(np.asarray(hertz, dtype=np.float64) / 700.0)

    edges = np.linspace(to_mel(LOW_FREQUENCY), to_mel(sampling_rate / 2), num_bins + 2)
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    mel = to_mel(np.arange(fft_length // 2 + 1) * sampling_rate / fft_length)[:, None]
    filters = np.minimum((mel - lower) / (centre - lower), (upper - mel) / (upper - centre)).clip(min=0.0)
    filters[-1] = 0.0  # Kaldi leaves the Nyquist bin out
    return torch.from_numpy(filters.astype(np.float32))


def filter_bands(filters: torch.Tensor) -> list[tuple[slice, slice, torch.Tensor]]:
    """Filters [frequencies, bins] cut into bands of mel bins: frequencies of a band, its bins, its own filters."""
    bands = []
    for start in range(0, filters.shape[1], BINS_PER_BAND):
        bins = slice(start, start + BINS_PER_BAND)
        reached = filters[:, bins].any(1).nonzero().flatten()
        # The lowest filters may lie between two frequencies and reach none.
        frequencies = slice(int(reached[0]), int(reached[-1]) + 1) if len(reached) else slice(0, 1)
        bands.append((frequencies, bins, filters[frequencies, bins].contiguous()))
    return bands


def crop_clip(clip: torch.Tensor, length: int, crop: str) -> torch.Tensor:
    """
    Cuts a clip that is too long.

    Args:
        clip (`torch.Tensor` of shape `(samples,)`): Mono sound.
        length (`int`): Samples to keep.
        crop (`str`): `"start"`, `"center"`, or `"random"` (by torch's global generator). Where a center or random crop
            is less than half as loud (standard deviation) as the whole clip, the start is taken instead, and where
            that is quieter still, the end.

    Source: VIP-ANT's released code.
    """
    if len(clip) <= length:
        return clip
    if crop == "start":
        return clip[:length]
    excess = len(clip) - length
    left = round(0.5 * excess) if crop == "center" else int(torch.randint(excess, ()))
    chosen = clip[left : left + length]
    loudness, needed = chosen.std(), 0.5 * clip.std()
    if loudness < needed:
        chosen = clip[:length]
        if chosen.std() < loudness:
            chosen = clip[-length:]
    return chosen


class KaldiFbankFeatureExtractor(SequenceFeatureExtractor):
    """
    Turns sound into normalised log-mel features of a fixed number of frames.

    The default numbers are those of DALI and CAV-MAE; VIP-ANT's are in `modeling_vipant/feature_extraction_vipant.py`.

    Args:
        feature_size (`int`, *optional*, defaults to 128): Number of mel bins.
        sampling_rate (`int`, *optional*, defaults to 16000): Rate that features are computed at, in Hz; sound of other
            rates is resampled to it.
        num_frames (`int`, *optional*, defaults to 1024): Frames of a clip, one every `frame_shift` seconds.
        mean (`float`, *optional*, defaults to -5.081): Subtracted from the log-mel values, padding included.
        std (`float`, *optional*, defaults to 4.4849): What they are then divided by.
        frame_length (`float`, *optional*, defaults to 0.025): In seconds.
        frame_shift (`float`, *optional*, defaults to 0.01): In seconds.
        crop (`str`, *optional*, defaults to `"start"`): Which part of a longer clip is taken: `"start"`, `"center"` or
            `"random"`; see [`crop_clip`].
        padding_value (`float`, *optional*, defaults to 0.0): Value of padding frames in the log domain, before
            normalisation.

    Source: Kaldi's `fbank` (htk_compat, no energy, Hanning window, no dither).
    """

    model_input_names = ["input_features", "input_features_mask"]

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = 16_000,
        num_frames: int = 1024,
        mean: float = -5.081,
        std: float = 4.4849,
        frame_length: float = 0.025,
        frame_shift: float = 0.010,
        crop: str = "start",
        padding_value: float = 0.0,
        **kwargs,
    ):
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)
        self.num_frames = num_frames
        self.mean = mean
        self.std = std
        self.frame_length = frame_length
        self.frame_shift = frame_shift
        self.crop = crop
        self._check_settings()
        self._window = torch.hann_window(self.frame_samples, periodic=False)
        self._bands = filter_bands(mel_filter_bank(feature_size, self.fft_length, sampling_rate))

    def _check_settings(self) -> None:
        check_rate(self.sampling_rate)
        for name in ("feature_size", "num_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, not {getattr(self, name)}.")
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"`mean` must be finite and `std` positive, not {self.mean} and {self.std}.")
        if not (self.frame_shift * self.sampling_rate >= 1 and 2 <= self.frame_length * self.sampling_rate <= 1 << 20):
            raise ValueError(
                f"Frames of {self.frame_length} s every {self.frame_shift} s do not go with {self.sampling_rate} Hz."
            )
        self._check_crop(self.crop)

    @staticmethod
    def _check_crop(crop: str) -> None:
        if crop not in CROPS:
            raise ValueError(f"`crop` is one of {', '.join(CROPS)}, not {crop!r}.")

    @property
    def frame_samples(self) -> int:
        """Samples in one frame."""
        return int(round(self.frame_length * self.sampling_rate, 6))  # Kaldi rounds down

    @property
    def hop_samples(self) -> int:
        """Samples from one frame to the next."""
        return int(round(self.frame_shift * self.sampling_rate, 6))

    @property
    def fft_length(self) -> int:
        """The power of two that holds one frame."""
        return 1 << (self.frame_samples - 1).bit_length()

    @property
    def window_samples(self) -> int:
        """Samples that `num_frames` frames advance by: 10.24 s with the default numbers."""
        return self.num_frames * self.hop_samples

    @property
    def crop_samples(self) -> int:
        """Samples that are kept of a longer clip: `num_frames` frames and a margin, so that the last one is whole."""
        return int((self.num_frames * self.frame_shift + 2 * self.frame_length) * self.sampling_rate)

    def to_dict(self):
        """The settings as they are saved; the filter bank and the window follow from them."""
        output = super().to_dict()
        output.pop("_window", None)
        output.pop("_bands", None)
        return output

    def fetch_audio(self, audio: Any, sampling_rate: int | None = None) -> list | None:
        """The sounds of a processor's call as a list, unread: the call itself reads them, at their own rates."""
        return list_sounds(audio)

    def read(self, audio: list, sampling_rate: int | Sequence[int] | None = None) -> list[np.ndarray]:
        """Clips in any form that [`read_audio`] takes, as mono waveforms [samples] at the extractor's rate."""
        return read_batch(audio, sampling_rate, self.sampling_rate)

    def split(self, clip: np.ndarray) -> tuple[list[np.ndarray], list[float]]:
        """
        Cuts a clip that is longer than the extractor's into windows that follow each other.

        Args:
            clip (`np.ndarray`): A mono waveform [samples] at the extractor's rate.

        Returns:
            The windows [samples], each but the last with the margin that completes its last frame, and the seconds
            that each of them adds. A rest shorter than a frame has no window; its seconds are the last one's.
        """
        step = self.window_samples
        starts = range(0, max(len(clip) - self.frame_samples, 0) + 1, step)
        ends = [*starts[1:], len(clip)]
        windows = [clip[start : start + self.crop_samples] for start in starts]
        return windows, [(end - start) / self.sampling_rate for start, end in zip(starts, ends, strict=True)]

    def __call__(
        self,
        audio: Any,
        sampling_rate: int | Sequence[int] | None = None,
        return_tensors: str | TensorType | None = None,
        crop: str | None = None,
        padding: bool | str = True,
        truncation: bool | None = None,
        max_length: int | None = None,
        return_attention_mask: bool = True,
    ) -> BatchFeature:
        """
        Args:
            audio: A clip or a list of clips: paths, URLs, bytes, arrays, ..., as [`read_audio`] takes them. An array
                of two dimensions that stands alone is a batch of mono clips `[B, samples]`. The channels of a clip
                are mixed to their mean.
            sampling_rate (`int` or `Sequence[int]`, *optional*): Of arrays, in Hz, one for all clips or one for each;
                by default that of the extractor. Files know their own.
            return_tensors (`str`, *optional*): `"pt"` (also without) or `"np"`.
            crop (`str`, *optional*): Which part of a longer clip is taken, in the place of the extractor's `crop`.
            padding (`bool` or `str`, *optional*, defaults to `True`): Shorter clips are padded to `num_frames`
                whatever this says; `False` refuses them.
            truncation (`bool`, *optional*): `True` cuts longer clips, `False` refuses them. By default they are cut
                with a warning.
            max_length (`int`, *optional*): Cuts clips to so many samples, if that is less than the extractor's clip.
            return_attention_mask (`bool`, *optional*, defaults to `True`): Whether to return `input_features_mask`.

        Returns:
            `input_features` `(batch, num_frames, feature_size)`, float32, and `input_features_mask`
            `(batch, num_frames)`, 1 where a frame holds sound and 0 where it is padding.

        Raises:
            ClipError: For a clip that cannot be read, or is shorter than a frame. The message names it.
            ValueError: For arguments that cannot be met.
        """
        chosen = self.crop if crop is None else crop
        self._check_crop(chosen)
        clips = [torch.from_numpy(clip) for clip in self.read(audio, sampling_rate)]
        length = self.crop_samples if max_length is None else min(max_length, self.crop_samples)
        clips = [self._fit(clip, f"Clip {i}", length, chosen, truncation) for i, clip in enumerate(clips)]
        counts = torch.tensor([(len(clip) - self.frame_samples) // self.hop_samples + 1 for clip in clips])
        if padding in (False, "do_not_pad") and (counts < self.num_frames).any():
            raise ValueError(
                f"Clip {int((counts < self.num_frames).nonzero()[0])} is shorter than {self.num_frames} frames, which "
                "the audio encoder needs, and `padding` is off."
            )
        features = torch.full((len(clips), self.num_frames, self.feature_size), float(self.padding_value))
        for clip, output in zip(clips, features, strict=True):
            self.log_mel(clip, output)
        features.sub_(self.mean).div_(self.std)
        output = {"input_features": features}
        if return_attention_mask:
            output["input_features_mask"] = (torch.arange(self.num_frames) < counts[:, None]).long()
        return BatchFeature(output, return_tensors)

    def _fit(self, clip: torch.Tensor, name: str, length: int, crop: str, truncation: bool | None) -> torch.Tensor:
        """One clip cut to `length`, its mean removed."""
        if min(len(clip), length) < self.frame_samples:
            raise ClipError(
                "too_short",
                f"{min(len(clip), length)} samples at {self.sampling_rate} Hz are less than one frame of "
                f"{self.frame_samples}: leave the clip out or pad it",
                name,
            )
        if len(clip) > length and truncation is not True:
            seconds = length / self.sampling_rate
            if truncation is False:
                raise ValueError(
                    f"{name} is {len(clip) / self.sampling_rate:.2f} s long, more than {seconds:.2f} s, and "
                    "`truncation` is off."
                )
            logger.warning_once(
                f"Sounds are cut to {seconds:.2f} s: split longer ones into windows to keep the rest, or pass "
                "`truncation=True`."
            )
        clip = crop_clip(clip, length, crop)
        return clip - clip.mean()

    def log_mel(self, clip: torch.Tensor, output: torch.Tensor) -> None:
        """
        Writes the unnormalised log-mel values of every whole frame of `clip` [samples] to the first rows of `output`
        [num_frames, feature_size].

        Frames are views of the pre-emphasised clip, worked in blocks that stay in the processor's cache, and each band
        of filters sees its own frequencies only: 1.3 ms on one core for a clip of ten seconds, 3.8 ms op by op on
        whole arrays. A batch is worked clip by clip: all of it at once falls out of the cache and takes twice as long.
        """
        # The sample before a frame's first does not matter: a Hanning window begins with 0.
        emphasised = torch.nn.functional.pad(clip[1:] - PREEMPHASIS * clip[:-1], (1, 0))
        frames = emphasised.unfold(0, self.frame_samples, self.hop_samples)  # [frames, frame_samples]
        frames = frames[: len(output)]
        means = (1 - PREEMPHASIS) * clip.unfold(0, self.frame_samples, self.hop_samples).mean(-1, keepdim=True)
        at_once = max(1, BLOCK_SAMPLES // self.fft_length)
        padded = torch.zeros(at_once, self.fft_length)
        blocks = zip(
            *(part.split(at_once) for part in (frames, means[: len(frames)], output[: len(frames)])), strict=True
        )
        for block, mean, log_mel in blocks:
            windowed = padded[: len(block)]
            torch.sub(block, mean, out=windowed[:, : self.frame_samples])
            windowed[:, : self.frame_samples] *= self._window
            spectrum = torch.fft.rfft(windowed)
            power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
            for frequencies, bins, filters in self._bands:
                log_mel[:, bins] = power[:, frequencies] @ filters
            log_mel.clamp_(min=torch.finfo(torch.float32).eps).log_()


KaldiFbankFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")

__all__ = ["KaldiFbankFeatureExtractor"]

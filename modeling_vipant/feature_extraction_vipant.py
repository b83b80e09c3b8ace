"""VIP-ANT's numbers for the audio front end, which is DALI's."""

from modeling_dali.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor


def vipant_feature_extractor(
    sampling_rate: int = 44_100,
    num_frames: int = 1000,
    mean: float = -4.93839311,
    std: float = 5.75751113,
    crop: str = "center",
    **kwargs,
) -> KaldiFbankFeatureExtractor:
    """
    The feature extractor of the released checkpoints, which were trained on sound at 44.1 kHz.

    Args:
        sampling_rate, num_frames, mean, std, crop, kwargs: See [`KaldiFbankFeatureExtractor`]. Training crops at
            random instead.

    Source: VIP-ANT's released code; the rate is that of its data.
    """
    return KaldiFbankFeatureExtractor(
        sampling_rate=sampling_rate, num_frames=num_frames, mean=mean, std=std, crop=crop, **kwargs
    )

"""`pipeline("zero-shot-audio-classification")` that reads whatever the feature extractor reads, without ffmpeg."""

from typing import Any

from transformers.pipelines.zero_shot_audio_classification import ZeroShotAudioClassificationPipeline

# What a saved model's configuration says about the pipelines whose code lies beside it.
CUSTOM_PIPELINES = {
    "zero-shot-audio-classification": {
        "impl": "pipeline_vipant.VipAntZeroShotPipeline",
        "pt": ["AutoModel"],
        "type": "multimodal",
    }
}


class VipAntZeroShotPipeline(ZeroShotAudioClassificationPipeline):
    """transformers' pipeline; sounds may be paths, URLs, bytes, arrays or `{"array", "sampling_rate"}`."""

    def preprocess(self, audio: Any, **kwargs) -> dict[str, Any]:
        """Reads one sound and prepares it with the texts of its candidate labels."""
        return super().preprocess(self.feature_extractor.read([audio])[0], **kwargs)

"""The model card that a DALI model is saved with."""

from collections.abc import Iterable

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

CARD = """---
{metadata}
---

# DALI: {title}

This model writes captions for sound. It is an image captioner with an audio encoder whose tokens were aligned with the
image tokens of video frames, so that the language model can read both; no audio was paired with text
([*An Eye for an Ear: Zero-shot Audio Description Leveraging an Image Captioner using Audiovisual Distribution
Alignment*](https://arxiv.org/abs/2410.05997), NeurIPS 2024).

{holds}

| part | value |
|---|---|
| captioner | {captioner} |
| image tower | {vision} |
| language model | {text} |
| audio encoder | {audio}, {audio_tokens} tokens per clip |
| soft prefix | {prefix} |

## Use

```python
from transformers import pipeline

pipe = pipeline("audio-captioning", model="{name}", trust_remote_code=True)
print(pipe("sound.wav"))  # start, end and caption of each window
```

Or step by step:

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)

prompt = processor.caption_prompt("audio")  # or "audio_image", with images=[...] below
inputs = processor(text=prompt, audio="sound.wav", return_tensors="pt")
print(processor.decode_captions(model.generate(**inputs), inputs))
```

Sounds are resampled to the front end's rate. One longer than a clip is split into windows.

## Limits

- Trained on what video frames show: sounds whose source is seldom in the picture (wind, hum, speech off screen) are
  described badly or not at all.
- Captions may name things that are not to be heard. Do not use them where a wrong description does harm.
- The licence and the limits of the captioner below it hold too.

## Metrics

{metrics}
"""

EAR_ALONE = """This checkpoint holds the ear alone: audio encoder, projection, projector and soft prefix. The captioner
named below is loaded from where it is published, and another one is refused."""


def model_card(config: PreTrainedConfig, name: str, metrics: str | None = None, tags: Iterable[str] = ()) -> ModelCard:
    """
    Args:
        config: The model's `DaliConfig` or `DaliCaptionerConfig`.
        name: Folder or Hub id that the example loads.
        metrics: Markdown with what was measured.
        tags: Tags for the Hub, in addition to the card's own.
    """
    captioner = f"`{config.base_model}`" if config.base_model else "made for this model"
    if config.base_model_revision:
        captioner += f" at `{config.base_model_revision}`"
    metadata = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="any-to-any",
        base_model=config.base_model,
        tags=list(dict.fromkeys(["dali", "audio-captioning", "custom_code", *tags])),
    )
    return ModelCard(
        CARD.format(
            metadata=metadata.to_yaml(),
            title=name,
            name=name,
            vision=config.vision_config.model_type,
            text=config.get_text_config().model_type,
            holds=EAR_ALONE if config.ear_only else "The captioner is part of this checkpoint.",
            captioner=captioner,
            audio=config.audio_config.model_type,
            audio_tokens=config.audio_seq_length,
            prefix=f"{config.prefix_length} tokens, {config.prefix_position}" if config.prefix_length else "none",
            metrics=metrics or "None were recorded for this checkpoint.",
        )
    )

"""A small audiovisual world: pictures of things, the sounds they make, and captions of both.

Sixteen things sound (bell, siren, engine, rain, ...), four are silent (tree, house, road, mountain), and the wind is
heard but never drawn. A scene has one or two sounding things and at most two silent ones; a few scenes are quiet: only
silent things are seen and only the wind is heard. Pictures are drawn with Pillow, sounds synthesised with numpy, and
every scene follows from `(seed, split, variant, index)` alone.

A scene is described in two styles: what is *seen* ("a car beside a tree") and what is *heard* ("an engine runs"). A
captioner must meet both styles during its training on pictures, as LLaVA has: a soft prefix can choose a style, but
not teach a new wording.

Splits and their columns. In none of the first four does a sound meet a text:

| split          | columns                                                   | what for                         |
|----------------|-----------------------------------------------------------|----------------------------------|
| `captions`     | id, image, question, captions                             | training the captioner, CLIP     |
| `prefix`       | id, image, captions                                       | prefix tuning with 16 pairs      |
| `video`        | id, audio, frames                                         | alignment                        |
| `distillation` | id, audio, frames                                         | pseudo-captions and distillation |
| `supervised`   | id, audio, captions                                       | the supervised upper bound       |
| `test`         | id, audio, image, captions, seen_captions, labels, things | evaluation                       |

Column formats: `id` str; `audio` `{"path": None, "bytes": WAV}` (mono, 16 kHz, 16 bit); `image` and `frames` RGB
pictures (`datasets.Image`); `captions` five of what is heard, `seen_captions` five of what is seen; in the split
`captions` they answer `question`, which asks for what is seen in even rows and for what is heard in odd rows; `labels`
the names of the things heard, the wind included; `things` a list of `{"name", "box", "mask", "sounds"}`, the box
`[left, top, right, bottom]` in pixels, the mask a grey picture of how much of each pixel the thing covers.

Variants: `standard`; `three` (three sounding things at once); and, for the test split alone, `unseen_combinations`
(pairs that no other variant or split shows together), `unseen_timbres` (voices beyond the range of the others) and
`loud_noise`.

Example:
    >>> videos = sounding_world("video", 1000, cache_dir="runs/demo/data")
    >>> test = sounding_world("test", 200, variant="unseen_combinations")
"""

from datasets_scripts.sounding_world.captions import HEARD_QUESTIONS, SEEN_QUESTIONS, vocabulary
from datasets_scripts.sounding_world.dataset import DEFAULT_SIZES, sounding_world
from datasets_scripts.sounding_world.scenes import SPLITS, VARIANTS, Scene, scene
from datasets_scripts.sounding_world.things import LABELS, SILENT, SOUNDING, SYNONYMS, THINGS, WIND, Thing

__all__ = [
    "DEFAULT_SIZES",
    "HEARD_QUESTIONS",
    "LABELS",
    "SEEN_QUESTIONS",
    "SILENT",
    "SOUNDING",
    "SPLITS",
    "SYNONYMS",
    "THINGS",
    "VARIANTS",
    "WIND",
    "Scene",
    "Thing",
    "scene",
    "sounding_world",
    "vocabulary",
]

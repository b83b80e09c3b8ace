"""The things of the world: what each is called, how it looks and how it sounds."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from datasets_scripts.sounding_world import pictures, sounds
from datasets_scripts.sounding_world.pictures import Colour, Pen
from datasets_scripts.sounding_world.sounds import Voice

Drawer = Callable[[Pen, Colour], None]
Sounder = Callable[[np.random.Generator, Voice, int], np.ndarray]


@dataclass(frozen=True)
class Thing:
    """One kind of thing.

    Attributes:
        name: The label.
        seen: How a caption names what is seen, empty for what cannot be seen.
        heard: How a caption names what is heard, empty for what makes no sound.
        verbs: What it does when it is heard, as (present, continuous).
        colour: Hue, saturation and value around which the drawn colour varies.
        draw: Draws it.
        sound: Sounds it.
    """

    name: str
    seen: str = ""
    heard: str = ""
    verbs: tuple[tuple[str, str], ...] = ()
    colour: tuple[float, float, float] = (0, 0, 0)
    draw: Drawer = pictures.nothing
    sound: Sounder = sounds.nothing

    @property
    def synonyms(self) -> frozenset[str]:
        """The words that name the thing in a caption of either style."""
        return frozenset(phrase.split()[-1] for phrase in (self.seen, self.heard) if phrase)


# fmt: off
SOUNDING = (
    Thing("bell", "a bell", "a bell", (("rings", "is ringing"), ("chimes", "is chiming")),
          (0.6, 0.1, 0.75), pictures.bell, sounds.bell),
    Thing("siren", "a siren", "a siren", (("wails", "is wailing"), ("howls", "is howling")),
          (0.0, 0.85, 0.9), pictures.siren, sounds.siren),
    Thing("engine", "a car", "an engine", (("runs", "is running"), ("rumbles", "is rumbling")),
          (0.2, 0.8, 0.85), pictures.car, sounds.engine),
    Thing("rain", "a cloud", "rain", (("falls", "is falling"), ("patters", "is pattering")),
          (0.66, 0.25, 0.4), pictures.cloud, sounds.rain),
    Thing("clock", "a clock", "a clock", (("ticks", "is ticking"),),
          (0.64, 0.8, 0.35), pictures.clock, sounds.clock),
    Thing("drum", "a drum", "a drum", (("beats", "is beating"), ("pounds", "is pounding")),
          (0.97, 0.7, 0.6), pictures.drum, sounds.drum),
    Thing("bird", "a bird", "a bird", (("sings", "is singing"), ("chirps", "is chirping")),
          (0.92, 0.45, 0.95), pictures.bird, sounds.bird),
    Thing("whistle", "a whistle", "a whistle", (("blows", "is blowing"), ("trills", "is trilling")),
          (0.44, 0.85, 0.8), pictures.whistle, sounds.whistle),
    Thing("bee", "a bee", "a bee", (("buzzes", "is buzzing"), ("hums", "is humming")),
          (0.14, 0.85, 0.95), pictures.bee, sounds.bee),
    Thing("telephone", "a telephone", "a telephone", (("rings", "is ringing"),),
          (0.88, 0.7, 0.75), pictures.telephone, sounds.telephone),
    Thing("waves", "the sea", "waves", (("roll", "are rolling"), ("break", "are breaking")),
          (0.57, 0.8, 0.7), pictures.sea, sounds.waves),
    Thing("dog", "a dog", "a dog", (("barks", "is barking"),),
          (0.08, 0.6, 0.6), pictures.dog, sounds.dog),
    Thing("cat", "a cat", "a cat", (("meows", "is meowing"),),
          (0.09, 0.75, 0.95), pictures.cat, sounds.cat),
    Thing("frog", "a frog", "a frog", (("croaks", "is croaking"),),
          (0.28, 0.75, 0.7), pictures.frog, sounds.frog),
    Thing("train", "a train", "a train", (("puffs", "is puffing"), ("rolls", "is rolling")),
          (0.36, 0.7, 0.5), pictures.train, sounds.train),
    Thing("owl", "an owl", "an owl", (("hoots", "is hooting"), ("calls", "is calling")),
          (0.76, 0.4, 0.55), pictures.owl, sounds.owl),
)
# fmt: on
SILENT = (
    Thing("tree", "a tree", colour=(0.33, 0.7, 0.5), draw=pictures.tree),
    Thing("house", "a house", colour=(0.11, 0.35, 0.9), draw=pictures.house),
    Thing("road", "a road", colour=(0.6, 0.05, 0.4), draw=pictures.road),
    Thing("mountain", "a mountain", colour=(0.65, 0.2, 0.55), draw=pictures.mountain),
)
WIND = Thing("wind", heard="the wind", verbs=(("blows", "is blowing"), ("howls", "is howling")), sound=sounds.wind)
THINGS = {thing.name: thing for thing in (*SOUNDING, *SILENT, WIND)}
LABELS = tuple(thing.name for thing in (*SOUNDING, WIND))
SYNONYMS = {label: THINGS[label].synonyms for label in LABELS}
"""Label to the words that name it in a caption of either style."""

# Every thing is in exactly one of these pairs, so none is rarer than another in training. The two of a pair differ in
# colour: where they do not, nothing in training ever asks to tell them apart in one picture.
HELD_OUT_PAIRS = frozenset(
    frozenset((thing.name, SOUNDING[(index + 8) % len(SOUNDING)].name)) for index, thing in enumerate(SOUNDING)
)

"""Scenes of a single thing."""

from datasets_scripts.sounding_world import SOUNDING, Scene


def alone(thing, number, variant="standard"):
    return Scene((thing,), (thing,), ((0.5, 0.5, 0.4),), variant, (7, SOUNDING.index(thing), number, 0))

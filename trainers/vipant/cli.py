"""The command `vipant`: train, index a sound library, search it, name sounds, curate captions, evaluate."""

import sys
from collections.abc import Sequence

from trainers.cli import handed_on, new_app, new_group, run_app

app = new_app("vipant", "Sound, pictures and text in one space: search, zero-shot classification, curation.")
handed_on(app, "index", "modeling_vipant.cli", "Index a folder of sounds, or bring its index up to date.", "index")
handed_on(app, "search", "modeling_vipant.cli", "Find sounds by text, sound or picture.", "search")
handed_on(app, "classify", "modeling_vipant.cli", "Name sounds by labels of your own.", "classify")

train = new_group(app, "train", "Train by a recipe.")
handed_on(train, "contrastive", "trainers.vipant.contrastive", "Pull sound, pictures and captions together.")
handed_on(train, "tagging", "trainers.vipant.tagging", "Fine-tune a classifier of sounds.")
handed_on(app, "curate", "trainers.vipant.curate_captions", "Find captions for videos without a pair.")
handed_on(app, "evaluate", "trainers.vipant.evaluate", "Retrieval and zero-shot classification.")
handed_on(app, "convert", "modeling_vipant.convert_original", "Convert the authors' checkpoints.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_app(app, arguments)


if __name__ == "__main__":
    sys.exit(main())

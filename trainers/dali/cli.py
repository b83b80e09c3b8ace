"""The command `dali`: build a model, prepare data, train, caption, explain, evaluate."""

import sys
from collections.abc import Sequence

import typer

from trainers.cli import handed_on, new_app, new_group, run_app

app = new_app("dali", "Captions for sound, learnt from video without a single audio-text pair.")
handed_on(app, "caption", "modeling_dali.cli", "Caption sounds and videos.", "caption")
handed_on(app, "explain", "modeling_dali.cli", "Show where in a video's picture its sound is.", "explain")

data = new_group(app, "data", "From videos or public data sets to training rows.")
handed_on(data, "prepare", "datasets_scripts.prepare", "Cut videos into clips of sound and frames, in shards.")
handed_on(data, "download", "datasets_scripts.download", "Download the clips of an AudioSet-style index.")
handed_on(data, "check", "datasets_scripts.check", "Check a folder of shards.")
handed_on(data, "filter", "datasets_scripts.filter_pairs", "Drop clips whose picture does not fit the sound.")
handed_on(data, "build", "datasets_scripts.build", "Build a public data set, or rows from a CSV file.")

train = new_group(app, "train", "Train one stage by its recipe.")
handed_on(train, "prefix", "trainers.dali.prefix_tuning", "Stage 1a: soft tokens that ask for the sound.")
handed_on(train, "align", "trainers.dali.alignment", "Stage 1b: an audio encoder whose tokens read like image tokens.")
handed_on(train, "distill", "trainers.dali.distillation", "Stage 2: the audio projector learns the pseudo-captions.")
handed_on(app, "pseudo-caption", "trainers.dali.pseudo_captions", "Stage 2: caption videos from picture and sound.")
handed_on(app, "evaluate", "trainers.dali.evaluate", "Caption a data set and score the captions.")
handed_on(app, "convert", "modeling_dali.convert_original", "Convert the authors' weights.")


@app.command("run")
def run_recipe(
    recipe: str = typer.Argument(help="A YAML file, or the name of a recipe that comes with the project."),
    model: str = typer.Option(None, help="The captioner of pictures: folder or Hub id."),
    videos: str = typer.Option(None, help="Folder of videos, list of files, or index in AudioSet's format."),
    dataset: str = typer.Option(None, help="Prepared clips in place of videos."),
    prefix_dataset: str = typer.Option(None, "--prefix_dataset", help="Pictures with captions of their sound."),
    audio_encoder: str = typer.Option(None, "--audio_encoder", help="What the audio encoder starts from."),
    output_dir: str = typer.Option(None, "--output_dir", help="Folder of everything the run makes."),
    dtype: str = typer.Option(None, help="Of the frozen weights."),
    seed: int = typer.Option(None, help="Of all stages."),
) -> None:
    """All stages by one recipe, from videos to a captioner; run it again to go on after an interruption."""
    given = dict(locals())
    from trainers.dali.run import read_run, run

    config = read_run(given.pop("recipe"), given)
    run(config)
    typer.echo(
        f"The captioner is in {config.output_dir}/model. Try: dali caption FILE --model {config.output_dir}/model"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_app(app, arguments)


if __name__ == "__main__":
    sys.exit(main())

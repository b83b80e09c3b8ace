"""The command `dali`: build a model, prepare data, train, caption, explain, evaluate."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from trainers.cli import handed_on, new_app, new_group, run_app

app = new_app("dali", "Captions for sound, learnt from video without a single audio-text pair.")
MODEL = typer.Option(help="A DALI model: folder or Hub id.")
FILES = typer.Argument(help="Sounds and videos: files, folders, URLs.")
DEVICE = typer.Option(help="Such as cpu or cuda:1; by default a GPU where there is one.")


@app.command("caption")
def caption(
    files: Annotated[list[str], FILES],
    model: Annotated[str, MODEL],
    image: Annotated[str | None, typer.Option(help="A picture of the scene, used with every file.")] = None,
    with_video: Annotated[bool, typer.Option("--with-video", help="Use the middle frame of each video.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows at a time.")] = 8,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest caption.")] = None,
    output: Annotated[str | None, typer.Option(help="File to write, or a folder for subtitles.")] = None,
    kind: Annotated[
        str | None, typer.Option("--format", help="text, jsonl, csv, srt, vtt or html; --output's ending says it too.")
    ] = None,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Caption sounds and videos, a line for each window of the sound."""
    given = dict(locals())
    from trainers.dali.caption import run_caption

    raise typer.Exit(run_caption(**given))


@app.command("explain")
def explain(
    files: Annotated[list[str], FILES],
    model: Annotated[str, MODEL],
    image: Annotated[str | None, typer.Option(help="A picture in place of the middle frame.")] = None,
    start: Annotated[float, typer.Option(help="Where in the sound to begin, in seconds.")] = 0.0,
    output: Annotated[str, typer.Option(help="Folder of the pictures FILE.where.png.")] = ".",
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Show where in a video's picture its sound is."""
    given = dict(locals())
    from trainers.dali.caption import run_explain

    raise typer.Exit(run_explain(**given))


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
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that comes with the project.")],
    model: Annotated[str | None, typer.Option(help="The captioner of pictures: folder or Hub id.")] = None,
    videos: Annotated[str | None, typer.Option(help="Folder, list of files, or index in AudioSet's format.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Prepared clips in place of videos.")] = None,
    prefix_dataset: Annotated[
        str | None, typer.Option("--prefix_dataset", help="Pictures with captions of their sound.")
    ] = None,
    audio_encoder: Annotated[
        str | None, typer.Option("--audio_encoder", help="What the audio encoder starts from.")
    ] = None,
    output_dir: Annotated[str | None, typer.Option("--output_dir", help="Folder of everything the run makes.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the frozen weights.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all stages.")] = None,
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

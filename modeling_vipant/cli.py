"""Command line of VIP-ANT: index a sound library, search it, name sounds.

vipant index FOLDER --model DIR
vipant search "rain on a tin roof" --library FOLDER [--html page.html]
vipant search --audio clip.wav | --image photo.jpg --library FOLDER
vipant classify clip.wav --labels dog,rain,bell --model DIR
"""

import argparse
import html
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from datasets_scripts.commands import run_command
from modeling_vipant.library import (
    Embedder,
    Hit,
    LibraryError,
    SoundLibrary,
    check_labels,
    check_model,
    classify,
    index_folder,
)


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="vipant", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    index = commands.add_parser("index", help="index a folder of sounds, or bring its index up to date")
    index.add_argument("folder", type=Path)
    index.add_argument("--model", help="VIP-ANT model: folder or Hub name (an existing index remembers its own)")
    index.add_argument("--index", type=Path, help="folder of the index (default: FOLDER/.vipant)")
    index.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that read files")

    search = commands.add_parser("search", help="find sounds by text, sound or picture")
    query = search.add_mutually_exclusive_group(required=True)
    query.add_argument("text", nargs="?", help="what to look for, in words")
    query.add_argument("--audio", type=Path, help="find sounds like this one")
    query.add_argument("--image", type=Path, help="find sounds that go with this picture")
    search.add_argument("--library", type=Path, default=Path(), help="the indexed folder (default: this one)")
    search.add_argument("--index", type=Path, help="folder of the index (default: LIBRARY/.vipant)")
    search.add_argument("--model", help="model to use instead of the one the index names")
    search.add_argument("--top", type=int, default=10, help="number of results")
    search.add_argument("--json", action="store_true", help="print JSON")
    search.add_argument("--html", type=Path, metavar="PAGE", help="write a page with players")

    classify_ = commands.add_parser("classify", help="name sounds by labels of your own")
    classify_.add_argument("files", type=Path, nargs="+")
    classify_.add_argument("--labels", required=True, help="comma-separated: dog,rain,church_bells")
    classify_.add_argument("--model", required=True, help="VIP-ANT model: folder or Hub name")
    classify_.add_argument("--prompt", default="the sound of {}", help="sentence around a label, {} for the label")
    classify_.add_argument("--json", action="store_true", help="print JSON")

    for command in (index, search, classify_):
        command.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    return parser


def run_index(args: argparse.Namespace) -> int:
    """`vipant index`."""
    index = args.index or args.folder / ".vipant"
    if args.model is None and not (index / "index.json").exists():
        raise LibraryError("a new index needs --model")
    model = args.model or SoundLibrary.load(index).model_name

    def progress(batches: Iterable, total: int) -> Iterable:
        with tqdm(total=total, unit="file", disable=total == 0) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))

    report = index_folder(
        args.folder, index, Embedder.load(model, args.device), workers=args.workers, progress=progress
    )
    for path, reason in report.unreadable:
        print(f"not read: {path}: {reason}", file=sys.stderr)
    print(
        f"{index}: {report.added} new, {report.changed} changed, {report.unchanged} unchanged, "
        f"{report.removed} removed, {len(report.unreadable)} unreadable"
    )
    return 0


def run_search(args: argparse.Namespace) -> int:
    """`vipant search`."""
    if args.top < 1:
        raise LibraryError(f"--top {args.top} must be at least 1")
    if args.text is not None and not args.text.strip():
        raise LibraryError("the query is empty")
    index = args.index or args.library / ".vipant"
    library = SoundLibrary.load(index)
    embedder = Embedder.load(args.model or library.model_name, args.device)
    check_model(library, embedder.fingerprint(), embedder.name, index)
    if args.audio is not None:
        query, what = embedder.sounds([embedder.windows(args.audio)])[0], f"sounds like {args.audio.name}"
    elif args.image is not None:
        query, what = embedder.image(args.image)[0], f"sounds for {args.image.name}"
    else:
        query, what = embedder.texts([args.text])[0], args.text
    hits = library.search(query, args.top)
    if args.html is not None:
        args.html.write_text(page(what, hits, args.library, args.html.parent), encoding="utf-8")
    if args.json:
        print(json.dumps([asdict(hit) for hit in hits], ensure_ascii=False, indent=2))
    else:
        for rank, hit in enumerate(hits, start=1):
            print(f"{rank:4d}  {hit.score:6.3f}  {duration(hit.seconds):>8}  {hit.path}")
        if args.html is not None:
            print(f"wrote {args.html}")
    return 0


def run_classify(args: argparse.Namespace) -> int:
    """`vipant classify`."""
    labels = check_labels(args.labels.split(","))
    results = classify(Embedder.load(args.model, args.device), args.files, labels, args.prompt)
    if args.json:
        print(
            json.dumps({str(path): dict(result) for path, result in zip(args.files, results, strict=True)}, indent=2)
        )
        return 0
    for path, result in zip(args.files, results, strict=True):
        print(path)
        for label, probability in result:
            print(f"  {probability:6.1%}  {label}")
    return 0


def duration(seconds: float) -> str:
    """Minutes and seconds, as 0:03.2 or 12:40."""
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f}:{rest:04.1f}" if seconds < 60 else f"{minutes:.0f}:{int(rest):02d}"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: color-mix(in srgb, currentColor 15%, transparent); --bar: #3b7dd8; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere; }}
ol {{ list-style: none; padding: 0; }}
li {{ display: grid; grid-template-columns: 2.5rem 1fr minmax(14rem, 20rem); gap: .25rem 1rem; align-items: center;
      padding: .75rem 0; border-top: 1px solid var(--line); }}
.rank {{ text-align: right; opacity: .6; }}
.path {{ overflow-wrap: anywhere; }}
.score {{ display: flex; gap: .5rem; align-items: center; font-size: .875rem; opacity: .8; }}
.score meter {{ width: 6rem; }}
audio {{ width: 100%; height: 2.5rem; }}
@media (max-width: 40rem) {{ li {{ grid-template-columns: 2rem 1fr; }} audio {{ grid-column: 1 / -1; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
<ol>
{items}
</ol>
</body>
</html>
"""
ITEM = """<li><span class="rank">{rank}</span>
<div><div class="path">{path}</div>
<div class="score"><meter min="0" max="1" value="{value}" aria-label="similarity"></meter>
{score} · {duration}</div></div>
<audio controls preload="metadata" src="{source}" aria-label="{path}"></audio></li>"""


def page(query: str, hits: Sequence[Hit], library: Path, folder: Path) -> str:
    """An HTML page of results with players; sounds are linked relative to the folder the page lies in."""
    items = []
    for rank, hit in enumerate(hits, start=1):
        source = os.path.relpath((library / hit.path).resolve(), folder.resolve())
        items.append(
            ITEM.format(
                rank=rank,
                path=html.escape(hit.path),
                value=max(0.0, hit.score),
                score=f"{hit.score:.3f}",
                duration=duration(hit.seconds),
                source=html.escape(quote(source)),
            )
        )
    return PAGE.format(title=html.escape(query), items="\n".join(items))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `vipant index`, `search` or `classify`; returns the exit code."""
    runs = {"index": run_index, "search": run_search, "classify": run_classify}
    return run_command(build_parser(), lambda args: runs[args.command](args), arguments)


if __name__ == "__main__":
    sys.exit(main())

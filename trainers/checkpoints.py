"""Complete checkpoints: a manifest of files and checksums is written last, and read before training resumes.

A checkpoint holds what trains (`trained.safetensors`), optimizer, schedule and random states. One without a manifest
was cut off by a kill, and is deleted; one whose files do not fit the manifest is refused.
"""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging

from datasets_scripts.files import write_whole

logger = logging.get_logger(__name__)

TRAINED = "trained.safetensors"
MANIFEST = "manifest.json"


def write_manifest(folder: Path, settings: dict) -> None:
    """
    Declares a checkpoint complete.

    Args:
        folder (`Path`): The checkpoint, with everything written.
        settings (`dict`): What it was made with.
    """
    files = {str(path.relative_to(folder)): _checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    with write_whole(folder / MANIFEST) as path:
        path.write_text(json.dumps({"files": files, "settings": settings}, indent=1))


def read_manifest(folder: Path) -> dict:
    """
    The manifest of a checkpoint, held against its files.

    Raises:
        ValueError: if the checkpoint is incomplete or damaged; names the first file at fault.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        raise ValueError(f"{folder} is no complete checkpoint of a stage: it has no readable {MANIFEST}.") from None
    for name, checksum in manifest["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is incomplete: {name} is missing.")
        if _checksum(folder / name) != checksum:
            raise ValueError(f"{folder} is damaged: {name} is not as it was written.")
    return manifest


def last_complete(output_dir: str | Path) -> str | None:
    """
    The newest checkpoint of a run. Those that a kill has cut off are deleted.

    Args:
        output_dir (`str` or `Path`): Folder of the run.

    Raises:
        ValueError: if the newest checkpoint was written to its end and has been damaged since.
    """
    for checkpoint in reversed(sort_checkpoints(str(output_dir), PREFIX_CHECKPOINT_DIR)):
        if (Path(checkpoint) / MANIFEST).exists():
            try:
                read_manifest(Path(checkpoint))
            except ValueError as error:
                raise ValueError(f"{error} Delete this checkpoint to go on from the one before it.") from None
            return checkpoint
        logger.warning(f"{checkpoint} was cut off while it was written, and is deleted.")
        shutil.rmtree(checkpoint)
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def load_trained(parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor], source) -> None:
    """
    Copies tensors of a checkpoint into parameters.

    Args:
        parameters (`dict[str, nn.Parameter]`): What trains, by name.
        tensors (`dict[str, torch.Tensor]`): What the checkpoint holds, by name.
        source: The checkpoint, for messages.

    Raises:
        ValueError: if names or shapes differ; lists them. Nothing is copied then.
    """
    problems = [f"{name} is not in the checkpoint" for name in sorted(parameters.keys() - tensors.keys())]
    problems += [f"{name} does not train in this run" for name in sorted(tensors.keys() - parameters.keys())]
    problems += [
        f"{name} has the shape {list(tensors[name].shape)}, the model's is {list(parameters[name].shape)}"
        for name in sorted(parameters.keys() & tensors.keys())
        if tensors[name].shape != parameters[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{source} does not fit: {'; '.join(problems[:5])}{more}.")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])

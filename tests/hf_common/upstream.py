"""
transformers' own common tests, run on this project's classes.

The wheel leaves them out, the source distribution has them: `make hf-tests` unpacks that of the installed version
outside the tree. Nothing of it is kept here, and tests that need it are skipped where it is absent. The source
distribution has the `test_*_common.py` files only, so the two mixins that they import from folders below are replaced
by empty ones: what they test (generation and export) this project tests itself.
"""

import functools
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import transformers
from PIL import Image
from transformers import testing_utils

from tests.modeling_dali.test_audio_io import write_video

SOURCE = Path(
    os.environ.get("TRANSFORMERS_SOURCE")
    or Path.home() / ".cache" / "dali-audio" / f"transformers-{transformers.__version__}"
)
PACKAGE = "transformers_tests"
ABSENT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def common_tests(name: str) -> ModuleType:
    """
    One module of transformers' common tests, such as `"test_modeling_common"`.

    Skips the calling test module where the source distribution is not at hand.
    """
    if not (SOURCE / "tests").is_dir():
        pytest.skip(f"no {SOURCE}: `make hf-tests` fetches transformers' common tests", allow_module_level=True)
    if PACKAGE not in sys.modules:
        add_module(PACKAGE, SOURCE / "tests")
        for module, mixin in ABSENT.items():
            add_module(f"{PACKAGE}.{module.partition('.')[0]}")
            setattr(add_module(f"{PACKAGE}.{module}"), mixin, type(mixin, (), {}))
    return importlib.import_module(f"{PACKAGE}.{name}")


def add_module(name: str, *folders: Path) -> ModuleType:
    """Adds a package that has no code of its own to the imported modules."""
    module = ModuleType(name)
    module.__path__ = [str(folder) for folder in folders]
    sys.modules[name] = module
    return module


def without(**reasons: str) -> Callable[[type], type]:
    """Class decorator: skips inherited tests that do not apply, each with its reason."""

    def decorate(test_class: type) -> type:
        for name, reason in reasons.items():
            for test in filter(re.compile(rf"{name}(_\d+.*)?").fullmatch, dir(test_class)):  # and its parametrisations
                setattr(test_class, test, skipped(getattr(test_class, test), reason))
        return test_class

    return decorate


def skipped(test: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """The test `test`, skipped for `reason`."""

    @functools.wraps(test)
    def skip(self: Any, *args: Any, **kwargs: Any) -> None:
        self.skipTest(reason)

    return skip


def common_processor_tests() -> ModuleType:
    """
    transformers' common processor tests.

    They fetch a few pictures, sounds and videos from the Hub, in whose place small ones are made; and they skip sound
    where librosa is absent, which this project does not need to read it.
    """
    add_module("fetch_hub_objects_for_ci").url_to_local_path = local_file
    testing_utils.require_librosa = lambda test: test
    return common_tests("test_processing_common")


@functools.cache
def local_file(url: str) -> str:
    """A small file of the kind that `url` names."""
    path = Path(tempfile.mkdtemp()) / Path(url).name
    if path.suffix in (".png", ".jpg"):
        Image.new("RGB", (30, 20), "green").save(path)
    elif path.suffix in (".wav", ".mp3"):
        soundfile.write(path, np.random.default_rng(0).standard_normal(8_000) * 0.1, 16_000)
    elif path.suffix == ".mp4":
        write_video(path)
    return str(path)

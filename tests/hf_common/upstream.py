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
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

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

"""Writes VIP-ANT's copy of the audio front end from its one source.

    python -m modeling_vipant.sync_front_end

Files on the Hub are flat and cannot import another package, so `feature_extraction_vipant.py` is a copy of
`modeling_dali/feature_extraction_dali.py` with VIP-ANT's name and numbers. A test fails when the two drift apart.
"""

import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "modeling_dali" / "feature_extraction_dali.py"
TARGET = Path(__file__).with_name("feature_extraction_vipant.py")
HEADER = """\
# Made from modeling_dali/feature_extraction_dali.py by `python -m modeling_vipant.sync_front_end`: edit that file.
"""
REPLACEMENTS = {
    "DaliFeatureExtractor": "VipAntFeatureExtractor",
    "num_frames: int = 1024": "num_frames: int = 1000",
    "mean: float = -5.081": "mean: float = -4.93839311",
    "std: float = 4.4849": "std: float = 5.75751113",
    "cut to 1024 frames": "cut to 1000 frames",
    "The defaults are those of DALI and CAV-MAE": "The defaults are those of VIP-ANT",
    "10.24 s with the default numbers": "10 s with the default numbers",
    "CAV-MAE's numbers": "VIP-ANT's numbers",
}


def generate() -> str:
    """The text of the copy.

    Raises:
        ValueError: If the source no longer contains a text that is to be replaced.
    """
    text = SOURCE.read_text()
    for old, new in REPLACEMENTS.items():
        if old not in text:
            raise ValueError(f"{SOURCE} no longer contains {old!r}; update REPLACEMENTS in {Path(__file__).name}")
        text = text.replace(old, new)
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(TARGET), "-"],
        input=HEADER + text,
        capture_output=True,
        text=True,
        check=True,
    )
    return formatted.stdout


if __name__ == "__main__":
    TARGET.write_text(generate())
    print(f"wrote {TARGET}")

"""Worked examples; they are run from a clone and are not part of the wheel."""

"""Report."""


def write_report(demo, results) -> None:
    """Report."""

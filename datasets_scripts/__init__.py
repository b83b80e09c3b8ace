"""Data: builders of public data sets, and everything from raw video to training records. Knows no model."""

"""Builders of public data sets, and of any folder or table: each gives a `datasets.Dataset` of files."""

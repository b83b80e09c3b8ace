"""Wrappers for the field's evaluation harnesses, none of which this project depends on."""

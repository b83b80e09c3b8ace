"""A metric for `evaluate.load`, in the layout that it expects of a folder."""

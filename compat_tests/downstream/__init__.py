"""Do libraries that are written for TransformerLens compute the same on lensbridge? ``run.py`` is where to start."""

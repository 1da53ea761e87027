"""One library each: a function ``run`` that uses it on the bundled model and returns what came out, by name."""

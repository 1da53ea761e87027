"""Does lensbridge work on a server that runs the model elsewhere? A stand-in for NDIF, and how tests reach it."""

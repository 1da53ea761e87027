"""What hook points does a model have, and which models are there?

``lensbridge hooks MODEL`` and ``lensbridge models``. Both answer from what is installed: of a checkpoint only the
config is read where its family has a record.
"""

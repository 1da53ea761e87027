"""Running a HuggingFace model through nnsight and showing its values to hook points.

This package is the only code that knows nnsight, and it knows nothing of TransformerLens' methods: it is given hook
points by name, a basis, and what to run.
"""

from . import company as company  # isort: skip  # before nnsight

from .run import Engine as Engine
from .run import Request as Request

"""What is there besides models: which of them can be loaded (`model_registry`), and whole analyses (`analysis`)?"""

from . import analysis as analysis
from . import model_registry as model_registry

__all__ = ["analysis", "model_registry"]

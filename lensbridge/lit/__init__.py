"""How is a hooked model looked at in the Learning Interpretability Tool?

Models and datasets for Google's LIT (https://pair-code.github.io/lit), under TransformerLens' names. ``lit-nlp`` is not
among the dependencies of lensbridge; what needs it raises an ImportError that says how to get it.
"""

from .constants import INPUT_FIELDS as INPUT_FIELDS
from .constants import OUTPUT_FIELDS as OUTPUT_FIELDS
from .dataset import InductionDataset as InductionDataset
from .dataset import IOIDataset as IOIDataset
from .dataset import PromptCompletionDataset as PromptCompletionDataset
from .dataset import SimpleTextDataset as SimpleTextDataset
from .dataset import wrap_for_lit as wrap_for_lit
from .model import HookedTransformerLIT as HookedTransformerLIT
from .model import HookedTransformerLITBatched as HookedTransformerLITBatched
from .model import HookedTransformerLITConfig as HookedTransformerLITConfig
from .server import LITWidget as LITWidget
from .server import serve as serve
from .utils import check_lit_installed as check_lit_installed

__all__ = [
    "INPUT_FIELDS",
    "OUTPUT_FIELDS",
    "HookedTransformerLIT",
    "HookedTransformerLITBatched",
    "HookedTransformerLITConfig",
    "IOIDataset",
    "InductionDataset",
    "LITWidget",
    "PromptCompletionDataset",
    "SimpleTextDataset",
    "check_lit_installed",
    "serve",
    "wrap_for_lit",
]

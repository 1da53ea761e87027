"""lensbridge: TransformerLens' HookedTransformer API on unmodified HuggingFace models, run through nnsight."""

from . import module_names
from . import utilities as utilities
from . import utils as utils
from .activation_cache import ActivationCache as ActivationCache
from .cache import TransformerLensKeyValueCache as TransformerLensKeyValueCache
from .cache import TransformerLensKeyValueCacheEntry as TransformerLensKeyValueCacheEntry
from .config import HookedTransformerConfig as HookedTransformerConfig
from .config import TransformerLensConfig as TransformerLensConfig
from .factored_matrix import FactoredMatrix as FactoredMatrix
from .hook_points import HookPoint as HookPoint
from .hook_points import LensHandle as LensHandle
from .hooked_root_module import HookedRootModule as HookedRootModule
from .model import HookedTransformer as HookedTransformer
from .processing import Processing as Processing

__version__ = "0.1.0"

module_names.register(__name__)

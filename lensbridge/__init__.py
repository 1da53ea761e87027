"""lensbridge: TransformerLens' HookedTransformer API on unmodified HuggingFace models, run through nnsight."""

from . import components as components
from . import conversion_utils as conversion_utils
from . import evals as evals
from . import factories as factories
from . import head_detector as head_detector
from . import lenses as lenses
from . import lit as lit
from . import module_names
from . import patching as patching
from . import supported_models as supported_models
from . import tools as tools
from . import train as train
from . import utilities as utilities
from . import utils as utils
from .activation_cache import ActivationCache as ActivationCache
from .cache import TransformerLensKeyValueCache as TransformerLensKeyValueCache
from .cache import TransformerLensKeyValueCacheEntry as TransformerLensKeyValueCacheEntry
from .config import HookedTransformerConfig as HookedTransformerConfig
from .config import TransformerBridgeConfig as TransformerBridgeConfig
from .config import TransformerLensConfig as TransformerLensConfig
from .encoders import BertNextSentencePrediction as BertNextSentencePrediction
from .encoders import HookedAudioEncoder as HookedAudioEncoder
from .encoders import HookedEncoder as HookedEncoder
from .encoders import HookedEncoderDecoder as HookedEncoderDecoder
from .extension import load_ipython_extension as load_ipython_extension
from .extension import unload_ipython_extension as unload_ipython_extension
from .factored_matrix import FactoredMatrix as FactoredMatrix
from .hook_points import HookPoint as HookPoint
from .hook_points import LensHandle as LensHandle
from .hooked_root_module import HookedRootModule as HookedRootModule
from .model import HookedTransformer as HookedTransformer
from .processing import Processing as Processing
from .svd_interpreter import SVDInterpreter as SVDInterpreter

__version__ = "0.1.0"

# Without it, `from lensbridge import *` would also bind submodules, such as `model` and `tokens`.
__all__ = [
    "ActivationCache",
    "BertNextSentencePrediction",
    "FactoredMatrix",
    "HookPoint",
    "HookedAudioEncoder",
    "HookedEncoder",
    "HookedEncoderDecoder",
    "HookedRootModule",
    "HookedTransformer",
    "HookedTransformerConfig",
    "LensHandle",
    "Processing",
    "SVDInterpreter",
    "TransformerBridgeConfig",
    "TransformerLensConfig",
    "TransformerLensKeyValueCache",
    "TransformerLensKeyValueCacheEntry",
    "components",
    "conversion_utils",
    "evals",
    "factories",
    "head_detector",
    "lenses",
    "lit",
    "patching",
    "supported_models",
    "tools",
    "train",
    "utilities",
    "utils",
]

module_names.register(__name__)


def __getattr__(name: str) -> object:
    if name not in module_names.OLD_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[module_names.OLD_NAMES[name]]

"""Which analyses are there as one call?

Those of TransformerLens 3.9.0's that take a HookedTransformer. The others there are for its other model class, the
bridge, and read the modules that it has.
"""

from .direct_logit_attribution import DirectLogitAttribution as DirectLogitAttribution
from .direct_logit_attribution import direct_logit_attribution as direct_logit_attribution
from .direct_path_patching import get_act_patch_direct_path as get_act_patch_direct_path
from .direct_path_patching import get_act_patch_direct_path_all_sources as get_act_patch_direct_path_all_sources

__all__ = [
    "DirectLogitAttribution",
    "direct_logit_attribution",
    "get_act_patch_direct_path",
    "get_act_patch_direct_path_all_sources",
]

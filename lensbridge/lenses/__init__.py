"""What can be seen in a hidden state, and what happens if it is moved or pushed?

Known methods of interpretability as functions over the public API, a few lines each, with the paper in the docstring.

A *layer* means the residual stream where it enters that block, and ``n_layers``, -1 or None the stream that the last
block leaves, as in :class:`~lensbridge.activation_cache.ActivationCache`.
"""

from .attention import AttentionSummary as AttentionSummary
from .attention import attention_summary as attention_summary
from .logit_lens import logit_lens as logit_lens
from .patchscope import patchscope as patchscope
from .patchscope import patchscope_text as patchscope_text
from .steering import mean_difference as mean_difference
from .steering import steer as steer
from .steering import steered as steered
from .stream import residual_stream as residual_stream

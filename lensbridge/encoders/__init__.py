"""TransformerLens' encoders on unmodified HuggingFace models: BERT, T5, HuBERT and wav2vec 2.0.

A family is a file of data (`bert.py`, `t5.py`, `hubert.py`) in the terms of `record.py`. What serves it is common to
all: `layout.py` and `sites.py` bind its points to places, `weights.py` shows its parameters, `parts.py` builds its
components.
"""

from .hooked_audio_encoder import HookedAudioEncoder as HookedAudioEncoder
from .hooked_encoder import HookedEncoder as HookedEncoder
from .hooked_encoder_decoder import HookedEncoderDecoder as HookedEncoderDecoder
from .next_sentence import BertNextSentencePrediction as BertNextSentencePrediction

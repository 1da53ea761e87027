"""What is a model made of that nobody described?

    record = measured(hf_model)        an `Architecture`, measured by running the model on a few tokens
    print(write_record(record))        the source of a family's file

The run is recorded, operation by operation (`recording`, `flow`); the residual stream is followed through it from the
embedding to the head (`stream`, `ends`), and what is added to it is taken apart (`layers`, `attention`, `mlp`). What
comes out is written down as a record (`derive`) and checked (`checked`). Nothing is read off names, and nothing of
nnsight is used.
"""

from .fallback import given_record as given_record
from .fallback import measured as measured
from .fallback import measured_record as measured_record
from .fallback import refuse_unmeasurable as refuse_unmeasurable
from .source import write_record as write_record

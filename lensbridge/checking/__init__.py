"""Does a model show what its hook points promise?

    report = check_model(HookedTransformer.from_pretrained_no_processing("gpt2"))
    assert report.holds

runs the model on a few tokens and compares with the HuggingFace model's own forward, with the identities that hold
between points (design.md, section 5), and with what edits must do. ``lensbridge check`` prints it; the tests do it for
every family.
"""

from .hooking import hooked as hooked
from .known import KNOWN as KNOWN
from .outcome import Outcome as Outcome
from .report import GROUPS as GROUPS
from .report import Report as Report
from .report import check_model as check_model

"""The names of :mod:`lensbridge.utilities` under the module name that older notebooks import (``utils``)."""

from lensbridge.utilities import *  # noqa: F403
from lensbridge.utilities import __all__ as __all__

"""What does text look like that a model was trained on?

Two methods of `HookedTransformer`, around a small data set of texts in ``model.dataset``: loaded from the hub by the
model's architecture when it is first needed, or assigned by the user.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from .hub_datasets import explaining_absence
from .tokens import PaddingSide
from .utilities.defaults_utils import USE_DEFAULT_VALUE
from .utilities.hf_utils import get_dataset

#: HF class -> the name, for `get_dataset`, of data that is close to what its models were trained on.
TRAINING_DATA = {
    "neel": "c4_code",
    "neel-solu-old": "pile",
    "GPT2LMHeadModel": "openwebtext",
    "GPTNeoForCausalLM": "pile",
    "GPTNeoXForCausalLM": "pile",
    "GPTJForCausalLM": "pile",
    "OPTForCausalLM": "pile",
}


class SampleDataMethods:
    """Examples of training text, as methods of a model that has ``cfg`` and ``to_tokens``."""

    cfg: Any
    #: A data set of dicts with a "text", or None before one is loaded; assign any to use it.
    dataset: Any
    to_tokens: Any

    def load_sample_training_dataset(self, **kwargs: Any) -> Any:
        """Load some 10,000 texts like those that the model was trained on into ``self.dataset``, and return them.

        OpenWebText for GPT-2 and the Pile for OPT stand in for data that was not published; for some models it is the
        validation part. ``kwargs`` go to `utils.get_dataset` (``cache_dir``, ...).

        Raises:
            ValueError: no data set is known for the architecture.
            DatasetNotFoundError: (an OSError) the hub did not give it.
        """
        architecture = self.cfg.original_architecture
        if architecture not in TRAINING_DATA:
            raise ValueError(
                f"no data set is known for the architecture {architecture}: assign one to model.dataset, such as a "
                "list of {'text': ...}"
            )
        name = TRAINING_DATA[architecture]
        with explaining_absence(name, "assign data of your own to model.dataset, such as a list of {'text': ...}"):
            self.dataset = get_dataset(name, **kwargs)
        return self.dataset

    def sample_datapoint(
        self,
        tokenize: bool = False,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: PaddingSide = USE_DEFAULT_VALUE,
    ) -> str | Int[Tensor, "1 pos"]:
        """A random text of ``self.dataset``, which is loaded first if need be, or its tokens, cut at the context.

        It is drawn with numpy's global generator. ``prepend_bos`` and ``padding_side`` are for the tokens.
        """
        if self.dataset is None:
            self.load_sample_training_dataset()
        text = self.dataset[np.random.randint(0, len(self.dataset))]["text"]
        if not tokenize:
            return text
        return self.to_tokens(text, prepend_bos=prepend_bos, padding_side=padding_side, truncate=True)

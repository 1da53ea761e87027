"""Which HuggingFace model is inside of what was passed as one?

peft, torch.compile and the wrappers for several processes put an object around a model. Hooks need the model itself,
and where the object only passes calls on, that gives the same numbers. Where it does more, it is refused.
"""

from __future__ import annotations

import logging
from typing import Any

from .errors import UnsupportedModelError

#: What wrappers of several devices or processes are called, in whatever package.
PARALLEL = {
    "DataParallel": "it copies the model to several GPUs in each run",
    "DistributedDataParallel": "it exchanges gradients between processes around its own forward",
    "FullyShardedDataParallel": "it gathers weights in its own forward, and they are in pieces outside of it",
    "DeepSpeedEngine": "it keeps weights and gradients in its own way around the model's forward",
}


def unwrapped(hf_model: Any) -> Any:
    """The HuggingFace model inside of wrappers that only pass calls on; any other object as it is.

    Raises:
        UnsupportedModelError: for a wrapper that does more, with what to pass instead; or for one around a part of it.
    """
    while True:
        names = {cls.__name__ for cls in type(hf_model).__mro__}
        for name in names & PARALLEL.keys():
            raise UnsupportedModelError(
                f"{name} around a model is not supported: {PARALLEL[name]}. Pass the model inside, its .module, or "
                "spread a model with device_map= or tp_plan="
            )
        if "OptimizedModule" in names:
            logging.warning(
                "the model is compiled: its points are shown in runs that are not, of the model inside "
                "(hf_model._orig_mod), because hooks do not reach into compiled code"
            )
            hf_model = hf_model._orig_mod
        elif any(cls.__module__.startswith("peft.") for cls in type(hf_model).__mro__):
            hf_model = _without_peft(hf_model)
        else:
            break
    if hasattr(hf_model, "named_modules"):
        _refuse_compiled_parts(hf_model)
    return hf_model


def _refuse_compiled_parts(hf_model: Any) -> None:
    """Refuse a model in which torch.compile's result stands in a module's place, where modules have other paths."""
    for path, module in hf_model.named_modules():
        if "OptimizedModule" in {cls.__name__ for cls in type(module).__mro__}:
            raise UnsupportedModelError(
                f"{path!r} in this model is what torch.compile has made of a module, and hooks do not reach into it. "
                f"Put the module itself back, hf_model.set_submodule({path!r}, "
                f"hf_model.get_submodule({path!r})._orig_mod), and compile it in place if you want it compiled in runs "
                "without hooks: module.compile()"
            )


def _without_peft(peft_model: Any) -> Any:
    """The model into which peft has put its layers."""
    configs = getattr(peft_model, "peft_config", {})
    tokens = [name for name, config in configs.items() if getattr(config, "is_prompt_learning", False)]
    if tokens:
        raise UnsupportedModelError(
            f"the adapter {tokens[0]!r} ({type(configs[tokens[0]]).__name__}) puts learned tokens or keys before the "
            "text, in the forward of peft's own model, so that positions are not the text's. Adapters that are layers "
            "of the model (LoRA, say) can be hooked"
        )
    return peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model.model

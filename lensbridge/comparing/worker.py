"""What does one tool do with a model, in a process that has loaded nothing else?

Run as a program, by its path, with the path of a request (JSON); it writes its answer beside it. So each tool's memory
is its own, TransformerLens is imported where lensbridge is not, and a tool that cannot load the model takes nothing
else down. Nothing of lensbridge is imported here but by the part that runs lensbridge.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder comes first otherwise, with modules that are named as others are.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]

import contextlib
import importlib
import io
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any
from unittest import mock

MIB = 2**20
#: Seconds after which no further round of a task is made, once there are three.
PATIENCE = 4.0
FEWEST = 3
#: Characters of an error that are told.
LONGEST = 300


def memory_mib(field: str) -> float:
    """VmHWM (the largest so far) or VmRSS (now) of this process; where there is no /proc, the largest for both."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(row for row in status.read_text().splitlines() if row.startswith(field))
        return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:
        return float("nan")
    scale = MIB if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def stored_mib(module: Any) -> float:
    """What a module's parameters and buffers take, shared memory counted once."""
    storages = {}
    for tensor in (*module.parameters(), *module.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(storages.values()) / MIB


# --- loading ----------------------------------------------------------------------------------------------------------


def load_huggingface(request: dict[str, Any], attention: str | None = None) -> Any:
    """The plain model, as the comparison has it."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        request["location"],
        dtype=getattr(torch, request["dtype"]),
        attn_implementation=attention or request["attention"],
        **request["loaded_with"],
    )
    return model.to(request["device"]).eval()


def load_lensbridge(request: dict[str, Any], processing: bool) -> Any:
    """The hooked model."""
    torch = importlib.import_module("torch")
    lensbridge = importlib.import_module("lensbridge")
    cls = lensbridge.HookedTransformer
    load = cls.from_pretrained if processing else cls.from_pretrained_no_processing
    model = load(request["location"], dtype=getattr(torch, request["dtype"]), device=request["device"])
    model.hf_model.eval()
    return model


def load_transformer_lens(request: dict[str, Any], processing: bool) -> Any:
    """TransformerLens' model on the same weights.

    By the name that TransformerLens has for it; without one, its own reading of local directories is used, which
    knows the families whose sizes it takes from a config.
    """
    torch = importlib.import_module("torch")
    package = importlib.import_module("transformer_lens")
    loading = importlib.import_module("transformer_lens.loading_from_pretrained")
    hf_model = load_huggingface(request, "eager")
    name = request["reference_name"]
    # The config of these weights, wherever they lie.
    config = with_old_names(hf_model)

    def read_config(*args: Any, **kwargs: Any) -> Any:
        return config

    patches: list[Any] = [mock.patch.object(loading.AutoConfig, "from_pretrained", read_config)]
    describe = loading.get_pretrained_model_config

    def without_tokenizer(*args: Any, **kwargs: Any) -> Any:
        # It is given tokens, and would look for a tokenizer that the model may not have.
        cfg = describe(*args, **kwargs)
        cfg.tokenizer_name = None
        return cfg

    patches.append(mock.patch.object(loading, "get_pretrained_model_config", without_tokenizer))
    if name is None:
        name = neutral_path(request)
        patches.append(mock.patch.object(loading, "get_official_model_name", lambda path: path))
    cls = package.HookedTransformer
    load = cls.from_pretrained if processing else cls.from_pretrained_no_processing
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        return load(
            name, hf_model=hf_model, tokenizer=None, dtype=getattr(torch, request["dtype"]), device=request["device"]
        )


def neutral_path(request: dict[str, Any]) -> str:
    """The model's directory by a path without words that TransformerLens would take for the name of a family."""
    link = Path(request["folder"]) / "model"
    if not link.exists():
        link.symlink_to(Path(request["directory"]).resolve(), target_is_directory=True)
    return str(link)


def with_old_names(hf_model: Any) -> Any:
    """A model's config with what TransformerLens looks for where transformers 4 had it."""
    config = hf_model.config
    config.architectures = [type(hf_model).__name__]
    rope = getattr(config, "rope_parameters", None) or {}
    for name, value in (
        ("n_ctx", getattr(config, "n_positions", None)),
        ("partial_rotary_factor", rope.get("partial_rotary_factor")),
    ):
        if value is not None and not hasattr(config, name):
            setattr(config, name, value)
    return config


# --- time and memory --------------------------------------------------------------------------------------------------


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Load one tool's model, time its tasks on one prompt, and say what it took."""
    import torch

    tool, cuda = request["tool"], request["device"].startswith("cuda")
    imported = import_seconds(request)
    before = memory_mib("VmRSS")
    start = time.perf_counter()
    if tool == "HuggingFace":
        model = load_huggingface(request)
        stored = stored_mib(model)
    else:
        load = load_lensbridge if tool == "lensbridge" else load_transformer_lens
        model = load(request, request["processing"])
        stored = stored_mib(model.hf_model if tool == "lensbridge" else model)
    loaded = time.perf_counter() - start
    tokens = torch.tensor(request["tokens"], device=request["device"])
    times = {}
    with torch.no_grad():
        for name, task in tasks(request, model, tokens).items():
            times[name] = rounds(task, request["rounds"], cuda)
    memory = {"parameters": stored, "before loading": before, "peak": memory_mib("VmHWM")}
    if cuda:
        memory["GPU peak"] = torch.cuda.max_memory_allocated() / MIB
    return {
        "import_seconds": imported,
        "load_seconds": loaded,
        "milliseconds": {name: 1000 * statistics.median(values) for name, values in times.items()},
        "fastest": {name: 1000 * min(values) for name, values in times.items()},
        "rounds": {name: len(values) for name, values in times.items()},
        "mebibytes": memory,
    }


def import_seconds(request: dict[str, Any]) -> float:
    """How long the tool's own package takes to import, after torch, transformers and the module of the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tool, config = request["tool"], AutoConfig.from_pretrained(request["location"])
    # What transformers imports when it first needs a class of models is no part of loading one.
    AutoModelForCausalLM._model_mapping.get(type(config), None)
    start = time.perf_counter()
    if tool != "HuggingFace":
        importlib.import_module("lensbridge" if tool == "lensbridge" else "transformer_lens")
    return time.perf_counter() - start


def tasks(request: dict[str, Any], model: Any, tokens: Any) -> dict[str, Callable[[], Any]]:
    """What is timed: a forward pass, one with a hook that writes, one that keeps everything."""
    point, path = request["point"], request["path"]
    if request["tool"] == "HuggingFace":

        def write(module: Any, args: Any, output: Any) -> Any:
            return (output[0] * 1, *output[1:]) if isinstance(output, tuple) else output * 1

        def with_hook() -> Any:
            handle = model.get_submodule(path).register_forward_hook(write)
            try:
                return model(input_ids=tokens)
            finally:
                handle.remove()

        return {"forward": lambda: model(input_ids=tokens), "one hook": with_hook}
    hooks = [(point, lambda value, hook: value * 1)]
    return {
        "forward": lambda: model(tokens),
        "one hook": lambda: model.run_with_hooks(tokens, fwd_hooks=hooks),
        "cache of everything": lambda: model.run_with_cache(tokens),
    }


def rounds(task: Callable[[], Any], times: int, cuda: bool) -> list[float]:
    """Seconds of each round, after one that is not counted."""
    import torch

    def once() -> float:
        start = time.perf_counter()
        task()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    found: list[float] = []
    while len(found) < times and (len(found) < FEWEST or sum(found) < PATIENCE):
        found.append(once())
    return found


# --- activations ------------------------------------------------------------------------------------------------------


def activations(request: dict[str, Any]) -> dict[str, Any]:
    """Write what TransformerLens has at every point, on every prompt, with each group of flags on in turn."""
    import torch
    from safetensors.torch import save_file

    model = load_transformer_lens(request, request["processing"])
    # safetensors holds each tensor by itself; what a first group of flags gave is kept.
    kept: dict[str, Any] = {}
    with torch.no_grad():
        for number, rows in enumerate(request["prompts"]):
            tokens = torch.tensor(rows, device=request["device"])
            for flags in request["flags"]:
                for flag in request["all_flags"]:
                    setattr(model.cfg, flag, flag in flags)
                logits, cache = model.run_with_cache(tokens, return_cache_object=False)
                for name, value in {"logits": logits, **cache}.items():
                    kept.setdefault(f"{number}|{name}", value.detach().cpu().contiguous().clone())
    save_file(kept, request["tensors"])
    return {"written": len(kept)}


# --- the program ------------------------------------------------------------------------------------------------------


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, or the error that it ended with."""
    try:
        found = measure(request) if request["task"] == "measure" else activations(request)
    except ModuleNotFoundError as error:
        return {"problem": f"{error.name} is not installed", "missing": error.name}
    except Exception as error:
        # Whatever a tool fails with is a row of the comparison, not the end of it.
        words = " ".join(str(error).split())
        return {"problem": f"{type(error).__name__}: {words[:LONGEST]}{'...' if len(words) > LONGEST else ''}"}
    return found


def version_of(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, and without what a tool prints while it loads."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        yield


def main(path: Path) -> None:
    """Read a request, and write the answer beside it."""
    request = json.loads(path.read_text(encoding="utf-8"))
    import torch

    torch.set_num_threads(request["threads"])
    with quiet():
        found = answer(request)
    if request["tool"] == "TransformerLens":
        found["version"] = version_of("transformer-lens")
    path.with_suffix(".answer.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

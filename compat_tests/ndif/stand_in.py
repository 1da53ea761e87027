"""How does a test get a server, and point nnsight's client to it?

    with serving({"some/repo": directory}) as ndif, ndif.pointed():
        with model.trace(tokens, remote=True): ...
        assert ndif.jobs == 1

or the ``ndif`` fixture of ``compat_tests/conftest.py``, which serves the models of :func:`models`.

The server's Python is the one that ``NDIF_PYTHON`` names, else that of ``.venv-remote`` (``make remote``), which has
neither lensbridge nor jaxtyping. If there is none of them it is this one, in which those packages are made impossible
to import.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

SERVER = Path(__file__).parent / "server"
ROOT = Path(__file__).parents[2]
#: What a client may have and a server has not; the last are what the working tree of this project makes importable.
CLIENT_ONLY = "lensbridge jaxtyping transformer_lens lensbridge_pytest conftest tests compat_tests benchmarks examples"
PATIENCE = 120.0


def environment() -> str:
    """The Python of an environment of the server's own, or nothing."""
    named = os.environ.get("NDIF_PYTHON")
    if named:
        return named
    beside = ROOT / ".venv-remote" / ("Scripts" if os.name == "nt" else "bin") / "python"
    return str(beside) if beside.exists() else ""


def register_all_but_installed() -> None:
    """Have nnsight send what lies in the working tree by value, but lensbridge only if it has asked for that itself.

    The client does so before its first request, for everything that is not in ``site-packages``. That is where users
    have lensbridge, so it must not be helped by lying in the working tree here.
    """
    from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES
    from nnsight import ndif

    asked = "lensbridge" in _PICKLE_BY_VALUE_MODULES
    first = not ndif._PULLED_ENV
    ndif.pull_env()
    if first and not asked:
        _PICKLE_BY_VALUE_MODULES.discard("lensbridge")


@dataclass
class StandIn:
    """A server that runs."""

    url: str
    log: Path
    #: Whether its environment is one of its own, rather than this one with packages hidden.
    separate: bool
    #: The directory of each model, by repository; nnsight's client knows the directory as that repository.
    directories: dict[str, str] = field(default_factory=dict)

    def ask(self, path: str, body: bytes | None = None) -> bytes:
        """GET, or POST if there is a body."""
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data=body), timeout=PATIENCE) as answer:
            return answer.read()

    def stats(self) -> dict[str, Any]:
        """``{"jobs": count, "waiting": count, "requests": [...]}``.

        Each request has ``id``, ``status``, ``model_key``, ``env``, ``payload_bytes`` and ``result_bytes`` as they
        travelled, ``payload_raw_bytes`` and ``result_raw_bytes`` without compression, ``inline`` (else the result was
        to be downloaded, ``downloads`` times), ``named`` (modules that the payload or its code named),
        ``left_behind`` (what the job changed on the model), ``error`` and ``seconds``. A job that is not finished has
        only the first few.
        """
        return json.loads(self.ask("/stats"))

    @property
    def jobs(self) -> int:
        """The number of jobs since the start or the last :meth:`reset`."""
        return self.stats()["jobs"]

    @property
    def last(self) -> dict[str, Any]:
        """The request that came last."""
        return self.stats()["requests"][-1]

    @property
    def left_behind(self) -> list[str]:
        """What all jobs have changed on the models: must be empty."""
        finished = [request for request in self.stats()["requests"] if "left_behind" in request]
        return [f"{request['id']}: {what}" for request in finished for what in request["left_behind"]]

    def reset(self, inline_limit: int | None = None) -> None:
        """Forget all jobs. From now on results of more bytes than the limit are downloaded: 1 MiB, or what is given."""
        self.ask("/reset", b"" if inline_limit is None else str(inline_limit).encode())

    @contextmanager
    def pointed(self) -> Iterator[None]:
        """Point nnsight's client in this process here, and tell it the repositories, for which it would ask the hub."""
        from nnsight.modeling import huggingface
        from nnsight.schema.config import CONFIG

        register_all_but_installed()
        known = {name: repo for repo, path in self.directories.items() for name in (repo, path)}
        local = dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost")
        with (
            mock.patch.object(CONFIG.API, "HOST", self.url),
            mock.patch.dict(huggingface._ID_CACHE, known),
            mock.patch.dict(os.environ, local),
        ):
            yield

    def text(self) -> str:
        """The server's output."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def started(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address that a server says it listens on."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = re.search(r"^listening on (\S+)$", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if found:
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"the stand-in server did not start:\n{log.read_text(encoding='utf-8', errors='replace')}")


@contextmanager
def serving(directories: Mapping[str, str | Path], *options: str) -> Iterator[StandIn]:
    """A server of its own for the models in these directories, with options of ``server/__main__.py``."""
    paths = {repo: str(path) for repo, path in directories.items()}
    separate = environment()
    command = [separate or sys.executable, "-I", "-u", str(SERVER)]
    command += [f"--model={repo}={path}" for repo, path in paths.items()]
    command += options if separate else [f"--hide={','.join(CLIENT_ONLY.split())}", *options]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=folder, env=variables, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            yield StandIn(started(process, log), log, bool(separate), paths)
        finally:
            process.kill()
            process.communicate()


def models(folder: Path) -> dict[str, Path]:
    """Small models to serve: the bundled GPT-2, and a random Llama that is saved in a folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from compat_tests.rough_models import TOY_DIR

    tokenizer = AutoTokenizer.from_pretrained(TOY_DIR)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    directory = folder / "llama"
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return {"stand-in/gpt2": TOY_DIR, "stand-in/llama": directory}


__all__ = ["StandIn", "environment", "models", "serving"]

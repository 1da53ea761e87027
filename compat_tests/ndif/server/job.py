"""How is one request run on a model, and what is sent back?

The payload is the tracer with the source of its block. The block runs here; the values it saved go back by name, and
what it prints line by line. An error goes back as the text of its traceback, without the lines of nnsight and of this
server.
"""

from __future__ import annotations

import contextlib
import io
import json
import linecache
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
import zstandard
from guard import Named
from nnsight import TransformersModel
from nnsight.modeling.huggingface import _ID_CACHE
from nnsight.schema.request import RequestModel
from nnsight.tracing.globals import BLOCKS, SOURCES
from nnsight.tracing.tracer import _saves, dec, inc
from nnsight.tracing.util import clean_traceback, filter_traceback
from transformers import AutoModelForCausalLM, AutoTokenizer
from untouched import differences, state

FOLDER = os.path.dirname(os.path.abspath(__file__))


class Refused(Exception):
    """The job was not run."""


@dataclass
class Outcome:
    """The bytes to send, or the text of the error; what is told about the cost; what the tests want to know."""

    data: bytes = b""
    error: str = ""
    meta: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Lines(io.TextIOBase):
    """A standard output that hands on whole lines."""

    def __init__(self, send: Callable[[str], None]) -> None:
        self.send, self.rest = send, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.send(line)
        return len(text)

    def last(self) -> None:
        """Hand on what has no end of line."""
        if self.rest:
            self.send(self.rest)


def own(error: BaseException) -> TracebackType | None:
    """The part of a traceback that the user wrote: what was noted at the block's border, if it was."""
    found = clean_traceback(getattr(error, "__intervention_tb__", None) or error.__traceback__)
    return filter_traceback(found, lambda frame: not frame.f_code.co_filename.startswith(FOLDER))


def told(error: BaseException) -> str:
    """An error as text."""
    lines = traceback.format_exception(type(error), error, own(error), chain=False)
    return "".join(lines).rstrip()


class Models:
    """The models that are served, by the key that clients name them with."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.directories = dict(entry.split("=", 1) for entry in options.model)
        self.served = {repo: self.load(repo) for repo in self.directories}

    def load(self, repo: str) -> TransformersModel:
        """A model as it comes from its directory."""
        directory = self.directories[repo]
        _ID_CACHE[directory] = repo
        hf = AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation=self.options.attn, dtype=getattr(torch, self.options.dtype)
        ).eval()
        if self.options.frozen:
            hf.requires_grad_(False)
        return TransformersModel(hf, task="text-generation", tokenizer=AutoTokenizer.from_pretrained(directory))

    def keys(self) -> list[str]:
        """The keys of all models."""
        return [model.to_model_key() for model in self.served.values()]

    def repo(self, key: str) -> str | None:
        """The repository that a key names, if it is served: same class, repository, task and revision."""
        for repo, model in self.served.items():
            (cls, wanted), (served_cls, served) = (one.split(":", 1) for one in (key, model.to_model_key()))
            a, b = json.loads(wanted), json.loads(served)
            a["revision"], b["revision"] = a.get("revision") or "main", b.get("revision") or "main"
            if (cls, a) == (served_cls, b):
                return repo
        return None

    def has(self, key: str) -> bool:
        """Whether the model is served."""
        return self.repo(key) is not None

    def deployments(self) -> dict[str, Any]:
        """What ``/status`` says."""
        return {
            repo: {
                "model_key": model.to_model_key(),
                "repo_id": repo,
                "task": model.task,
                "revision": "main",
                "deployment_level": "HOT",
                "application_state": "RUNNING",
            }
            for repo, model in self.served.items()
        }

    def run(self, request: RequestModel, blob: bytes, log: Callable[[str], None]) -> Outcome:
        """Run a job, and look what it left behind; a model that was changed is loaded anew for the next job."""
        repo = self.repo(request.model_key)
        model = self.served[str(repo)]
        try:
            model._remoteable_set_env(request.env)
        except Exception as error:
            raise Refused(told(error)) from error
        before = state(model)
        started, outcome = time.monotonic(), Outcome()
        named = Named(self.options.strict)
        try:
            with named.watching():
                saved = execute(model, request, blob, named, log)
                outcome.data, outcome.facts["result_raw_bytes"] = packed(saved, request.compress)
        except BaseException as error:  # SystemExit too: jobs must not end the server
            outcome.error = told(error)
        left = differences(before, state(model))
        if left:
            self.served[str(repo)] = self.load(str(repo))
        outcome.meta = {"seconds": time.monotonic() - started}
        raw = zstandard.ZstdDecompressor().decompress(blob) if request.compress else blob
        outcome.facts |= {
            "payload_raw_bytes": len(raw),
            "env": request.env,
            "named": sorted(named.modules),
            "left_behind": left,
            **outcome.meta,
        }
        return outcome


def packed(saved: dict[str, Any], compress: bool) -> tuple[bytes, int]:
    """The values as they travel, and the size before compression."""
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    data = buffer.getvalue()
    return (zstandard.ZstdCompressor().compress(data) if compress else data), len(data)


def execute(
    model: TransformersModel, request: RequestModel, blob: bytes, named: Named, log: Callable[[str], None]
) -> dict[str, Any]:
    """Run the payload's block on the model; the values it saved, by name."""
    # Blocks are known by file and line, which are the client's: another job's may have other text there.
    SOURCES.clear()
    BLOCKS.clear()
    linecache.clearcache()
    lines = Lines(log)
    inc()
    try:
        with contextlib.redirect_stdout(lines):
            tracer = RequestModel.deserialize(
                blob, model._remoteable_persistent_objects(), compress=request.compress, unpickler=named.unpickler()
            )
            tracer.execute(tracer.info.code)
            return {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
    finally:
        lines.last()
        dec()

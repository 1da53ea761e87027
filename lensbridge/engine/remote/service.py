"""Where does a job run, and how does it get there and back?

On NDIF (or a server that speaks its protocol), which nnsight's backend sends it to; or, with ``"local"``, in this
process: written out and read in as for a server, with this package out of reach, which shows that what travels is
complete.
"""

from __future__ import annotations

import io
import linecache
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import nnsight
import torch
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.intervention.serialization import reduce_block
from nnsight.modeling.transformers import TransformersModel
from nnsight.ndif import pull_env
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.tracer import _saves, save
from nnsight.tracing.util import push
from torch import nn

from ..places import View
from .failures import explained
from .job import Setting, execute
from .shipping import PACKAGE, Afterwards, shipped

#: What runs a session that has no model of its own: True, the address of a server, or "local".
Where = bool | str
#: Packages that a server need not have.
_NOT_THERE = (PACKAGE, "jaxtyping", "transformer_lens")


class Unloaded(TransformersModel):
    """nnsight's handle on a model that somebody else has: its modules are here, without weights."""

    def _load_meta(self, repo_id: str, *args: Any, **kwargs: Any) -> nn.Module:
        from transformers import AutoModelForCausalLM

        self.task = "text-generation"
        options = {name: kwargs[name] for name in ("attn_implementation", "trust_remote_code") if name in kwargs}
        hf_model: Any = AutoModelForCausalLM.from_config(kwargs["config"], **options)
        hf_model.name_or_path = repo_id
        return hf_model.eval()

    def _remoteable_class(self) -> type:
        return TransformersModel


class Service:
    """What runs the jobs for one model.

    Args:
        hf_model: the model, on the meta device if its weights are elsewhere.
        where: True for the server that nnsight is configured for, an address, or "local".
        unloaded: nnsight's handle where the weights are elsewhere.
    """

    def __init__(self, hf_model: Any, where: Where, unloaded: Unloaded | None = None) -> None:
        self.hf_model = hf_model
        self.where = where
        self.unloaded = unloaded
        self._view: View | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy carries along: no view, because nnsight's handles belong to the modules they were made for."""
        return self.__dict__ | {"_view": None}

    def run(
        self,
        program: Callable[..., Any],
        setting: Setting,
        states: list[Any],
        eager: bool,
        left_out: Collection[str] = (),
    ) -> tuple[Any, Any]:
        """`job.execute`, where the model is.

        Raises:
            RemoteRunError: the job fails there.
        """
        if self.unloaded is not None:
            paths = {id(envoy._module): envoy.path for envoy in self.unloaded.modules()}
            own = self.hf_model.config._attn_implementation
            host = self.where if isinstance(self.where, str) else None
            env = self.unloaded._remoteable_get_env() | {"attn_implementation": "eager" if eager else own}
            backend = _Sent(self.unloaded.to_model_key(), paths, left_out, host=host, env=env)
            with explained():
                return _session(self.unloaded, backend, setting, program, states)
        if self._view is None or not self._view.is_of(self.hf_model):
            self._view = View(self.hf_model)
        view = self._view
        paths = {id(envoy._module): envoy.path for envoy in view.nnsight.modules()}
        with view.installed(view.paths), explained():
            return _session(view.nnsight, _Here(view.nnsight, paths, left_out), setting, program, states)


def _session(
    model: Any, backend: Backend, setting: Setting, program: Callable[..., Any], states: list[Any]
) -> tuple[Any, Any]:
    """One job. What the body reads is what travels."""
    result: Any = None
    with model.session(backend=backend):
        result = nnsight.save(execute(model, setting, program, states))
    return result


def _payload(tracer: Any, paths: Mapping[int, str], left_out: Collection[str]) -> bytes:
    pull_env()
    frame = tracer.info.frame
    source, outside, inside = reduce_block(tracer.node, frame.f_globals, dict(frame.f_locals))
    return shipped((tracer, (source, outside, inside | {"afterwards": Afterwards()})), paths, left_out)


class _Sent(RemoteBackend):
    """nnsight's way to the server, with a leaner payload."""

    def __init__(self, model_key: str, paths: Mapping[int, str], left_out: Collection[str], **options: Any) -> None:
        super().__init__(model_key, **options)
        self.paths = paths
        self.left_out = left_out

    def _serialize(self, tracer: Any) -> bytes:
        blob = _payload(tracer, self.paths, self.left_out)
        if self.compress:
            import zstandard

            blob = zstandard.ZstdCompressor(level=19).compress(blob)
        self._log(f"payload: {len(blob):,} bytes")
        return blob


class _Here(Backend):
    """Runs in this process what a server would be sent, and takes what it would send back."""

    def __init__(self, model: Any, paths: Mapping[int, str], left_out: Collection[str]) -> None:
        self.model = model
        self.paths = paths
        self.left_out = left_out

    def __call__(self, tracer: Any) -> None:
        blob = _payload(tracer, self.paths, self.left_out)
        known = {f"Module:{envoy.path}": envoy._module for envoy in self.model.modules()}
        known["Interleaver"] = self.model.interleaver
        file = tracer.info.frame.f_code.co_filename
        lines = linecache.cache.get(file)
        try:
            with _hidden():
                read = RequestModel.deserialize(blob, known, compress=False)
                read.execute(read.info.code)
        except Exception as error:
            raise RemoteError(f"{_traceback(error)}") from error
        finally:
            # What was read in is registered under the name of this very file.
            linecache.cache.pop(file, None)
            if lines is not None:
                linecache.cache[file] = lines
        saved = {name: value for name, value in read.info.frame.f_locals.items() if id(value) in _saves()}
        travelled = io.BytesIO()
        torch.save(saved, travelled)
        travelled.seek(0)
        result = torch.load(travelled, weights_only=False)
        for value in result.values():
            save(value)
        push(tracer.info.frame, result)


def _traceback(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


@contextmanager
def _hidden() -> Iterator[None]:
    """While open, what a server does not have cannot be imported."""
    there = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in _NOT_THERE}
    finder = _Absent()
    for name in there:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.modules.update(there)


class _Absent:
    """A finder that says of some packages that they are not there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse them, and leave others to the next finder."""
        if name.partition(".")[0] in _NOT_THERE:
            raise ModuleNotFoundError(f"No module named {name!r} (a server need not have it)", name=name)

"""What does a server of NDIF do that nnsight 0.8.1's client can see?

    python -I compat_tests/ndif/server --model some/repo=DIRECTORY

serves the models until its standard input is closed. It speaks the protocol that the client has in
``nnsight/intervention/backends/remote.py``: a websocket at ``/subscribe``, a form at ``/request``, the state of jobs
that nobody listens to at ``/response/ID``. Jobs run one after the other. Besides, ``/stats`` tells what travelled.

The folder is run by itself, in an environment that need not have this project: nothing here imports from outside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Before anything else is imported, and then out of the way: jobs must not find these modules.
from guard import hide

FOLDER = os.path.dirname(os.path.abspath(__file__))
#: The largest request, and the number of results kept for download.
LARGEST, KEPT = 1 << 30, 64


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="server", description="A stand-in for NDIF.")
    parser.add_argument("--model", action="append", required=True, metavar="REPO=DIRECTORY")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--attn", default="sdpa", help="the attention implementation that models are loaded with")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--frozen", action="store_true", help="parameters do not require gradients")
    parser.add_argument("--hide", default="", help="packages, by commas, that this process must not be able to import")
    parser.add_argument("--strict", action="store_true", help="only packages of a list may be named by a payload")
    parser.add_argument("--inline-limit", type=int, default=1 << 20, help="larger results, in bytes, are downloaded")
    parser.add_argument("--api-key", default="", help="the only key that is let in; by default nobody is asked for one")
    return parser.parse_args()


options = arguments()
hide([name for name in options.hide.split(",") if name])

import tornado.httpserver  # noqa: E402
import tornado.web  # noqa: E402
import tornado.websocket  # noqa: E402
from job import Models, Outcome, Refused  # noqa: E402
from nnsight.schema.request import RequestModel  # noqa: E402
from nnsight.schema.response import ResponseModel, Status  # noqa: E402

sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != FOLDER]


class Service:
    """All that the handlers share: models, listeners, what is known of jobs, and the thread that runs them."""

    def __init__(self) -> None:
        self.models = Models(options)
        self.loop = asyncio.get_running_loop()
        # One thread: a model serves one job at a time, and nnsight keeps its state per thread.
        self.worker = ThreadPoolExecutor(1)
        self.listeners: dict[str, Subscribe] = {}
        self.states: dict[str, ResponseModel] = {}
        self.results: dict[str, bytes] = {}
        self.requests: list[dict[str, Any]] = []
        self.waiting = 0
        self.inline_limit = options.inline_limit
        self.url = ""

    def tell(self, response: ResponseModel, session: str) -> None:
        """Send one update to who listens; keep it for who asks later. A message of the job is not kept."""
        listener = self.listeners.get(session)
        if listener is not None and listener.ws_connection is not None:
            binary = isinstance(response.data, bytes)
            listener.write_message(response.pickle() if binary else response.model_dump_json(), binary=binary)
        elif response.status is not Status.LOG:
            self.states[response.id] = response

    def submit(self, request: RequestModel, blob: bytes) -> ResponseModel:
        """Put a job into the queue."""
        name = uuid.uuid4().hex
        record: dict[str, Any] = {"id": name, "model_key": request.model_key, "payload_bytes": len(blob)}
        self.requests.append({**record, "status": Status.RECEIVED.value})
        if not self.models.has(request.model_key):
            self.requests[-1]["status"] = Status.ERROR.value
            text = f"{request.model_key} is not deployed. Deployed: {', '.join(self.models.keys())}"
            return ResponseModel(id=name, status=Status.ERROR, description=text)
        self.tell(
            ResponseModel(id=name, status=Status.QUEUED, description=f"{self.waiting} before this one"),
            request.session_id,
        )
        self.waiting += 1
        self.worker.submit(self.work, name, request, blob, self.requests[-1])
        return ResponseModel(id=name, status=Status.RECEIVED, description="Your job has been received.")

    def work(self, name: str, request: RequestModel, blob: bytes, record: dict[str, Any]) -> None:
        """Run a job, in the worker's thread, and tell how it went."""

        def tell(status: Status, description: str = "", **more: Any) -> None:
            response = ResponseModel(id=name, status=status, description=description, **more)
            self.loop.call_soon_threadsafe(self.tell, response, request.session_id)

        tell(Status.DISPATCHED)
        tell(Status.RUNNING)
        try:
            outcome = self.models.run(request, blob, lambda line: tell(Status.LOG, line))
        except Refused as refusal:
            outcome = Outcome(error=str(refusal))
        except BaseException as error:  # the stand-in's own: it must answer, or the client waits for ever
            outcome = Outcome(error=f"the stand-in server failed: {error!r}")
        self.loop.call_soon_threadsafe(self.finish, name, request, outcome, record)

    def finish(self, name: str, request: RequestModel, outcome: Outcome, record: dict[str, Any]) -> None:
        """Send the result or the error, and note what it was."""
        self.waiting -= 1
        inline = len(outcome.data) <= self.inline_limit and request.session_id in self.listeners
        record.update(outcome.facts, inline=inline, result_bytes=len(outcome.data), error=outcome.error)
        record["status"] = (Status.ERROR if outcome.error else Status.COMPLETED).value
        if outcome.error:
            update = ResponseModel(id=name, status=Status.ERROR, description=outcome.error)
        elif inline:
            update = ResponseModel(id=name, status=Status.COMPLETED, data=outcome.data, meta=outcome.meta)
        else:
            self.results[name] = outcome.data
            for old in list(self.results)[:-KEPT]:
                del self.results[old]
            address = f"{self.url}/result/{name}"
            update = ResponseModel(id=name, status=Status.COMPLETED, data=address, meta=outcome.meta)
        self.tell(update, request.session_id)


service: Service


class Handler(tornado.web.RequestHandler):
    """Answers in JSON; errors as the client expects them, ``{"detail": ...}``; asks for the key."""

    def prepare(self) -> None:
        if options.api_key and self.request.headers.get("ndif-api-key") != options.api_key:
            raise tornado.web.HTTPError(401, reason="Missing or invalid API key")

    def write_error(self, status_code: int, **_: Any) -> None:
        self.finish(json.dumps({"detail": self._reason}))

    def answer(self, text: str) -> None:
        self.set_header("Content-Type", "application/json")
        self.finish(text)


class Subscribe(tornado.websocket.WebSocketHandler):
    """``/subscribe``: gives the session a name and keeps the line open."""

    def prepare(self) -> None:
        Handler.prepare(self)  # type: ignore[arg-type]

    def open(self, *_: str) -> None:
        self.session = uuid.uuid4().hex
        service.listeners[self.session] = self
        self.write_message(json.dumps({"session_id": self.session}))

    def on_message(self, message: str | bytes) -> None:
        """The client says nothing."""

    def on_close(self) -> None:
        service.listeners.pop(self.session, None)


class Request(Handler):
    """``POST /request``: the form with ``data``, the envelope, and the file ``blob``."""

    def post(self) -> None:
        files = self.request.files.get("blob")
        if not files:
            raise tornado.web.HTTPError(422, reason="no blob in the form")
        request = RequestModel.model_validate_json(self.get_body_argument("data"))
        self.answer(service.submit(request, files[0]["body"]).model_dump_json())


class Response(Handler):
    """``GET /response/ID``: the last that is known of a job without a listener."""

    def get(self, name: str) -> None:
        if name not in service.states:
            raise tornado.web.HTTPError(404, reason="no such job")
        self.answer(service.states[name].model_dump_json())


class Result(Handler):
    """``GET /result/ID``: a result that was too large to be sent on the line. Whoever has the address may read it."""

    def prepare(self) -> None:
        pass

    def get(self, name: str) -> None:
        if name not in service.results:
            raise tornado.web.HTTPError(404, reason="no such result")
        for record in service.requests:
            if record["id"] == name:
                record["downloads"] = record.get("downloads", 0) + 1
        self.set_header("Content-Type", "application/octet-stream")
        self.finish(service.results[name])


class About(Handler):
    """What ``nnsight.status()``, ``nnsight.compare()`` and ``nnsight login`` ask."""

    def get(self, what: str) -> None:
        if what == "status":
            self.answer(json.dumps({"deployments": service.models.deployments()}))
        elif what == "env":
            from nnsight.ndif import get_local_env

            self.answer(json.dumps(get_local_env()))
        else:
            self.answer(json.dumps({"email": "somebody@example.org" if options.api_key else None, "tags": []}))


class Stats(tornado.web.RequestHandler):
    """``GET /stats``, for the tests: see ``compat_tests/ndif/stand_in.py``."""

    def get(self) -> None:
        self.finish({"jobs": len(service.requests), "waiting": service.waiting, "requests": service.requests})


class Reset(tornado.web.RequestHandler):
    """``POST /reset``: forgets all jobs; a number in the body is the new limit of results that are sent on the line."""

    def post(self) -> None:
        service.requests.clear()
        service.inline_limit = int(self.request.body or options.inline_limit)


def leave_with_parent() -> None:
    """End when standard input is closed, as it is when who started this is gone, in whatever way."""
    sys.stdin.read()
    os._exit(0)


async def main() -> None:
    """Serve."""
    global service
    service = Service()
    routes = [
        (r"/subscribe", Subscribe),
        (r"/request", Request),
        (r"/response/(\w+)", Response),
        (r"/result/(\w+)", Result),
        (r"/(status|env|whoami)", About),
        (r"/stats", Stats),
        (r"/reset", Reset),
    ]
    application = tornado.web.Application(routes, websocket_max_message_size=LARGEST)
    server = tornado.httpserver.HTTPServer(application, max_buffer_size=LARGEST, max_body_size=LARGEST)
    sockets = tornado.netutil.bind_sockets(options.port, "127.0.0.1")
    server.add_sockets(sockets)
    service.url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    threading.Thread(target=leave_with_parent, daemon=True).start()
    print(f"listening on {service.url}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())

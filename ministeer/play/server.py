"""The server of the page: it checks who asks, does one piece of work at a time, and passes on the results.

Read first: engine.py. `serve` starts it; `app` builds it for a model, also in tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import secrets
import socket
import sys
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from . import engine

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer
    from ..model import LM

MOST_BYTES = 400_000        # of a body: 150 completions, to be counted
MOST_WAITING = 60           # clients that wait for completions
MOST_CONNECTIONS = 300
PAGES = {"/": ("page.html", "text/html"), "/style.css": ("style.css", "text/css"),
         "/play.js": ("play.js", "text/javascript")}
# The page may load its own two files and nothing else, and no other site may show it in a frame.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
                               "img-src data: blob:; base-uri 'none'; form-action 'none'; "
                               "frame-ancestors 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store",
}


class Guard:
    """Refuse requests that another site sends through the visitor's browser, and those without the token.

    token: "" on a loopback address, where the Host must name this computer: another site can make its own
        name point here (DNS rebinding), but cannot change the Host that the browser sends.
    """

    def __init__(self, app: ASGIApp, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if fault := self.fault(Request(scope)):
            return await PlainTextResponse(fault, 403, HEADERS)(scope, receive, send)

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)
        await self.app(scope, receive, send_with_headers)

    def fault(self, request: Request) -> str | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not self.token and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return "This server answers only to 127.0.0.1 and localhost."
        if origin is not None and urlsplit(origin).netloc != host:
            return "This request comes from another site."
        given = request.headers.get("x-token") or request.query_params.get("token", "")
        needs_token = request.url.path not in ("/style.css", "/play.js")
        if self.token and needs_token and not secrets.compare_digest(given.encode(), self.token.encode()):
            return "The address lacks its token: open the whole address that `ministeer play` printed."
        return None


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def app(model: LM, tokenizer: Tokenizer, name: str, token: str = "") -> Starlette:
    """The page and its answers for one model; `name` is what `ministeer.load` takes to load it again."""
    worker = ThreadPoolExecutor(1, "model")     # one piece of work at a time, in the order of their arrival
    answering = asyncio.Lock()                  # so that answers and steps of a stream take turns
    line: list[tuple] = []                      # the clients that wait; the first is being served

    async def work(function: Callable, *args: object) -> object:
        return await asyncio.get_running_loop().run_in_executor(worker, function, *args)

    async def answer(function: Callable, given: dict) -> object:
        async with answering:
            return await work(function, given)

    def setting(given: dict) -> engine.Setting:
        return engine.read(model, tokenizer, given)

    def look(given: dict) -> dict:
        s, sampling = setting(given), engine.read_sampling(given)
        return {**engine.look(model, tokenizer, s, given.get("controls", engine.CONTROLS)),
                "python": engine.as_python(name, s, *sampling),
                "command": engine.as_command(name, s, *sampling)}

    def lens(given: dict) -> dict:
        with engine.field("map"):
            return engine.lens(model, tokenizer, setting(given), given.get("at_layer"), given.get("at"))

    def lens_map(given: dict) -> list:
        return engine.lens_map(model, tokenizer, setting(given))

    def count(given: dict) -> dict:
        return engine.count(given.get("texts"), given.get("words"))

    def vector(given: dict) -> bytes:
        return engine.as_file(engine.addition(model, tokenizer, setting(given)))

    def complete(given: dict) -> Iterator:
        return engine.completions(model, tokenizer, setting(given), *engine.read_sampling(given))

    def scan(given: dict) -> Iterator:
        return engine.scan(model, tokenizer, setting(given), given.get("target"))

    def answers(function: Callable[[dict], object]) -> Callable:
        """A route that answers with what `function` makes of the body, unless the client leaves first."""
        async def route(request: Request) -> Response:
            try:
                job = asyncio.ensure_future(answer(function, await body(request)))
                gone = asyncio.ensure_future(request.receive())     # after the body: only a disconnect
                await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
                gone.cancel()
                if not job.done():
                    job.cancel()        # work that waits is dropped; what runs takes a fraction of a second
                    return Response(status_code=499)
                result = job.result()
            except ValueError as error:
                return JSONResponse(refusal(error), 422)
            if isinstance(result, bytes):
                return Response(result, media_type="application/octet-stream")
            return JSONResponse(result)
        return route

    def streams(function: Callable[[dict], Iterator]) -> Callable:
        """A route that sends what `function` yields, when the client's turn comes, as server-sent events."""
        async def route(request: Request) -> Response:
            try:
                given = await body(request)
            except ValueError as error:
                return JSONResponse(refusal(error), 422)
            return Events(in_turn(function, given), media_type="text/event-stream")
        return route

    async def in_turn(function: Callable[[dict], Iterator], given: dict) -> AsyncIterator[str]:
        # A ticket names its client, so that a new request ends an older one of the same page.
        ticket, steps, ahead = (str(given.get("client")), object()), None, 0
        line[:] = [other for other in line if other[0] != ticket[0]]
        if len(line) >= MOST_WAITING:
            yield event(message=f"{len(line)} others are waiting for completions. Try again in a minute.")
            return
        line.append(ticket)
        try:
            while ticket in line and line[0] != ticket:
                if line.index(ticket) != ahead:
                    ahead = line.index(ticket)
                    yield event(ahead=ahead)
                await asyncio.sleep(0.1)
            if ticket in line:
                steps = await work(function, given)
            # Another client's slider is answered between two steps.
            while ticket in line and (step := await work(next, steps, None)) is not None:
                yield event(step=step)
            yield event(done=True) if ticket in line else event(message="A newer request took its place.")
        except ValueError as error:
            yield event(**refusal(error))
        finally:
            if ticket in line:
                line.remove(ticket)
            if steps:
                worker.submit(steps.close)      # after the step that may still run

    async def page(request: Request) -> Response:
        file, media_type = PAGES[request.url.path]
        return Response(files(__package__).joinpath(file).read_bytes(), media_type=media_type)

    async def about(request: Request) -> Response:
        return JSONResponse({"model": model.name, "n_layer": model.config.n_layer,
                             "presets": engine.PRESETS})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        worker.shutdown(wait=False, cancel_futures=True)

    routes = [Route(path, page) for path in PAGES] + [Route("/about", about)]
    routes += [Route(f"/{f.__name__}", answers(f), methods=["POST"])
               for f in (look, lens, lens_map, count, vector)]
    routes += [Route(f"/{f.__name__}", streams(f), methods=["POST"]) for f in (complete, scan)]
    return Starlette(routes=routes, middleware=[Middleware(Guard, token=token)], lifespan=lifespan)


async def body(request: Request) -> dict:
    """The JSON object that a request holds. Raises ValueError."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MOST_BYTES:
            raise ValueError(f"the request is larger than {MOST_BYTES} bytes.")
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(given := json.loads(data), dict):
            return given
    raise ValueError("the request is not a JSON object.")


class Events(StreamingResponse):
    """Server-sent events from a generator that is closed as soon as the client leaves."""

    async def stream_response(self, send: Send) -> None:
        async with contextlib.aclosing(self.body_iterator):
            await super().stream_response(send)


def event(**fields: object) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def refusal(error: ValueError) -> dict:
    return {"field": getattr(error, "field", None), "message": str(error)}


def serve(model: LM, tokenizer: Tokenizer, name: str, host: str, port: int, browser: bool) -> None:
    """Serve the page until Ctrl-C. Raises ValueError for an address that cannot be used."""
    token = "" if is_loopback(host) else secrets.token_urlsafe(16)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot serve on {host}, port {port}: {reason}. "
                         "--port 0 takes a free one.") from None
    with listener:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")
        if token:
            print("ministeer: warning: everyone on this network who has the address below can use this page; "
                  "what they send is not encrypted.", file=sys.stderr)
        print(f"{model.name} is at {address}\nCtrl-C ends it.", flush=True)
        if browser:
            webbrowser.open(address)
        config = uvicorn.Config(app(model, tokenizer, name, token), log_level="error", access_log=False,
                                limit_concurrency=MOST_CONNECTIONS, timeout_graceful_shutdown=1, ws="none")
        uvicorn.Server(config).run(sockets=[listener])

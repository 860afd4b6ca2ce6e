"""What a request must get past before anything looks into it: who asks, for what, how much of it, and how fast."""

import asyncio
import base64
import binascii
import json
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from brain_jax.serving import service

RECEIVE_SECONDS = 30  # that a request may take to arrive
LINGER_SECONDS = 2  # that the rest of a refused one is read on, so that its sender sees the answer
MAX_UPLOADS = 64  # at a time
MAX_EVENT_BYTES = 2**16  # of an event of the page: a button that was pressed, a slider that was moved

API, UPLOAD, HEALTH, METRICS = '/api/predict', '/page/upload', '/healthz', '/metrics'
_EVENT = '/gradio_api/queue/join'
# What there is; Gradio has many more routes, which read and write files, fetch addresses or run code.
_PATHS = re.compile(
    rf'{API}|{UPLOAD}|{HEALTH}|{METRICS}|/openapi\.json|/|/config|/theme\.css|/manifest\.json|/favicon\.ico'
    rf'|/(assets|static|svelte)/.*|{_EVENT}|/gradio_api/(queue/data|cancel|startup-events|info|heartbeat/\w+)'
)
# Gradio's page has scripts in its text and compiles its templates. All else is of this server, or in the page itself.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self'; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    'content-security-policy': _POLICY,
    'x-content-type-options': 'nosniff',
    'referrer-policy': 'no-referrer',
    'cross-origin-resource-policy': 'same-origin',
}


class Gate:
    """ASGI middleware; see the module.

    Args:
      app: what lies behind.
      monitor: a `service.Monitor`.
      token: what a client must know, or None. It is sent as `Authorization: Bearer TOKEN`, or, as a browser asks its
        user for it, as the password of Basic authentication with any name.
    """

    def __init__(self, app, *, monitor, token=None):
        self._app = app
        self._monitor = monitor
        self._token = token
        self._uploads = 0

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':
            await self._app(scope, receive, send)
            return
        body = _Body(receive, scope)
        answer = _Answer(send, body, self._monitor, scope)
        is_upload = scope['method'] == 'POST' and scope['path'] in (API, UPLOAD)
        self._uploads += is_upload
        try:
            self._check(scope, is_upload)
            if scope['path'] == _EVENT:
                await body.check_event()
            await self._app(scope, body.receive, answer.send)
        except HTTPException as error:
            await refusal(error)(scope, body.receive, answer.send)
        finally:
            self._uploads -= is_upload

    def _check(self, scope, is_upload):
        """Raises `HTTPException` for a request whose head says enough."""
        headers = Headers(scope=scope)
        if not _PATHS.fullmatch(scope['path']):
            raise HTTPException(404, 'there is nothing here')
        if self._token and scope['path'] != HEALTH and not _knows(headers.get('authorization', ''), self._token):
            raise HTTPException(401, 'give the token', {'www-authenticate': 'Basic realm="brain_jax, any name, token"'})
        # Browsers tell when a page of another site makes them ask; it could not read the answer, but fill the queue.
        is_foreign = headers.get('sec-fetch-site', 'none') not in ('same-origin', 'none')
        if scope['method'] not in ('GET', 'HEAD') and is_foreign:
            raise HTTPException(403, 'asked for by a page of another site')
        if not is_upload:
            return
        if not headers.get('content-type', '').startswith('multipart/form-data'):
            raise HTTPException(415, 'send a form, multipart/form-data, with the files in its field "files"')
        length = headers.get('content-length', '0')
        if length.isdecimal() and int(length) > service.MAX_BYTES:
            raise _too_large(service.MAX_BYTES)
        if self._uploads > MAX_UPLOADS:
            raise busy(f'{MAX_UPLOADS} uploads are under way; try again in a few seconds')


def busy(reason):
    """Returns the exception for a request that came at a bad time."""
    return HTTPException(503, reason, {'retry-after': '5'})


def refusal(error):
    """Returns the response that tells of an `HTTPException`."""
    return JSONResponse({'detail': error.detail}, error.status_code, error.headers)


def _too_large(limit):
    return HTTPException(413, f'larger than {limit >> 20} MiB' if limit >> 20 else f'larger than {limit >> 10} KiB')


def _knows(authorization, token):
    """Tells whether a header gives the token."""
    scheme, _, given = authorization.partition(' ')
    if scheme.lower() == 'basic':
        try:
            given = base64.b64decode(given, validate=True).decode().partition(':')[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != 'bearer':
        return False
    return secrets.compare_digest(given.encode(), token.encode())


class _Body:
    """What comes in of a request: so many bytes, in so many seconds."""

    def __init__(self, receive, scope):
        headers = Headers(scope=scope)
        self._receive = receive
        self._limit = MAX_EVENT_BYTES if scope['path'] == _EVENT else service.MAX_BYTES
        self._size = 0
        self._deadline = asyncio.get_running_loop().time() + RECEIVE_SECONDS
        self._kept = []  # messages that were looked at, and are still to be passed on
        self.complete = headers.get('content-length', '0') == '0' and 'transfer-encoding' not in headers

    async def receive(self):
        """Passes on a message; raises `HTTPException` where the body is too large, or too slow."""
        if self._kept:
            return self._kept.pop(0)
        if self.complete:
            return await self._receive()  # nothing but the end of the connection may come, when it may
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f'the request did not arrive within {RECEIVE_SECONDS} s') from None
        self.complete = not message.get('more_body', False)
        self._size += len(message.get('body', b''))
        if self._size > self._limit:
            raise _too_large(self._limit)
        return message

    async def check_event(self):
        """Raises `HTTPException` for an event of the page whose inputs are not plain values.

        Our components have no others. Gradio takes an object for a file, which it would copy, or fetch.
        """
        kept = []
        while not self.complete:
            kept.append(await self.receive())
        try:
            inputs = json.loads(b''.join(message.get('body', b'') for message in kept))['data']
            plain = all(value is None or isinstance(value, str | int | float) for value in inputs)
        except (ValueError, KeyError, TypeError, RecursionError):
            plain = False
        if not plain:
            raise HTTPException(422, 'not an event of this page')
        self._kept = kept

    async def drain(self):
        """Reads on for a while what nobody wants any more."""
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while not self.complete:
                    self.complete = not (await self._receive()).get('more_body', False)
        except TimeoutError:
            pass


class _Answer:
    """What goes out of a request: with headers, counted, and, where it comes before all of the request was read, late.

    A connection that is closed while its other end still sends loses what was sent there.
    """

    def __init__(self, send, body, monitor, scope):
        self._send = send
        self._body = body
        self._monitor = monitor
        self._endpoint = scope['path'] if scope['path'] in (API, UPLOAD, _EVENT, HEALTH, METRICS) else 'page'
        self._start = time.perf_counter()
        self._status = None

    async def send(self, message):
        """Passes on a message of the application."""
        if message['type'] == 'http.response.start':
            self._status = message['status']
            headers = MutableHeaders(scope=message)
            headers.update(_HEADERS)
            if self._endpoint != 'page':
                headers['cache-control'] = 'no-store'
            if not self._body.complete:
                headers['connection'] = 'close'
        elif not message.get('more_body'):
            self._monitor.count(self._endpoint, self._status, time.perf_counter() - self._start)
            if self._status >= 400 and not self._body.complete:
                await self._send(message | {'more_body': True})
                await self._body.drain()
                message = {'type': 'http.response.body'}
        await self._send(message)

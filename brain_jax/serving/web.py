"""The web server of a run: JSON endpoints and a page, on one port, offline; see docs/serving.md for what it bounds."""

import contextlib
import ipaddress
import logging as standard_logging
import signal
import socket
import sys

import h11
import uvicorn
from absl import logging
from starlette.middleware.trustedhost import TrustedHostMiddleware
from uvicorn.protocols.http import h11_impl

from brain_jax import InputError
from brain_jax.serving import api, gate, page, service

HEAD_SECONDS = 10  # that the head of a request may take
MAX_CONNECTIONS = 512


def create_app(served, *, token=None, hosts=('*',)):
    """Returns the whole application: endpoints and page behind the gate.

    Args:
      served: a `service.Service`; it is started and stopped with the application.
      token: what clients must know, see `gate.Gate`; None: nothing.
      hosts: names by which the server may be asked for.

    Returns:
      An ASGI application; in `app.state.end_streams` is a function that ends what open pages listen to.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app):
        served.batcher.start()
        yield
        served.stop()

    app = api.create_app(served, lifespan)
    app.state.end_streams = page.add_page(app, served).stop_event.set
    app.add_middleware(gate.Gate, monitor=served.monitor, token=token)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    return app


def serve(workdir, *, host='127.0.0.1', port=8000, token=None, runtime='jax', wanted_error=None):
    """Serves a run until SIGTERM or SIGINT; then finishes what is under way.

    Args:
      workdir: the run's folder.
      host: address to listen on.
      port: the same; 0 for any that is free.
      token: see `create_app`.
      runtime, wanted_error: see `predictor.Predictor.from_workdir`.

    Raises:
      InputError: where the run cannot be loaded, or the address not be used.
    """
    listener = listen(host, port)
    with listener:
        served = service.Service(workdir, runtime=runtime, wanted_error=wanted_error)
        local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        if not local and not token:
            logging.warning('whoever reaches port %d of this machine can use it: give a --token', port)
        # Else a page of any site could have its name lead to this machine, and read what this server says.
        hosts = ('localhost', '127.0.0.1', '::1', '[::1]') if local else ('*',)
        standard_logging.getLogger('python_multipart').setLevel('ERROR')  # it tells of every form that is malformed
        app = create_app(served, token=token, hosts=hosts)
        server = _Server(
            uvicorn.Config(
                app, http=_Protocol, ws='none', log_level='warning', access_log=False, server_header=False,
                proxy_headers=False, limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=5,
                timeout_graceful_shutdown=service.ANSWER_SECONDS + 5,
            )
        )  # fmt: skip
        address = f'[{host}]' if ':' in host else host
        print(f'Serving {workdir} on http://{address}:{listener.getsockname()[1]} (Ctrl-C ends it)', flush=True)
        # uvicorn handles both signals while it runs, and raises them again at the end.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit())
        server.run(sockets=[listener])


def listen(host, port):
    """Returns a socket that listens.

    Raises:
      InputError: where the address cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise InputError(f'cannot listen on port {port} of {host}: {reason}; give another --port or --host') from None


class _Server(uvicorn.Server):
    """Ends what open pages listen to before it waits for the end of all answers."""

    async def shutdown(self, sockets=None):
        self.config.app.state.end_streams()
        await super().shutdown(sockets)


class _Protocol(h11_impl.H11Protocol):
    """Closes a connection on which no head of a request comes; uvicorn waits for one as long as it dribbles."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def connection_lost(self, exc):
        self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self):
        super().on_response_complete()
        self._timer.cancel()
        self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _give_up(self):
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()

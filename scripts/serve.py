"""Serves a finished run on one port: a page to drop an image on, JSON endpoints, metrics.

python scripts/serve.py --workdir runs/first
curl --form files=@image.png http://127.0.0.1:8000/api/predict
"""

import os
import sys

# Read by the compiler of JAX when it is imported: it has nothing to tell the user.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

from absl import app, flags, logging

from brain_jax import InputError
from brain_jax.serving import runtimes

_WORKDIR = flags.DEFINE_string('workdir', None, "The run's folder.", required=True)
_PORT = flags.DEFINE_integer(
    'port', 8000, 'Port to listen on; 0 for any that is free.', lower_bound=0, upper_bound=2**16 - 1
)
_HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on; 0.0.0.0 for all of this machine.')
_TOKEN = flags.DEFINE_string(
    'token',
    None,
    'What clients must know: "Authorization: Bearer TOKEN", or in a browser any name with this password. Put '
    '--token=... into a file and give --flagfile=FILE, and no list of processes shows it.',
)
_WANTED_ERROR = flags.DEFINE_float(
    'wanted_error',
    None,
    'Share of wrong answers among those given; for others it abstains. Default: the largest known.',
)
_RUNTIME = flags.DEFINE_enum(
    'runtime', 'jax', ('jax', *runtimes.LOADERS), "What computes: JAX, or another runtime with the run's ONNX export."
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    logging.set_verbosity(logging.WARNING)
    try:
        from brain_jax.serving import web  # needs optional packages
    except ModuleNotFoundError as error:
        sys.exit(f'error: needs {error.name}: pip install -r requirements-serve.txt')
    try:
        web.serve(
            _WORKDIR.value,
            host=_HOST.value,
            port=_PORT.value,
            token=_TOKEN.value,
            runtime=_RUNTIME.value,
            wanted_error=_WANTED_ERROR.value,
        )
    except InputError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('error: stopped by Ctrl-C before it was ready')


if __name__ == '__main__':
    app.run(main)

"""Nothing here needs a network: real runs and their answers, with every connection forbidden.

The server of test_web.py runs so too, and may speak with its own machine only.
"""

import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
# Sees every use of a socket in Python; what is refused ends the process, so that nothing can fall back.
FORBID = """if True:
    import os, runpy, sys
    allowed, kind, name, *sys.argv[1:] = sys.argv[1:]
    def refuse(event, arguments):
        if event not in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto'):
            return
        host = arguments[0]
        if event in ('socket.connect', 'socket.sendto'):  # of a socket, to an address
            host = arguments[1][0]
        if allowed != 'loopback' or host not in ('127.0.0.1', '::1', 'localhost'):
            os.write(2, f'{event} {arguments}'.encode())
            os._exit(99)
    sys.addaudithook(refuse)
    sys.argv[0] = name
    runpy.run_module(name, run_name='__main__') if kind == 'module' else runpy.run_path(name, run_name='__main__')
"""


def run_without_network(*arguments, allowed='nothing'):
    command = [sys.executable, '-c', FORBID, allowed, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def test_demo_evaluation_and_prediction(tmp_path):
    tiny = {'model': '_DenseNetTiny', 'image_size': 32, 'num_epochs': 0.5, 'prepared_dir': tmp_path / 'prepared'}
    flags = [f'--config.{name}={value}' for name, value in tiny.items()]
    config = '--config=configs/densenet121.py:demo'
    process = run_without_network('module', 'brain_jax.main', config, f'--workdir={tmp_path}/run', *flags)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / 'run/summary.json').exists()
    process = run_without_network('script', 'scripts/evaluate.py', f'--workdir={tmp_path}/run')
    assert process.returncode == 0, process.stderr
    head = next(tmp_path.glob('run/phantom/Testing/*/*.png'))
    process = run_without_network('script', 'scripts/predict.py', f'--workdir={tmp_path}/run', str(head))
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ('allowed', 'call'),
    [
        ('nothing', "socket.create_connection(('localhost', 9))"),
        ('nothing', "socket.getaddrinfo('localhost', 9)"),
        ('loopback', "socket.socket().connect(('192.0.2.1', 9))"),  # an address that is nobody's
        ('loopback', "socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 9))"),
        ('loopback', "socket.getaddrinfo('example.org', 9)"),
    ],
)
def test_connections_are_noticed(tmp_path, allowed, call):
    (tmp_path / 'asks.py').write_text(f'import socket\n{call}\n')
    assert run_without_network('script', str(tmp_path / 'asks.py'), allowed=allowed).returncode == 99


def test_the_loopback_may_be_allowed(tmp_path):
    (tmp_path / 'asks.py').write_text(
        'import socket\n'
        "with socket.create_server(('127.0.0.1', 0)) as server:\n"
        "    socket.create_connection(('localhost', server.getsockname()[1])).close()\n"
    )
    process = run_without_network('script', str(tmp_path / 'asks.py'), allowed='loopback')
    assert process.returncode == 0, process.stderr


def test_every_version_of_the_lock_is_that_of_the_requirements():
    lines = (REPOSITORY / 'requirements.txt').read_text().splitlines()
    wanted = {line.split('#')[0].split(';')[0].strip() for line in lines if '==' in line.split('#')[0]}
    locked = {
        line.split(' ')[0] for line in (REPOSITORY / 'requirements.lock').read_text().splitlines() if '==' in line
    }
    assert len(wanted) > 15 and {line.lower().replace('_', '-') for line in wanted} <= locked

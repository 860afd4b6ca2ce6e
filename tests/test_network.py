"""Training and evaluation need no network: real runs, with every connection forbidden."""

import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
# Sees every use of a socket in Python; what is refused ends the process, so that nothing can fall back.
FORBID = """if True:
    import os, runpy, sys
    def refuse(event, arguments):
        if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto'):
            os.write(2, f'{event} {arguments}'.encode())
            os._exit(99)
    sys.addaudithook(refuse)
    kind, name, *sys.argv[1:] = sys.argv[1:]
    sys.argv[0] = name
    runpy.run_module(name, run_name='__main__') if kind == 'module' else runpy.run_path(name, run_name='__main__')
"""


def run_without_network(*arguments):
    command = [sys.executable, '-c', FORBID, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def test_demo_and_evaluation(tmp_path):
    tiny = {'model': '_DenseNetTiny', 'image_size': 32, 'num_epochs': 0.5, 'prepared_dir': tmp_path / 'prepared'}
    flags = [f'--config.{name}={value}' for name, value in tiny.items()]
    config = '--config=configs/densenet121.py:demo'
    process = run_without_network('module', 'brain_jax.main', config, f'--workdir={tmp_path}/run', *flags)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / 'run/summary.json').exists()
    process = run_without_network('script', 'scripts/evaluate.py', f'--workdir={tmp_path}/run')
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize('call', ["socket.create_connection(('localhost', 9))", "socket.getaddrinfo('localhost', 9)"])
def test_connections_are_noticed(tmp_path, call):
    (tmp_path / 'asks.py').write_text(f'import socket\n{call}\n')
    assert run_without_network('script', str(tmp_path / 'asks.py')).returncode == 99


def test_every_version_of_the_lock_is_that_of_the_requirements():
    lines = (REPOSITORY / 'requirements.txt').read_text().splitlines()
    wanted = {line.split('#')[0].split(';')[0].strip() for line in lines if '==' in line.split('#')[0]}
    locked = {
        line.split(' ')[0] for line in (REPOSITORY / 'requirements.lock').read_text().splitlines() if '==' in line
    }
    assert len(wanted) > 15 and {line.lower().replace('_', '-') for line in wanted} <= locked

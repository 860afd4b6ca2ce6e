"""What README and docs tell to do: the tutorial is done, and every other command is one that its program accepts."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
import urllib.request

import pytest
from _pytest.mark import expression

REPOSITORY = pathlib.Path(__file__).parents[1]
PAGES = [REPOSITORY / 'README.md', *sorted((REPOSITORY / 'docs').glob('*.md'))]
# A network and a training that take seconds.
SMALL = [
    '--config.model=_DenseNetTiny',
    '--config.image_size=32',
    '--config.num_epochs=1',
    '--config.learning_rate=3e-3',
]


def read_commands(page):
    """Returns the commands in the code blocks of a page, each a list of words."""
    blocks = re.findall(r'(?:^    .*\n)+', page.read_text(), re.MULTILINE)
    lines = ''.join(blocks).replace('\\\n', ' ').splitlines()
    lines += re.findall(r'`((?:python|-k) [^`]*)`', page.read_text())
    found = []
    for line in lines:
        words = shlex.split(line, comments=True) if re.match(r'\s*(\w+=\S* )*(\S*python|curl|-k) ', line) else []
        while words and '=' in words[0]:
            words.pop(0)
        if words:
            found.append(words)
    return found


def all_commands():
    return [(page.name, words) for page in PAGES for words in read_commands(page)]


def of_program(name):
    """Returns the arguments of all commands of a program, a script or 'brain_jax.main'."""
    found = []
    for _, words in all_commands():
        if words[0].endswith('python') and name in words[:3]:
            found.append(words[words.index(name) + 1 :])
    return found


def programs():
    names = set()
    for _, words in all_commands():
        if words[0].endswith('python'):
            names |= {word for word in words[1:3] if word.startswith('scripts/') or word == 'brain_jax.main'}
    return sorted(names)


PARSE = """
import importlib, json, os, sys
from absl import flags
from brain_jax.serving import export  # all that takes long to import, once
for program, commands in json.load(sys.stdin).items():
    for arguments in commands:
        if os.fork():  # flags can be defined and given once
            if os.wait()[1]:
                sys.exit(f'{program} does not accept {arguments}')
            continue
        if program == 'brain_jax.main':
            importlib.import_module(program)
        else:
            spec = importlib.util.spec_from_file_location('program', program)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        flags.FLAGS.set_gnu_getopt()
        if 'config' in flags.FLAGS and not any(argument.split('=')[0] == '--config' for argument in arguments):
            arguments = ['--config=configs/densenet121.py', *arguments]
        sys.argv = [program, *arguments]  # where the fields are looked for
        rest = flags.FLAGS(sys.argv)
        if 'config' in flags.FLAGS:
            flags.FLAGS.config.lock()
        assert not any(argument.startswith('--') for argument in rest), rest
        os._exit(0)
"""


def test_commands_are_accepted():
    """Their flags exist, and have values that are allowed."""
    commands = {program: of_program(program) for program in programs()}
    assert all(commands.values())
    process = subprocess.run(
        [sys.executable, '-c', PARSE],
        input=json.dumps(commands),
        cwd=REPOSITORY,
        env=os.environ | {'PYTHONPATH': str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]


def test_every_script_is_told_of():
    told = set(programs())
    assert {f'scripts/{path.name}' for path in (REPOSITORY / 'scripts').glob('*.py')} == told - {'brain_jax.main'}


def test_tests_that_are_named_exist():
    """What `python -m pytest FILE -k EXPRESSION` names selects a test, by the names of its functions and parameters."""
    collect = [sys.executable, '-m', 'pytest', '--collect-only', '-q', '-o', 'addopts=', '-p', 'no:warnings']
    listed = subprocess.run(collect, cwd=REPOSITORY, capture_output=True, text=True).stdout.splitlines()
    names = [name for name in listed if '::' in name]
    assert len(names) > 500
    selections = []
    for _, words in all_commands():
        files = [word for word in words if word.startswith('tests/')]
        wanted = words[words.index('-k') + 1] if '-k' in words else ''
        if 'pytest' in words or words[0] == '-k':
            selections.append((files[0] if files else 'tests/test_hostile', wanted))
    assert len(selections) > 20
    for file, wanted in selections:
        chosen = expression.Expression.compile(wanted).evaluate if wanted else lambda matcher: True
        found = [
            name for name in names if name.startswith(file) and chosen(lambda part, n=name: part.lower() in n.lower())
        ]
        assert found, (file, wanted)


def test_links_lead_somewhere():
    for page in [*PAGES, *REPOSITORY.glob('*.md')]:
        text = re.sub('`[^`]*`', '', page.read_text())
        for target in re.findall(r'\]\(([^)#]+)[^)]*\)', text):
            assert '://' in target or (page.parent / target).exists(), f'{page.name}: {target}'


def test_fields_are_those_of_the_configuration(tmp_path):
    command = [sys.executable, 'scripts/document_config.py', '--output', str(tmp_path / 'config.md')]
    subprocess.run(command, cwd=REPOSITORY, check=True, env=os.environ | {'PYTHONPATH': str(REPOSITORY)})
    assert (tmp_path / 'config.md').read_text() == (REPOSITORY / 'docs/config.md').read_text()


def test_tutorial(tmp_path):
    """Its commands, in their order, with a smaller network: each ends well, and leaves what the page says."""
    pytest.importorskip('gradio')
    for name in ('scripts', 'configs'):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    environment = os.environ | {'PYTHONPATH': str(REPOSITORY), 'TFDS_DATA_DIR': str(tmp_path / 'tfds')}
    server = None
    try:
        for words in read_commands(REPOSITORY / 'docs/tutorial.md'):
            if words[0] == 'curl':
                check_answer(server, words)
                continue
            command = [sys.executable, *words[1:]]
            if 'scripts/make_phantom.py' in words:
                command[command.index('250')], command[command.index('50')] = '16', '5'
            if 'brain_jax.main' in words:
                command += SMALL
            if 'scripts/serve.py' in words:
                command[command.index('8000')] = '0'
                with open(tmp_path / 'serve.log', 'w') as log:
                    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
                server.log = tmp_path / 'serve.log'
                continue
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, (words, done.stderr[-2000:])
    finally:
        if server:
            server.terminate()
            assert server.wait(60) == 0
    assert (tmp_path / 'audit/audit.html').exists()
    assert (tmp_path / 'runs/tutorial/evaluation_test/report.html').exists()
    rows = (tmp_path / 'answers.csv').read_text().splitlines()
    assert len(rows) == 1 + 20 and rows[0].startswith('path,predicted,probability_glioma')
    assert len(list((tmp_path / 'overlays').rglob('*.png'))) == 5
    assert (tmp_path / 'tutorial.keras').exists() and (tmp_path / 'faster.csv').exists()


def check_answer(server, words):
    """Asks the server, whose address its log tells, as `curl` would; the answer names a class."""
    deadline = time.monotonic() + 300  # on a busy machine it takes long to compile
    while not (address := re.search(r'http://127\.0\.0\.1:\d+', server.log.read_text())):
        assert time.monotonic() < deadline and server.poll() is None, server.log.read_text()
        time.sleep(0.5)
    path = words[-1].partition(':8000')[2]
    picture = pathlib.Path(server.log.parent, words[2].partition('@')[2]).read_bytes()
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + picture + b'\r\n--x--\r\n'
    headers = {'Content-Type': 'multipart/form-data; boundary=x'}
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(address[0] + path, body, headers)) as response:
                assert b'glioma' in response.read()
                return
        except OSError:
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.5)

"""What README and docs tell to do: every command is one that its program accepts, and `make soak` gives them all."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import httpx
import pytest
from _pytest.mark import expression

REPOSITORY = pathlib.Path(__file__).parents[1]
PAGES = [REPOSITORY / 'README.md', *sorted((REPOSITORY / 'docs').glob('*.md'))]
# A network and a training that take seconds.
SMALL = [
    '--config.model=_DenseNetTiny',
    '--config.image_size=32',
    '--config.batch_size=16',
    '--config.num_epochs=1',
    '--config.learning_rate=3e-3',
]

# Flags of other programs, and what makes them quick.
QUICK = {'--train_per_class': '16', '--test_per_class': '5', '--images_per_class': '2', '--seconds': '2'}
# What names in capitals stand for.
PLACEHOLDERS = {'DATA': 'heads', 'GROUPS': 'groups.csv', 'WEIGHTS': 'weights.safetensors'}
# Commands that `test_all_commands` does not give, by a word of theirs, and what does.
ELSEWHERE = {
    'pytest': 'the suite and `make soak`',
    '-k': 'the same',
    'venv': 'who installs',
    'scripts/benchmark.py': 'test_benchmark.py',
    'scripts/compile_for.py': 'test_compiled.py',
    'scripts/document_config.py': 'test_fields_are_those_of_the_configuration',
    '--config.distributed': 'test_distributed.py',
    'imagenet': 'nobody: it downloads',
}


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
import tensorflow  # what takes long to import, once
from absl import flags
from brain_jax.serving import export
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


class Reader:
    """Gives the commands of the pages in a folder of its own, with less data and a smaller network than they name."""

    def __init__(self, folder):
        self.folder, self._server = folder, None
        for name in ('scripts', 'configs'):
            (folder / name).symlink_to(REPOSITORY / name)
        self._environment = os.environ | {'PYTHONPATH': str(REPOSITORY), 'TFDS_DATA_DIR': str(folder / 'tfds')}

    def __enter__(self):
        return self

    def __exit__(self, *unused_error):
        self._stop()

    def give(self, words):
        """Gives one command, which must end well; a server goes on until the next one, or the end."""
        if words[0] == 'curl':
            self._ask(words)
            return
        command = [sys.executable, *words[1:]]
        for flag, value in QUICK.items():
            if flag in command:
                command[command.index(flag) + 1] = value
        if 'brain_jax.main' in words or 'scripts/cross_validate.py' in words:
            command += SMALL
        if 'scripts/serve.py' in words:
            self._serve(command)
            return
        if 'scripts/load_test.py' in words:
            command[command.index('--url') + 1] = self._address()
        done = subprocess.run(command, cwd=self.folder, env=self._environment, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr[-2000:])

    def _stop(self):
        if self._server:
            self._server.terminate()
            assert self._server.wait(60) == 0
            self._server = None

    def _serve(self, command):
        self._stop()
        self._log = self.folder / 'serve.log'
        with open(self._log, 'w') as log:
            command = [*command, '--port', '0']
            self._server = subprocess.Popen(command, cwd=self.folder, env=self._environment, stdout=log, stderr=log)

    def _address(self):
        """Returns the server's address, which its log tells, once it is ready."""
        deadline = time.monotonic() + 300  # on a busy machine it takes long to compile
        while True:
            if address := re.search(r'http://127\.0\.0\.1:\d+', self._log.read_text()):
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f'{address[0]}/healthz').status_code == 200:
                        return address[0]
            assert time.monotonic() < deadline and self._server.poll() is None, self._log.read_text()
            time.sleep(0.5)

    def _ask(self, words):
        """Asks the server as `curl --form NAME=VALUE ... URL` does; the answer names a class."""
        fields = dict(word.split('=', 1) for word in words[1:-1] if word != '--form')
        path = self.folder / fields.pop('files').removeprefix('@')
        url = self._address() + words[-1].partition(':8000')[2]
        reply = httpx.post(url, files={'files': (path.name, path.read_bytes())}, data=fields, timeout=300)
        assert reply.status_code == 200 and 'glioma' in reply.text, (words, reply.text)


def prepare(reader):
    """Makes what the pages take for granted: data, their groups, weights, a run of the demo, scans."""
    pydicom_data, testing = (pytest.importorskip(name) for name in ('pydicom.data', 'nibabel.testing'))
    for command in (
        'python scripts/make_phantom.py --output_dir heads --train_per_class 16 --test_per_class 5 --image_size 64',
        'python scripts/audit_dataset.py --data_dir heads --output audit',
        'python -m brain_jax.main --config configs/densenet121.py:demo --workdir runs/demo',
        'python scripts/evaluate.py --workdir runs/demo',
        'python scripts/export.py --workdir runs/demo --format safetensors --output weights.safetensors',
    ):
        reader.give(command.split())
    folder = reader.folder
    shutil.copy(folder / 'audit/groups.csv', folder / 'groups.csv')
    shutil.copytree(folder / 'heads/Testing/glioma', folder / 'pictures')
    shutil.copy(min((folder / 'pictures').iterdir()), folder / 'image.png')
    shutil.copy(pydicom_data.get_testdata_file('MR_small.dcm'), folder / 'scan.dcm')
    shutil.copy(testing.data_path / 'example4d.nii.gz', folder / 'volume.nii.gz')


@pytest.mark.soak
def test_all_commands(tmp_path):
    """Those of README and docs, one page after the other, in one folder."""
    pytest.importorskip('gradio')
    given = 0
    with Reader(tmp_path) as reader:
        prepare(reader)
        for page, words in all_commands():
            line = re.sub(r'\[[^]]*\]', '', ' '.join(words))  # what may be left out
            if any(re.search(rf'(^|[ =/]){word}', line) for word in ELSEWHERE):
                continue
            given += 1
            for name, meaning in {**PLACEHOLDERS, 'N': f'runs/{given}'}.items():
                line = re.sub(rf'\b{name}\b', meaning, line)
            print(f'{page}: {line}', flush=True)
            reader.give(line.split())
    print(f'{given} commands were given')
    assert given > 40
    # What the tutorial says.
    assert (tmp_path / 'audit/audit.html').exists()
    assert (tmp_path / 'runs/tutorial/evaluation_test/report.html').exists()
    rows = (tmp_path / 'answers.csv').read_text().splitlines()
    assert len(rows) == 1 + 20 and rows[0].startswith('path,predicted,probability_glioma')
    assert len(list((tmp_path / 'overlays').rglob('*.png'))) == 5
    assert (tmp_path / 'tutorial.keras').exists() and (tmp_path / 'faster.csv').exists()

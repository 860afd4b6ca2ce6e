"""Fixtures for several test modules, and a cache that spares compiling the same network for every test."""

import json
import os
import pathlib
import re
import select
import shutil
import subprocess
import sys
import tempfile

import pytest

# Read when JAX is imported, here and in the processes that tests start. Removed when this one ends.
CACHE = tempfile.TemporaryDirectory(prefix='brain_jax_tests_')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', CACHE.name)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')

# Files that take a minute or more start first: at the end one of them would keep a single core busy.
SLOW = (
    'train', 'distributed', 'faults', 'pretrained', 'export', 'web', 'interruption', 'cross_validation',
    'benchmark', 'pipeline', 'models', 'compiled', 'predict', 'network', 'small_data',
)  # fmt: skip


def pytest_collection_modifyitems(items):
    names = [f'test_{name}' for name in SLOW]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


@pytest.fixture(scope='session')
def shared():
    """The folder with the real data and weights beside the project; a test that asks for it is skipped without it."""
    path = pathlib.Path(__file__).parents[2] / 'shared'
    if not path.is_dir():
        pytest.skip(f'no folder {path}')
    return path


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Folders of 64 training and 20 test images, and the flags' values that name them."""
    from brain_jax.data import phantom  # JAX reads the variables above when it is imported

    folder = tmp_path_factory.mktemp('data')
    phantom.make_phantom(folder / 'phantom', train_per_class=16, test_per_class=5, image_size=32)
    return {'data_dir': str(folder / 'phantom'), 'prepared_dir': str(folder / 'prepared')}


@pytest.fixture(scope='module')
def quick_compilation():
    """Compiles without LLVM's optimisations, here and in started processes: for what is correct, however slow it is."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
        jax.config.update('jax_disable_most_optimizations', True)
        yield
        jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def reader_process(tmp_path_factory):
    """Returns a function (reader, path) -> what came of it, see `reader_process.serve`."""
    root = pathlib.Path(__file__).parents[1]
    folder = tmp_path_factory.mktemp('elsewhere')
    environment = os.environ | {'HOME': str(folder), 'TMPDIR': str(folder), 'PYTHONPATH': str(root)}
    command = [sys.executable, root / 'tests' / 'reader_process.py']
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
    results = []
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:

        def read(reader, path):
            print(json.dumps([reader, str(path)]), file=process.stdin, flush=True)
            assert select.select([process.stdout], [], [], 90)[0], 'no answer'
            results.append(json.loads(process.stdout.readline()))
            assert not any(folder.iterdir())
            return results[-1]

        yield read
        process.stdin.close()
    ended = [result for result in results if 'seconds' in result]
    seconds, size = (max(result[field] for result in ended) for field in ('seconds', 'bytes'))
    print(f'\nof {len(ended)} files the slowest took {seconds:.2f} s, and the largest {size / 1e6:.0f} MB')


@pytest.fixture
def check_in_chromium(tmp_path):
    """Returns a function that opens a page of our own in Chromium, offline, and checks what a reader would see.

    There must be no message on the console, no broken image, and, at 1280 and at 400 pixels, nothing beyond the right
    edge but in a region that scrolls.
    """
    browser = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if browser is None:
        pytest.skip('no Chromium')

    def open_page(page):
        """Opens a page from its file address; returns its document and what Chromium logs."""
        command = [browser, '--headless', '--no-sandbox', '--disable-gpu', '--window-size=1300,900', '--dump-dom']
        command += ['--enable-logging=stderr', '--virtual-time-budget=5000', f'--user-data-dir={tmp_path / "profile"}']
        process = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
        return process.stdout, process.stderr

    def check(path):
        document, log = open_page(path)
        assert '</body>' in document and 'CONSOLE' not in log
        # The same page with a script, which the page itself forbids, in frames: no window is narrower than 500 pixels.
        script = """<script>
          const right = element => element.closest('.scroll') ? 0 : element.getBoundingClientRect().right;
          const outside = [...document.querySelectorAll('body *')].filter(element => right(element) > innerWidth);
          const wide = document.documentElement.scrollWidth > innerWidth;
          const broken = [...document.images].filter(image => !image.naturalWidth);
          const found = `${outside.length} outside, ${broken.length} broken, scrolls ${wide};`;
          parent.postMessage(`${innerWidth} wide: ${found}`, '*');
        </script></body>"""
        page = re.sub('<meta http-equiv[^>]*>', '', path.read_text(encoding='utf-8')).replace('</body>', script)
        (tmp_path / 'page.html').write_text(page, encoding='utf-8')
        frames = [f'<iframe src="page.html" style="border: 0; width: {width}px"></iframe>' for width in (1280, 400)]
        listener = '<script>onmessage = event => document.body.append(event.data)</script>'
        (tmp_path / 'frames.html').write_text(f'<body>{listener}{"".join(frames)}</body>')
        document, _ = open_page(tmp_path / 'frames.html')
        for width in (1280, 400):
            assert f'{width} wide: 0 outside, 0 broken, scrolls false;' in document

    return check

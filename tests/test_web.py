"""The server of a run, from outside: requests that it answers and refuses, and its page in a real browser."""

import asyncio
import collections
import concurrent.futures
import contextlib
import http.client
import importlib
import io
import json
import os
import pathlib
import re
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from test_network import FORBID

from brain_jax import train
from brain_jax.data import images
from brain_jax.evaluation import evaluate
from brain_jax.serving import answers, predictor

httpx = pytest.importorskip('httpx')
nibabel = pytest.importorskip('nibabel')
parser = pytest.importorskip('prometheus_client.parser')
pydicom = pytest.importorskip('pydicom')
pytest.importorskip('pydicom.data')
uvicorn = pytest.importorskip('uvicorn')
web = pytest.importorskip('brain_jax.serving.web')  # with FastAPI and Gradio
batching, gate, service, uploads = (
    importlib.import_module(f'brain_jax.serving.{name}') for name in ('batching', 'gate', 'service', 'uploads')
)

pytestmark = pytest.mark.usefixtures('quick_compilation')
ROOT = pathlib.Path(__file__).parents[1]
get_config = runpy.run_path(str(ROOT / 'configs/densenet121.py'))['get_config']


@pytest.fixture(scope='module')
def workdir(data, tmp_path_factory):
    """The folder of a run that was trained and evaluated on generated images."""
    folder = tmp_path_factory.mktemp('runs') / 'run <b>'  # a name that must be escaped where it is shown
    config = get_config('scratch')
    config.update(
        model='_DenseNetTiny', image_size=32, batch_size=16, eval_batch_size=24, num_epochs=3.0, learning_rate=3e-3,
        validation_fraction=0.25, **data,
    )  # fmt: skip
    train.train_and_evaluate(config.lock(), folder)
    evaluate.evaluate_run(folder, folder / 'evaluation_test', wanted_errors=(0.05, 0.5))
    return folder


@pytest.fixture(scope='module')
def loaded(workdir):
    return predictor.Predictor.from_workdir(workdir, wanted_error=0.5)


@pytest.fixture(scope='module')
def heads(data):
    """Files of generated heads."""
    return sorted(pathlib.Path(data['data_dir']).glob('Testing/*/*.png'))


@contextlib.contextmanager
def serving(workdir, tmp_path_factory, *flags):
    """Starts a server that may reach its own machine only, and yields its address once it is ready.

    In the end it must stop as it should, and leave no file behind.
    """
    folder, home = tmp_path_factory.mktemp('temporary'), tmp_path_factory.mktemp('home')
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'TMPDIR': str(folder), 'HOME': str(home)}
    command = [sys.executable, '-c', FORBID, 'loopback', 'script', ROOT / 'scripts/serve.py', '--workdir', workdir]
    command += ['--port', '0', '--wanted_error', '0.5', *flags]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        try:
            assert select.select([process.stdout], [], [], 60)[0], 'the server does not start'
            address = re.search(r'http://127\.0\.0\.1:\d+', process.stdout.readline()).group()
            wait_until(lambda: httpx.get(f'{address}/healthz').status_code == 200)
            yield address
            assert [path for path in folder.rglob('*') if path.is_file()] == []
        finally:
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=30)
    assert process.returncode == 0, log
    assert 'Traceback' not in log
    assert list(folder.iterdir()) == []


@pytest.fixture(scope='module')
def server(workdir, tmp_path_factory):
    with serving(workdir, tmp_path_factory) as address:
        yield address


def wait_until(is_so, seconds=120):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.05)


def as_files(*contents):
    return [('files', ('image', content)) for content in contents]


def read_metrics(server):
    """Returns the values of all samples by name, those of different labels added up."""
    found = {}
    for family in parser.text_string_to_metric_families(httpx.get(f'{server}/metrics').text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def make_volume(shape=(12, 16, 10)):
    """Returns a NIfTI file, brighter in the middle."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing='ij'))
    return nibabel.Nifti1Image((1000 * np.clip(1 - (grid**2).sum(0), 0, 1)).astype(np.int16), np.eye(4)).to_bytes()


# Answers.


def test_concurrent_answers_are_those_of_the_predictor(server, loaded, heads):
    files = [path.read_bytes() for path in heads]
    expected = loaded.predict([images.decode_image(data) for data in files])
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        post = lambda data: httpx.post(f'{server}/api/predict', files=as_files(data))  # noqa: E731
        responses = list(pool.map(post, files * 2))
    for response, prediction in zip(responses, expected * 2, strict=True):
        assert response.status_code == 200
        (answer,) = response.json()['answers']
        (image,) = answer['images']
        assert answer['error'] is None and image['slice'] == ''
        assert image['predicted'] == prediction.predicted and image['reason'] == prediction.reason
        assert list(image['probabilities']) == list(loaded.class_names)
        np.testing.assert_allclose(list(image['probabilities'].values()), prediction.probabilities, atol=1e-5)
        assert image['out_of_distribution'] == pytest.approx(prediction.out_of_distribution, rel=1e-3)
    calibration = json.loads((loaded.workdir / 'calibration.json').read_text())
    assert responses[0].json()['hashes'] == calibration['hashes']


def test_several_files_of_which_one_is_broken(server, heads):
    volume, broken = make_volume(), heads[0].read_bytes()[:200]
    files = as_files(heads[0].read_bytes(), broken, volume)
    response = httpx.post(f'{server}/api/predict', files=files, data={'plane': 'coronal', 'slices': '3'})
    assert response.status_code == 200
    first, second, third = response.json()['answers']
    assert [answer['file'] for answer in (first, second, third)] == [0, 1, 2]
    assert len(first['images']) == 1 and second['images'] == [] and 'cannot be decoded' in second['error']
    assert len({image['slice'] for image in third['images']}) == 3
    assert all(image['slice'].startswith('coronal') for image in third['images'])
    assert first['combined'] is None and second['combined'] is None


@pytest.mark.parametrize('slices', ['3', 'all', 'middle'])
def test_a_volume_is_answered_as_by_the_command_line(server, loaded, tmp_path, slices):
    (tmp_path / 'volume.nii').write_bytes(make_volume())
    form = {'files': as_files(make_volume()), 'data': {'plane': 'coronal', 'slices': slices}}
    (found,) = httpx.post(f'{server}/api/predict', **form).json()['answers']
    slices = int(slices) if slices.isdecimal() else slices
    (answer,) = answers.answer_files(loaded, [str(tmp_path / 'volume.nii')], plane='coronal', slices=slices)
    assert [image['slice'] for image in found['images']] == [name for name, _ in answer.slices]
    combined, expected = found['combined'], answer.prediction
    assert combined['predicted'] == expected.predicted and combined['reason'] == expected.reason
    np.testing.assert_allclose(list(combined['probabilities'].values()), expected.probabilities, atol=1e-5)
    assert combined['out_of_distribution'] == pytest.approx(expected.out_of_distribution, rel=1e-3)


def test_nothing_of_a_patient_is_in_an_answer(server, tmp_path):
    dataset = pydicom.dcmread(pydicom.data.get_testdata_file('CT_small.dcm'))
    dataset.PatientName, dataset.PatientID, dataset.StudyDescription = 'Secret^One', 'Secret2', 'Secret3'
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    good = ('files', ('Secret4/Secret5.dcm', buffer.getvalue()))
    bad = ('files', ('Secret6.dcm', buffer.getvalue()[:600]))
    response = httpx.post(f'{server}/api/predict', files=[good, bad])
    assert response.status_code == 200
    assert response.json()['answers'][0]['images'] and response.json()['answers'][1]['error']
    assert 'Secret' not in response.text
    refused = httpx.post(f'{server}/api/predict', files=[bad])
    assert refused.status_code == 422 and 'Secret' not in refused.text


def test_description_and_metrics(server, heads):
    description = httpx.get(f'{server}/openapi.json').json()
    operation = description['paths']['/api/predict']['post']
    assert 'multipart/form-data' in operation['requestBody']['content']
    assert {'200', '401', '408', '413', '415', '422', '503'} <= set(operation['responses'])
    assert set(description['paths']) == {'/api/predict', '/healthz', '/metrics'}
    schemas = description['components']['schemas']
    assert set(schemas['FileAnswer']['required']) == {'file', 'images', 'combined', 'error'}
    assert set(schemas['ImageAnswer']['required']) == {'slice', *schemas['Answer']['required']}
    before = read_metrics(server)
    assert httpx.post(f'{server}/api/predict', files=as_files(heads[0].read_bytes())).status_code == 200
    assert httpx.post(f'{server}/api/predict', files=as_files(b'')).status_code == 422
    after = read_metrics(server)
    added = {name: after[name] - before.get(name, 0) for name in after}
    assert added['brain_jax_requests_total'] == 3  # these two, and the look at the metrics before
    assert added['brain_jax_errors_total'] == 1
    assert added['brain_jax_request_seconds_count'] == 3
    assert added['brain_jax_batch_size_count'] == added['brain_jax_batch_size_sum'] == 1
    assert after['brain_jax_queue_length'] == 0 and after['process_resident_memory_bytes'] > 1e7


# Refusals.


def make_bomb():
    """Returns a small PNG of 13,000 by 13,000 pixels, of which it holds as many zeros as fit 64 kB."""
    parts = (
        (b'IHDR', struct.pack('>IIBBBBB', 13_000, 13_000, 8, 0, 0, 0, 0)),
        (b'IDAT', zlib.compress(bytes(2**26), 9)),
        (b'IEND', b''),
    )
    chunks = [
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (b'', 'an empty file'),
        (b'no image', 'no JPEG, PNG, BMP, TIFF, WebP, DICOM or NIfTI file'),
        (b'\x89PNG\r\n\x1a\n' + bytes(100), 'cannot be decoded|header is damaged'),
        (make_bomb(), 'megapixels'),
    ],
    ids=['empty', 'text', 'broken', 'bomb'],
)
def test_files_that_are_refused(server, content, reason):
    response = httpx.post(f'{server}/api/predict', files=as_files(content))
    assert response.status_code == 422
    assert re.fullmatch(rf'file 0: .*({reason}).*', response.json()['detail'])


@pytest.mark.parametrize(
    ('status', 'method', 'path', 'arguments'),
    [
        (422, 'POST', '/api/predict', {'files': [('file', ('image', b'x'))]}),
        (422, 'POST', '/api/predict', {'files': as_files(b'x'), 'data': {'plane': 'no'}}),
        (422, 'POST', '/api/predict', {'files': as_files(b'x'), 'data': {'slices': '-1'}}),
        (400, 'POST', '/api/predict', {'files': as_files(*[b'x'] * (service.MAX_FILES + 1))}),
        (400, 'POST', '/api/predict', {'content': b'x', 'headers': {'content-type': 'multipart/form-data'}}),
        (413, 'POST', '/api/predict', {'files': as_files(make_volume((8, 8, 99))), 'data': {'slices': 'all'}}),
        (415, 'POST', '/api/predict', {'json': {'files': []}}),
        (403, 'POST', '/api/predict', {'files': as_files(b'x'), 'headers': {'sec-fetch-site': 'cross-site'}}),
        (404, 'GET', '/api/predict', {}),
        (404, 'GET', '/docs', {}),
        (404, 'POST', '/gradio_api/upload', {'files': as_files(b'x')}),
        (404, 'GET', '/gradio_api/file=/etc/passwd', {}),
        (404, 'GET', '/gradio_api/deep_link', {'params': {'session_hash': 'x'}}),
        (404, 'POST', '/gradio_api/call/predict', {'json': {'data': []}}),
        (400, 'GET', '/', {'headers': {'host': 'elsewhere.example'}}),
    ],
)
def test_requests_that_are_refused(server, status, method, path, arguments):
    response = httpx.request(method, server + path, **arguments)
    assert response.status_code == status


def test_inputs_of_the_page_are_plain_values(server):
    # Gradio takes such an object for a file, and would fetch it.
    elsewhere = {'path': f'{server}/healthz', 'url': f'{server}/healthz', 'meta': {'_type': 'gradio.FileData'}}
    asked = read_metrics(server)['brain_jax_requests_total']
    for inputs in ([elsewhere], [[elsewhere]], 'text', None):
        event = {'data': inputs, 'fn_index': 0, 'session_hash': 'x'}
        assert httpx.post(f'{server}/gradio_api/queue/join', json=event).status_code == 422
    event = {'data': ['x' * gate.MAX_EVENT_BYTES], 'fn_index': 0, 'session_hash': 'x'}
    assert httpx.post(f'{server}/gradio_api/queue/join', json=event).status_code == 413
    assert read_metrics(server)['brain_jax_requests_total'] - asked == 6


def test_too_much_is_refused_while_it_comes(server):
    port = int(server.rpartition(':')[2])
    form = b'host: localhost\r\ncontent-type: multipart/form-data; boundary=b\r\n'
    start = b'--b\r\ncontent-disposition: form-data; name="files"; filename="f"\r\n\r\n'
    with socket.create_connection(('127.0.0.1', port), timeout=30) as connection:
        connection.sendall(b'POST /api/predict HTTP/1.1\r\n' + form + b'content-length: 999999999999\r\n\r\n' + start)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 413  # of which next to nothing was sent
    sent, chunk = 0, b'100000\r\n' + bytes(2**20) + b'\r\n'
    with socket.create_connection(('127.0.0.1', port), timeout=30) as connection:
        connection.sendall(b'POST /api/predict HTTP/1.1\r\n' + form + b'transfer-encoding: chunked\r\n\r\n')
        connection.sendall(b'%x\r\n%s\r\n' % (len(start), start))
        while not select.select([connection], [], [], 0)[0]:
            connection.sendall(chunk)
            sent += 2**20
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 413
    assert service.MAX_BYTES <= sent + 2**20 <= service.MAX_BYTES + 2**26  # what the system holds in between


# Calls scripts/serve.py with several lists of flags, each in a process of its own; what all import is imported once.
CALL_EACH = """if True:
    import json, os, runpy, sys
    from absl import app
    main = runpy.run_path(sys.argv[1])['main']
    import brain_jax.serving.web
    started = []
    for log, flags in json.loads(sys.argv[2]):
        process = os.fork()
        if not process:
            os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
            app.run(main, ['serve.py', *flags])
        started.append(process)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]))
"""


def test_what_is_wrong_is_told_in_one_line(workdir, tmp_path):
    (tmp_path / 'empty').mkdir()
    shutil.copytree(workdir, tmp_path / 'new', ignore=shutil.ignore_patterns('calibration.json'))
    with socket.create_server(('127.0.0.1', 0)) as listener:
        port = listener.getsockname()[1]
        cases = [
            (['--workdir', tmp_path / 'nowhere'], r'.*/nowhere .*'),
            (['--workdir', tmp_path / 'empty'], r'.*/empty .*no run\.json in it.*'),
            (['--workdir', tmp_path / 'new'], r'.*/new was not evaluated yet.*: run scripts/evaluate\.py --workdir .*'),
            (['--port', port], rf'cannot listen on port {port} of 127\.0\.0\.1: .*; give another --port or --host'),
            (['--host', '192.0.2.1'], r'cannot listen on port 0 of 192\.0\.2\.1: .*'),  # an address that is nobody's
            (['--host', 'a..b'], r'cannot listen on port 0 of a\.\.b: .*'),
            (['--runtime', 'onnxruntime'], r'onnxruntime serves .*/exports/model\.onnx .* not there: run scripts/.*'),
            (['--wanted_error', 0.3], r'wanted_error is 0\.3: scripts/evaluate\.py looked for 0\.05, 0\.5; use .*'),
        ]
        calls = [
            (str(tmp_path / f'{i}.log'), ['--workdir', str(workdir), '--port', '0', *map(str, flags)])
            for i, (flags, _) in enumerate(cases)
        ]
        command = [sys.executable, '-c', CALL_EACH, ROOT / 'scripts/serve.py', json.dumps(calls)]
        environment = os.environ | {'PYTHONPATH': str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert json.loads(done.stdout) == [1] * len(cases), done.stderr
    for (log, _), (_, message) in zip(calls, cases, strict=True):
        assert re.fullmatch(f'error: {message}\n', pathlib.Path(log).read_text())


# The gate and the queue, by themselves.


def ask(app, *messages, method='POST', path=gate.API, headers=()):
    """Returns the status and the headers that an ASGI application answers with; after the messages nothing comes."""
    sent, messages = [], list(messages)

    async def receive():
        if not messages:
            await asyncio.sleep(60)
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    headers = [(name.encode(), value.encode()) for name, value in headers]
    scope = {'type': 'http', 'method': method, 'path': path, 'headers': headers, 'query_string': b''}
    asyncio.run(app(scope, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]['headers']}
    return sent[0]['status'], found


async def echo(scope, receive, send):
    """An application that reads all, and is content."""
    while (await receive()).get('more_body'):
        pass
    await send({'type': 'http.response.start', 'status': 200, 'headers': []})
    await send({'type': 'http.response.body', 'body': b''})


FORM = [('content-type', 'multipart/form-data; boundary=b'), ('transfer-encoding', 'chunked')]


def test_slow_requests_end(monkeypatch):
    monkeypatch.setattr(gate, 'RECEIVE_SECONDS', 0.2)
    monkeypatch.setattr(gate, 'LINGER_SECONDS', 0.1)
    app = gate.Gate(echo, monitor=service.Monitor())
    part = {'type': 'http.request', 'body': b'x', 'more_body': True}
    assert ask(app, part, headers=FORM)[0] == 408
    assert ask(app, part, part | {'more_body': False}, headers=FORM)[0] == 200


def test_so_many_uploads_at_a_time(monkeypatch):
    monkeypatch.setattr(gate, 'MAX_UPLOADS', 0)
    monkeypatch.setattr(gate, 'LINGER_SECONDS', 0.1)
    status, headers = ask(gate.Gate(echo, monitor=service.Monitor()), headers=FORM)
    assert status == 503 and int(headers['retry-after']) > 0


@pytest.mark.parametrize(
    ('header', 'status'),
    [
        (None, 401),
        ('Bearer wrong', 401),
        ('Bearer', 401),
        ('Basic !', 401),
        ('Bearer sesame\u00e9', 401),
        ('Bearer sesame', 200),
        ('Basic YW55OnNlc2FtZQ==', 200),  # any:sesame
        ('Basic c2VzYW1lOg==', 401),  # sesame:
    ],
)
def test_the_token_opens(header, status):
    app = gate.Gate(echo, monitor=service.Monitor(), token='sesame')
    headers = [('authorization', header)] if header else []
    message = {'type': 'http.request', 'body': b''}
    for path in ('/', '/metrics', '/openapi.json', '/gradio_api/queue/data', '/assets/index.js'):
        found, answered = ask(app, message, method='GET', path=path, headers=headers)
        assert found == status and ('www-authenticate' in answered) == (status == 401)
    assert ask(app, message, method='GET', path='/healthz')[0] == 200


def test_connections_without_a_request_are_closed(monkeypatch):
    monkeypatch.setattr(web, 'HEAD_SECONDS', 0.3)
    listener = web.listen('127.0.0.1', 0)
    running = uvicorn.Server(uvicorn.Config(echo, http=web._Protocol, ws='none', lifespan='off', log_level='error'))
    thread = threading.Thread(target=running.run, kwargs={'sockets': [listener]})
    thread.start()
    try:
        with socket.create_connection(listener.getsockname(), timeout=10) as connection:
            connection.sendall(b'GET / HTTP/1.1\r\nhost: localhost\r\n\r\n')
            assert connection.recv(100).startswith(b'HTTP/1.1 200')
            start = time.monotonic()
            while time.monotonic() - start < 10:  # a head that never ends
                try:
                    connection.sendall(b'GET' if time.monotonic() - start < 0.05 else b'/')
                    if select.select([connection], [], [], 0.05)[0] and not connection.recv(100):
                        break
                except ConnectionError:
                    break
            else:
                pytest.fail('it is still open')
    finally:
        running.should_exit = True
        thread.join()


def test_what_waits_is_answered_together(loaded, heads):
    calls = []

    def counting(batch):
        calls.append(len(batch))
        return loaded.answer(batch)

    batcher = batching.Batcher(loaded._replace(answer=counting), None)
    pictures = [images.read_image(path) for path in heads[:11]]
    futures = [future for picture in pictures for future in batcher.submit([picture])]
    futures[3].cancel()
    batcher._seconds = {1: 1.0, 8: 1.1, 64: 100.0}  # a batch of 64 would not pay
    batcher.start(warm_up=False)
    batcher.stop()
    assert calls == [7, 3]  # of the first 8 one was cancelled
    expected = loaded.predict(pictures)
    for i, (future, prediction) in enumerate(zip(futures, expected, strict=True)):
        if i != 3:
            found = future.result(timeout=0)
            np.testing.assert_allclose(found.prediction.probabilities, prediction.probabilities, atol=1e-5)
            assert found.heat is None


def test_a_defect_reaches_those_who_wait_and_no_others(loaded, heads):
    def failing(predictor, batch):
        raise ZeroDivisionError

    batcher = batching.Batcher(loaded, failing)
    batcher.start(warm_up=False)
    picture = images.read_image(heads[0])
    with pytest.raises(ZeroDivisionError):
        batcher.submit([picture], explain=True)[0].result(timeout=60)
    assert batcher.submit([picture])[0].result(timeout=60).prediction.predicted in loaded.class_names
    batcher.stop()
    with pytest.raises(batching.Full):
        batcher.submit([picture])


def test_it_can_be_stopped_while_it_compiles(loaded):
    begun = threading.Event()

    def slow(batch):
        begun.set()
        time.sleep(0.1)
        return loaded.answer(batch)

    batcher = batching.Batcher(loaded._replace(answer=slow), None)  # which would fail where explanations are compiled
    batcher.start()
    begun.wait(10)
    (future,) = batcher.submit([np.zeros((8, 8), np.uint8)])
    batcher.stop()
    assert future.result(timeout=0).prediction.predicted in loaded.class_names


def test_a_full_queue_takes_all_or_nothing(loaded):
    batcher = batching.Batcher(loaded, None, max_waiting=3)
    picture = np.zeros((8, 8), np.uint8)
    batcher.submit([picture] * 2)
    with pytest.raises(batching.Full):
        batcher.submit([picture] * 2)
    assert len(batcher) == 2


def test_too_much_to_do_is_503(workdir, heads, monkeypatch):
    served = service.Service(workdir, wanted_error=0.5)
    served.batcher.max_waiting = 1

    async def post(count):
        transport = httpx.ASGITransport(web.create_app(served))  # Gradio makes an event loop where none runs
        async with httpx.AsyncClient(transport=transport, base_url='http://localhost') as client:
            files = as_files(*[heads[0].read_bytes()] * count)
            return await client.post('/api/predict', files=files), await client.get('/healthz')

    response, health = asyncio.run(post(2))
    assert response.status_code == 503 and 'too many' in response.json()['detail']
    assert int(response.headers['retry-after']) > 0
    assert health.status_code == 503 and health.json()['status'] == 'compiling'
    monkeypatch.setattr(service, 'ANSWER_SECONDS', 0.1)  # nothing answers: the thread was not started
    response, _ = asyncio.run(post(1))
    assert response.status_code == 503 and 'no answer within' in response.json()['detail']
    served.batcher.start(warm_up=False)
    served.stop()


def test_uploads_are_dropped(monkeypatch):
    held = uploads.Uploads()
    first = held.add(b'x' * 10, '.png')
    assert held.get(first).data == b'x' * 10
    monkeypatch.setattr(uploads, 'MAX_HELD', 15)
    second = held.add(b'y' * 10, '')
    with pytest.raises(web.InputError, match='no longer held'):
        held.get(first)
    monkeypatch.setattr(uploads, 'HELD_SECONDS', -1)
    held.expire()
    with pytest.raises(web.InputError, match='no longer held'):
        held.get(second)
    assert len(held) == 0


# The page, in a browser.


@pytest.fixture(scope='module')
def browser():
    """A headless Chromium."""
    playwright = pytest.importorskip('playwright.sync_api')
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if path is None:
        pytest.skip('no Chromium')
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield chromium
        chromium.close()


@contextlib.contextmanager
def opening(browser, server, **options):
    """Opens the page of a server; in the end its console must be empty, and nothing asked for from elsewhere."""
    context = browser.new_context(viewport={'width': 1600, 'height': 1000}, reduced_motion='reduce', **options)
    opened, problems, addresses = context.new_page(), [], []
    opened.on(
        'console', lambda message: problems.append(message.text) if message.type in ('error', 'warning') else None
    )
    opened.on('pageerror', lambda error: problems.append(str(error)))
    opened.on('request', lambda request: addresses.append(request.url))
    opened.goto(server)
    opened.wait_for_selector('.drop[data-ready]')
    yield opened
    context.close()
    assert problems == []
    assert addresses and all(address.startswith((server, 'data:', 'blob:')) for address in addresses)


@pytest.fixture
def page(browser, server):
    """The page of the server, which drops what it holds when it is closed."""
    with opening(browser, server) as opened:
        yield opened
    wait_until(lambda: read_metrics(server)['brain_jax_held_files'] == 0)


def choose(page, name, content):
    page.set_input_files('.drop input', {'name': name, 'mimeType': '', 'buffer': content})


def read_bars(page, element):
    """Returns the percentages that an answer shows."""
    found = page.locator(f'{element} table.bars .number').all_inner_texts()
    return [text.replace('\xa0', ' ') for text in found]


def check_width(page, width):
    """Checks that at a width nothing lies beyond the right edge, and that the notice is in sight."""
    page.set_viewport_size({'width': width, 'height': 900})
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
    beyond = """[...document.querySelectorAll('.gradio-container *')]
      .filter(element => !element.closest('#card table') && element.getBoundingClientRect().right > innerWidth + 1)
      .map(element => element.outerHTML)"""
    assert page.evaluate(beyond) == []
    for end in (0, 10**6):
        page.mouse.wheel(0, end)
        box = page.locator('.notice').bounding_box()
        assert box['y'] >= 0 and box['y'] + box['height'] <= 900
    page.mouse.wheel(0, -(10**6))


def test_a_picture_is_answered_and_explained(page, loaded, heads):
    choose(page, 'head.png', heads[0].read_bytes())
    page.wait_for_selector('.verdict')
    (prediction,) = loaded.predict([images.read_image(heads[0])])
    assert read_bars(page, '#words') == [f'{100 * p:.1f} %' for p in prediction.probabilities]
    assert prediction.predicted in page.inner_text('.verdict')
    assert page.evaluate('[...document.images].every(image => image.naturalWidth)')
    assert page.locator('.pictures img').count() == 3
    opacity = lambda: float(page.evaluate('getComputedStyle(document.querySelector(".heat")).opacity'))  # noqa: E731
    assert opacity() == 0.7
    page.locator('#opacity input[type=number]').fill('20')
    wait_until(lambda: opacity() == 0.2, seconds=5)
    assert 'run <b>' in page.inner_text('#header') and 'not a medical device' in page.inner_text('#header')
    assert 'Accuracy' in page.inner_text('#scores') and '%' in page.inner_text('#scores')
    page.locator('#card button').click()
    page.wait_for_selector('#card table')
    for width in (400, 700, 1000, 1600):
        check_width(page, width)


def test_bad_files_are_told_in_words(page):
    choose(page, 'letter.png', b'Dear Sir')
    page.wait_for_selector('[role=alert]')
    assert 'There is no answer' in page.inner_text('[role=alert]')
    choose(page, 'huge.png', b'')
    page.wait_for_selector('text=An empty file.')
    check_width(page, 400)


def test_a_volume_has_slices_and_planes(page, server):
    choose(page, 'volume.nii', make_volume())
    page.wait_for_selector('#slice input[type=range]')
    assert 'axial' in page.inner_text('#words h2')
    assert read_metrics(server)['brain_jax_held_files'] == 1
    before = page.inner_text('#words h2')
    page.locator('#slice input[type=range]').focus()
    page.keyboard.press('ArrowRight')
    wait_until(lambda: page.inner_text('#words h2') != before, seconds=10)
    page.get_by_label('sagittal').check()
    page.wait_for_selector('#words h2:has-text("sagittal")')


def test_all_slices_answer_together_when_they_are_asked(page, server, loaded, tmp_path):
    (tmp_path / 'volume.nii').write_bytes(make_volume())
    (expected,) = answers.answer_files(loaded, [str(tmp_path / 'volume.nii')], slices=64)
    computed = lambda: read_metrics(server)['brain_jax_batch_size_sum']  # noqa: E731
    before = computed()
    choose(page, 'volume.nii', make_volume())
    page.wait_for_selector('#slice input[type=range]')
    assert computed() == before + 1 and not page.is_visible('#scan')
    page.locator('#slice input[type=range]').focus()
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.textContent.trim()') == 'Answer of the whole scan'
    page.keyboard.press('Enter')
    page.wait_for_selector('#scan .verdict')
    assert computed() == before + 1 + len(expected.slices)
    assert read_bars(page, '#scan') == [f'{100 * p:.1f} %' for p in expected.prediction.probabilities]
    assert expected.prediction.predicted in page.inner_text('#scan .verdict')
    votes = collections.Counter(prediction.predicted for _, prediction in expected.slices)
    for name, count in votes.items():
        assert f'{count} for {name}' in page.inner_text('#scan')
    for width in (400, 700, 1000, 1600):
        check_width(page, width)
    page.get_by_label('sagittal').check()
    page.wait_for_selector('#words h2:has-text("sagittal")')
    assert not page.is_visible('#scan')  # it was of the other plane


def test_the_token_opens_the_page(browser, workdir, heads, tmp_path_factory):
    with serving(workdir, tmp_path_factory, '--token', 'sesame') as server:
        assert httpx.get(server).status_code == httpx.get(server, auth=('any', 'wrong')).status_code == 401
        statuses = {}
        with opening(browser, server, http_credentials={'username': 'any', 'password': 'sesame'}) as page:
            page.on('response', lambda response: statuses.update({response.url: response.status}))
            choose(page, 'head.png', heads[0].read_bytes())
            page.wait_for_selector('.verdict')
        paths = {url.removeprefix(server).partition('?')[0] for url, status in statuses.items() if status == 200}
        assert {'/page/upload', '/gradio_api/queue/join', '/gradio_api/queue/data'} <= paths
        assert set(statuses.values()) == {200}


def test_the_keyboard_is_enough(page, heads):
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.matches(".drop input")')
    outline = 'getComputedStyle(document.querySelector(".drop")).outlineStyle'
    assert page.evaluate(outline) == 'solid'  # it can be seen where one is
    # Enter is a click on the field, which opens Chromium's own dialogue; Playwright does not always notice that.
    page.evaluate("document.activeElement.addEventListener('click', () => document.body.dataset.asked = '')")
    page.keyboard.press('Enter')
    page.wait_for_selector('body[data-asked]')
    choose(page, 'head.png', heads[1].read_bytes())
    page.wait_for_selector('.verdict')
    for _ in range(10):
        page.keyboard.press('Tab')
        if page.evaluate('document.activeElement.matches("#opacity input[type=range]")'):
            break
    for _ in range(3):
        page.keyboard.press('ArrowRight')
    opacity = 'getComputedStyle(document.querySelector(".heat")).opacity'
    wait_until(lambda: float(page.evaluate(opacity)) > 0.7, seconds=5)


def test_nothing_serious_keeps_people_out(page):
    axe = pytest.importorskip('axe_playwright_python.sync_playwright')
    choose(page, 'volume.nii', make_volume())
    page.locator('#whole').click()
    page.wait_for_selector('#scan .verdict')
    page.locator('#card button').click()
    found = axe.Axe().run(page).response['violations']
    assert [(each['id'], each['nodes'][0]['html']) for each in found if each['impact'] in ('serious', 'critical')] == []

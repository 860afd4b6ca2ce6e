"""Loads a server of scripts/serve.py with clients that behave and with some that do not, and tells how it fared.

python scripts/load_test.py --url http://127.0.0.1:8000 --images DATA/Testing --clients 8 --seconds 60
"""

import asyncio
import collections
import itertools
import json
import pathlib
import struct
import sys
import time
import urllib.parse
import zlib

import httpx
import numpy as np
from absl import app, flags, logging

_URL = flags.DEFINE_string('url', 'http://127.0.0.1:8000', 'Address of the server.')
_IMAGES = flags.DEFINE_string('images', None, 'Folder of images that clients send.', required=True)
_CLIENTS = flags.DEFINE_integer('clients', 8, 'How many ask at a time, each once it has its answer.')
_SECONDS = flags.DEFINE_float('seconds', 60, 'For how long.')
_HOSTILE = flags.DEFINE_bool('hostile', True, 'Whether others send slow, huge, broken and malicious files meanwhile.')
_TOKEN = flags.DEFINE_string('token', None, 'That of the server.')
_OUTPUT = flags.DEFINE_string('output', None, 'JSON file to write; also printed.')

_PATH = '/api/predict'
_EXPECTED = {'slow': {408}, 'huge': {413}, 'huge_unannounced': {413}, 'broken': {422}, 'malicious': {422}}


def bomb():
    """Returns a small PNG of 13,000 by 13,000 pixels, whose first third unpacks from 64 kB."""
    packed = zlib.compress(bytes(2**26), 9)
    parts = [(b'IHDR', struct.pack('>IIBBBBB', 13_000, 13_000, 8, 0, 0, 0, 0)), (b'IDAT', packed), (b'IEND', b'')]
    chunks = [
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


async def behave(client, files, end, found):
    """Asks again and again, with one image a request."""
    while time.perf_counter() < end:
        data = next(files)
        start = time.perf_counter()
        try:
            response = await client.post(_PATH, files={'files': ('image', data)})
            problem = None if response.status_code == 200 else str(response.status_code)
            if problem is None and response.json()['answers'][0]['error']:
                problem = 'unanswered'
        except httpx.HTTPError as error:
            problem = type(error).__name__
        found.append((time.perf_counter() - start, problem))


async def misbehave(client, content, pause, end, found):
    """Sends the same bad file again and again, and counts how that ends."""
    while time.perf_counter() < end:
        try:
            status = (await client.post(_PATH, files={'files': ('../../etc/passwd', content)})).status_code
        except httpx.HTTPError as error:
            status = type(error).__name__
        found[status] += 1
        await asyncio.sleep(pause)


async def flood(head, chunk, pause, end, found):
    """Sends a request without end, again and again, until it is answered; counts the answers.

    Args:
      head: its last header, and how its body begins.
      chunk: bytes that are sent over and over.
      pause: seconds after each.
      end: until when.
      found: dictionary of counts.
    """
    address = urllib.parse.urlsplit(_URL.value)
    token = f'Authorization: Bearer {_TOKEN.value}\r\n' if _TOKEN.value else ''
    start = (
        f'POST {_PATH} HTTP/1.1\r\nHost: {address.hostname}\r\n{token}'
        f'Content-Type: multipart/form-data; boundary=b\r\n{head}\r\n'
    )
    while time.perf_counter() < end:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        answer = asyncio.create_task(reader.readline())
        try:
            writer.write(start.encode())
            while not answer.done():  # httpx would read no answer before all is sent
                writer.write(chunk)
                await writer.drain()
                await asyncio.sleep(pause)
        except ConnectionError:
            pass
        try:
            found[int((await answer).split()[1])] += 1
        except (ConnectionError, IndexError) as error:
            found[type(error).__name__] += 1
        writer.transport.abort()
        await asyncio.sleep(1)


def misbehaving(client, end, found):
    """Returns a coroutine for each bad client."""
    part = '--b\r\nContent-Disposition: form-data; name="files"; filename="f"\r\n\r\n'
    chunked = f'Transfer-Encoding: chunked\r\n\r\n{len(part):x}\r\n{part}'
    megabyte = b'100000\r\n' + bytes(2**20) + b'\r\n'
    return [
        flood(chunked, b'1\r\n-\r\n', 0.5, end, found['slow']),
        flood(f'Content-Length: {2**40}\r\n', bytes(2**16), 0, end, found['huge']),
        flood(chunked, megabyte, 0.01, end, found['huge_unannounced']),
        misbehave(client, b'\x89PNG\r\n\x1a\n' + bytes(1000), 0.5, end, found['broken']),
        misbehave(client, bomb(), 1, end, found['malicious']),
    ]


async def watch_memory(client, end, found):
    """Reads the server's resident memory every few seconds."""
    while time.perf_counter() < end:
        lines = (await client.get('/metrics')).text.splitlines()
        line = next(line for line in lines if line.startswith('process_resident_memory_bytes'))
        found.append(float(line.split()[1]) / 2**20)
        await asyncio.sleep(2)


async def load(files):
    """Runs all clients; returns what to report."""
    headers = {'authorization': f'Bearer {_TOKEN.value}'} if _TOKEN.value else {}
    limits = httpx.Limits(max_connections=None)
    answers, memory, bad = [], [], collections.defaultdict(collections.Counter)
    async with httpx.AsyncClient(base_url=_URL.value, headers=headers, limits=limits, timeout=60) as client:
        health = (await client.get('/healthz')).raise_for_status().json()
        await asyncio.gather(*(client.post(_PATH, files={'files': next(files)}) for _ in range(_CLIENTS.value)))
        start = time.perf_counter()
        end = start + _SECONDS.value
        others = [watch_memory(client, end, memory)]
        if _HOSTILE.value:
            others += misbehaving(client, end, bad)
        others = asyncio.gather(*others)
        await asyncio.gather(*(behave(client, files, end, answers) for _ in range(_CLIENTS.value)))
        seconds = time.perf_counter() - start
        await others  # slow ones that are on their way
    return describe(health, answers, memory, bad, seconds)


def describe(health, answers, memory, bad, seconds):
    """Returns the report as a dictionary."""
    times = np.array([duration for duration, problem in answers if problem is None])
    problems = collections.Counter(problem for _, problem in answers if problem)
    unexpected = {
        kind: {str(status): count for status, count in counts.items() if status not in _EXPECTED[kind]}
        for kind, counts in bad.items()
    }
    return {
        'server': urllib.parse.urlsplit(_URL.value).netloc,
        'model': health['model'],
        'clients': _CLIENTS.value,
        'seconds': round(seconds, 1),
        'answered': len(times),
        'requests_per_second': round(len(times) / seconds, 2),
        'milliseconds': {f'p{q}': round(1000 * float(np.percentile(times, q)), 1) for q in (50, 95, 99)}
        if len(times)
        else {},
        'errors': dict(problems),
        'resident_mib': {'first': memory[0], 'largest': max(memory), 'last': memory[-1]},
        'hostile': {kind: {str(status): count for status, count in counts.items()} for kind, counts in bad.items()},
        'hostile_unexpected': {kind: counts for kind, counts in unexpected.items() if counts},
    }


def main(argv):
    logging.set_verbosity(logging.WARNING)  # httpx tells of every request
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    paths = sorted(path for path in pathlib.Path(_IMAGES.value).rglob('*') if path.is_file())
    if not paths:
        sys.exit(f'error: there are no files in {_IMAGES.value}')
    step = max(1, len(paths) // 200)
    files = itertools.cycle([path.read_bytes() for path in paths[::step]])
    try:
        report = asyncio.run(load(files))
    except httpx.HTTPError as error:
        sys.exit(f'error: {_URL.value}: {error or type(error).__name__}')
    text = json.dumps(report, indent=2)
    print(text)
    if _OUTPUT.value:
        pathlib.Path(_OUTPUT.value).write_text(text + '\n')
    if report['errors'] or report['hostile_unexpected']:
        sys.exit(1)


if __name__ == '__main__':
    app.run(main)

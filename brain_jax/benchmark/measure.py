"""Measures the contenders side by side: each in a process of its own, one computing at a time, in turns.

What a table compares was measured within one run, round by round: the speed of a machine drifts.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile

import numpy as np
from absl import logging

from brain_jax import InputError, models
from brain_jax.benchmark import contenders

TASKS = ('inference', 'evaluation', 'export', 'train', 'remat', 'compile', 'memory', 'pipeline', 'search')
REMAT = ('dense_layers', 'full')  # what config.remat may be, beside 'none'
_VERSIONS = (
    'jax', 'jaxlib', 'flax', 'numpy', 'keras', 'tensorflow', 'tensorflow-cpu', 'torch', 'torchvision', 'onnx',
    'onnxruntime', 'openvino',
)  # fmt: skip
# What would change a contender if it were taken over from the shell.
_FOREIGN = ('XLA_FLAGS', 'TF_ENABLE_ONEDNN_OPTS', 'KERAS_BACKEND', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'ONEDNN_ISA')


class ContenderError(Exception):
    """A contender cannot be measured; the message says why."""


def count_cores():
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def count_devices(batch_size):
    """Returns how many devices brain_jax makes of the cores: as many as share a batch evenly."""
    return max(n for n in range(1, count_cores() + 1) if batch_size % n == 0)


def choose_variables(contender, num_devices):
    """Returns the environment variables of a contender: huge pages for all, and for our steps those of the README."""
    variables = {'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': '', 'TF_CPP_MIN_LOG_LEVEL': '2'}
    variables['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    if contender in ('brain_jax', 'flax'):
        flags = f'--xla_force_host_platform_device_count={num_devices} --xla_cpu_prefer_vector_width=512'
        variables['XLA_FLAGS'] = flags
    elif contender.startswith('keras_'):
        variables['KERAS_BACKEND'] = contender.removeprefix('keras_')
    return variables


class Worker:
    """The process of a contender, see `brain_jax/benchmark/worker.py`; ends with the `with` block.

    `variables` are set in its environment, or taken out where they are None.

    Attributes:
      ready: its first reply.
    """

    def __init__(self, task, contender, settings, **variables):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed in __exit__
        environment = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
        num_devices = count_devices(settings['config']['batch_size'])
        environment |= choose_variables(contender, num_devices) | variables
        environment = {name: value for name, value in environment.items() if value is not None}
        command = [sys.executable, '-m', 'brain_jax.benchmark.worker', task, contender, json.dumps(settings)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        try:
            self.ready = self._read()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *unused_error):
        try:
            self._process.communicate(timeout=20)  # without input it ends, and clears up after itself
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._log.close()

    def measure(self, seconds):
        """Returns the images a second over some seconds, of one step or more."""
        with contextlib.suppress(BrokenPipeError):  # it has ended; reading finds out why
            print(json.dumps({'seconds': seconds}), file=self._process.stdin, flush=True)
        return self._read()['images_per_second']

    def _read(self):
        """Returns the next reply; raises `ContenderError` where there is none, or it tells of an error."""
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            log = self._log.read().decode(errors='replace').strip().splitlines()
            last = f': {log[-1].strip()}' if log else ''
            status = self._process.wait()
            if status == -signal.SIGKILL:
                last = ': killed, as systems do for want of memory; measure fewer --contenders at once'
            raise ContenderError(f'the process ended with status {status}{last}')
        reply = json.loads(line)
        if 'error' in reply:
            raise ContenderError(' '.join(reply['error'].split())[:300])
        return reply


class Benchmark:
    """Settings and findings of one benchmark.

    Attributes:
      settings: dictionary that every contender gets.
      rounds: number of measurements of each speed.
      seconds: length of each.
      rows: list of dictionaries, what was found.
      left_out: list of dictionaries, what was not measured and why.
    """

    def __init__(self, config, names, rounds, seconds):
        network = getattr(models, config.model).keywords
        self.settings = {
            'config': config.to_dict(),
            'stage_sizes': network['stage_sizes'],
            'growth_rate': network.get('growth_rate', 32),
            'cores': count_cores(),
        }
        self.rounds, self.seconds = rounds, seconds
        self.rows, self.left_out = [], []
        self._names = [name for name in names if self._is_installed(name)]

    def _is_installed(self, name):
        missing = [package for package in contenders.PACKAGES[name] if importlib.util.find_spec(package) is None]
        if missing:
            self._leave_out('all', name, f'{" and ".join(missing)} not installed; see requirements-benchmark.txt')
        return not missing

    def _leave_out(self, task, name, reason):
        logging.warning('%s, %s: left out: %s', task, name, reason)
        self.left_out.append({'task': task, 'contender': name, 'reason': reason})

    def _choose(self, task, prefix=''):
        """Returns the contenders of a task that are wanted and installed."""
        return [name for name in self._names if name in contenders.STEPS[task] and name.startswith(prefix)]

    def _add_rows(self, task, unit, measured, reference='brain_jax'):
        """Adds the medians of {contender: list of values}, and the ratio of the reference's to each."""
        medians = {name: float(np.median(values)) for name, values in measured.items() if values}
        for name, value in medians.items():
            ratio = medians[reference] / value if reference in medians and value else None
            logging.info('%s, %s: %.4g %s', task, name, value, unit)
            self.rows.append(
                {
                    'task': task,
                    'contender': name,
                    'value': value,
                    'unit': unit,
                    'ratio': ratio,
                    'values': [float(value) for value in measured[name]],
                }
            )

    def _measure_in_turns(self, task, workers):
        """Returns {name: list of images a second} of workers; one that did not start, or fails, is left out."""
        measured = {name: [] for name, worker in workers.items() if worker}
        for turn in range(self.rounds + 1):
            # Every other round in reverse order: none always comes after the same neighbour.
            for name in list(measured)[:: -1 if turn % 2 else 1]:
                try:
                    speed = workers[name].measure(self.seconds if turn else 0)
                except ContenderError as error:
                    self._leave_out(task, name, str(error))
                    del measured[name]
                    continue
                if turn:  # the first is to warm up
                    measured[name].append(speed)
        return measured

    def _start(self, stack, task, contender, name=None, settings=None, **variables):
        """Returns a `Worker` that runs until the stack is left; None where the contender fails."""
        logging.info('%s, %s: getting ready', task, name or contender)
        try:
            return stack.enter_context(Worker(task, contender, settings or self.settings, **variables))
        except ContenderError as error:
            self._leave_out(task, name or contender, str(error))

    def _remat_variants(self):
        """Returns {name: settings} of brain_jax, and of when it computes more again instead of keeping it."""
        if 'brain_jax' not in self._names:
            return {}
        return {'brain_jax': self.settings} | {
            f'brain_jax_{remat}': self.settings | {'config': self.settings['config'] | {'remat': remat}}
            for remat in REMAT
        }

    def measure_speed(self, task):
        """Measures 'inference', 'evaluation', 'export' or 'train': images a second of all contenders."""
        # A run scores an image and its mirror image; what the others are compared with is one pass an image.
        config = self.settings['config'] | {'average_flips': task == 'evaluation'}
        settings = self.settings | {'config': config}
        with contextlib.ExitStack() as stack:
            workers = {name: self._start(stack, task, name, settings=settings) for name in self._choose(task)}
            measured = self._measure_in_turns(task, workers)
        self._add_rows(task, 'img/s', measured)

    def measure_remat(self):
        """Measures the training step of brain_jax under each `config.remat`: images a second."""
        with contextlib.ExitStack() as stack:
            workers = {
                name: self._start(stack, 'train', 'brain_jax', name, settings)
                for name, settings in self._remat_variants().items()
            }
            measured = self._measure_in_turns('remat', workers)
        self._add_rows('remat', 'img/s', measured)

    def measure_compile(self):
        """Measures the seconds of the first training step, without and with what an earlier process compiled."""
        measured = {}
        with tempfile.TemporaryDirectory() as cache:
            for contender in ('brain_jax', 'brain_jax_warm', *self._choose('train', ('flax', 'keras_'))):
                is_ours = contender.startswith('brain_jax')
                with contextlib.ExitStack() as stack:
                    worker = self._start(
                        stack,
                        'train',
                        'brain_jax' if is_ours else contender,
                        contender,
                        JAX_COMPILATION_CACHE_DIR=cache if is_ours else None,
                    )
                    if worker:
                        measured[contender] = [worker.ready['first_step_seconds']]
        self._add_rows('compile', 's', measured)

    def measure_memory(self):
        """Measures the bytes that a training step needs beside parameters and batch, an image."""
        variants = self._remat_variants() | dict.fromkeys(self._choose('train', ('flax', 'torch')), self.settings)
        temporary, resident = {}, {}
        for name, settings in variants.items():
            contender = 'brain_jax' if name.startswith('brain_jax') else name
            with contextlib.ExitStack() as stack:
                worker = self._start(stack, 'memory', contender, name, settings)
                if worker:
                    megabytes = {unit: [size / 1e6 / self._batch_size] for unit, size in worker.ready.items()}
                    resident[name] = megabytes['resident_bytes']
                    temporary[name] = megabytes.get('temporary_bytes', [])
        self._add_rows('memory', 'MB of temporaries an image', temporary)
        self._add_rows('memory', 'MB of resident memory an image', resident)

    @property
    def _batch_size(self):
        return self.settings['config']['batch_size']

    def measure_pipeline(self):
        """Measures the training batches alone, and how long the data take to prepare and to load again."""
        with contextlib.ExitStack() as stack:
            worker = self._start(stack, 'pipeline', 'brain_jax')
            if not worker:
                return
            measured = self._measure_in_turns('pipeline', {'brain_jax': worker})
        for row in self.rows:
            if (row['task'], row['contender']) == ('train', 'brain_jax'):
                measured['brain_jax_train'] = [row['value']]
        self._add_rows('pipeline', 'img/s', measured)
        for which in ('first', 'second'):
            name = f'{which} start, {worker.ready["images"]} images'
            self._add_rows('pipeline', 's', {name: [worker.ready[f'{which}_seconds']]})

    def measure_search(self):
        """Measures which share of the copies that the exact search finds the approximate one finds, too."""
        if importlib.util.find_spec('faiss') is None:
            self._leave_out('search', 'faiss', 'faiss not installed; see requirements-benchmark.txt')
            return
        with contextlib.ExitStack() as stack:
            if worker := self._start(stack, 'search', 'brain_jax'):
                for name, share in worker.ready.items():
                    if share is None:
                        self._leave_out('search', 'faiss', f'there are no {name} to find')
                    else:
                        self._add_rows('search', f'% of {name} found', {'faiss': [100 * share]}, reference=None)

    def measure_devices(self, counts):
        """Measures the training step on virtual devices, and what they exchange."""
        names = {count: f'brain_jax_{count}_device{"s" if count > 1 else ""}' for count in counts}
        with contextlib.ExitStack() as stack:
            workers = {}
            for count, name in names.items():
                variables = choose_variables('brain_jax', count)
                if worker := self._start(stack, 'devices', 'brain_jax', name, **variables):
                    workers[name] = worker
            measured = self._measure_in_turns('devices', workers)
        self._add_rows('devices', 'img/s', measured, reference=names[counts[0]])
        for name, worker in workers.items():
            for kind, found in sorted(worker.ready['collectives'].items()):
                self._add_rows('devices', f'{kind} a step', {name: [found['count']]}, reference=None)
                self._add_rows('devices', f'MB of {kind} a step', {name: [found['bytes'] / 1e6]}, reference=None)


def describe_machine():
    """Returns processor, cores, memory in GB, system and Python of this machine."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
        processor = next((line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')), processor)
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9
    return {
        'processor': processor,
        'cores': count_cores(),
        'memory_gb': round(memory, 1),
        'system': platform.platform(),
        'python': platform.python_version(),
    }


def list_versions():
    """Returns the versions of the packages that are measured and are installed."""
    versions = {}
    for package in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def measure(config, *, tasks=TASKS, names=tuple(contenders.PACKAGES), devices=(), rounds=5, seconds=3.0):
    """Measures the contenders.

    Args:
      config: a training run's configuration; what it says of pretrained weights and average_flips is not heeded.
      tasks: some of `TASKS`.
      names: some of `contenders.PACKAGES`, which are left out where they are not installed.
      devices: numbers of virtual devices on which to measure the training step of brain_jax as well.
      rounds: how often each speed is measured.
      seconds: how long, each time.

    Returns:
      A dictionary: machine, versions, settings, variables of each contender, rows (of task, contender, value: the
      median, unit, ratio: brain_jax's value, for devices the first's, over this one, and values of all rounds) and
      left_out (of task, contender and reason).

    Raises:
      InputError: where the configuration cannot be measured.
    """
    if config.mode == 'frozen':
        raise InputError('in mode frozen no network is trained: give --config=configs/densenet121.py, or :scratch')
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.pretrained = ''
        config.eval_batch_size = config.batch_size
    benchmark = Benchmark(config, names, rounds, seconds)
    for task in TASKS:
        if task not in tasks:
            continue
        if task in contenders.STEPS:
            benchmark.measure_speed(task)
        else:
            getattr(benchmark, f'measure_{task}')()
    if devices:
        benchmark.measure_devices(devices)
    return {
        'machine': describe_machine(),
        'versions': list_versions(),
        'settings': benchmark.settings | {'rounds': rounds, 'seconds': seconds},
        'variables': {name: choose_variables(name, count_devices(config.batch_size)) for name in contenders.PACKAGES},
        'rows': benchmark.rows,
        'left_out': benchmark.left_out,
    }

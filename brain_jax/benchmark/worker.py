"""The process of one contender: it gets ready, tells so, and then measures whenever it is asked to.

    python -m brain_jax.benchmark.worker TASK CONTENDER SETTINGS

SETTINGS, every line it reads and every line it writes are JSON. A line {"seconds": 3} asks for the speed over three
seconds. It ends when its input does.
"""

import json
import math
import os
import pathlib
import sys
import tempfile
import time

import ml_collections

from brain_jax.benchmark import contenders

PHANTOM_IMAGES = 400  # for training; a tenth more for testing


def images_per_second(step, batch_size, seconds):
    """Calls `step` until the time is over, at least once, and returns the images it handles a second."""
    steps, start = 0, time.perf_counter()
    while True:
        step()
        steps += 1
        passed = time.perf_counter() - start
        if passed >= seconds:
            return batch_size * steps / passed


def timed(function, *args):
    """Returns the result of a function and the seconds it took."""
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def answer(step, settings, requests):
    """Yields the speed of a step for every line of `requests`."""
    for line in requests:
        step()  # while the others had their turn, its memory was given back and its caches were used
        seconds = json.loads(line)['seconds']
        yield {'images_per_second': images_per_second(step, settings.config.batch_size, seconds)}


def run_steps(make_step, settings, requests):
    """Yields the seconds of the first step, which compiles it, and then speeds."""
    step = make_step(settings)
    yield {'first_step_seconds': timed(step)[1]}
    yield from answer(step, settings, requests)


def run_on_devices(settings, requests):
    """Yields what the devices exchange in a compiled training step of brain_jax, and then speeds."""
    from brain_jax import compiled

    train_step, state, batch = contenders.prepare_training(settings.config)
    program = train_step.lower(state, batch).compile()
    step = contenders.repeat_training(program, state, batch)
    step()
    yield {'collectives': compiled.count_collectives(program.as_text())}
    yield from answer(step, settings, requests)


def read_memory(field, process='self'):
    """Returns a size in bytes that Linux keeps for a process, this one or a number: 'VmRSS', or its peak 'VmHWM'."""
    for line in pathlib.Path(f'/proc/{process}/status').read_text().splitlines():
        if line.startswith(f'{field}:'):
            return 1024 * int(line.split()[1])
    raise OSError(f'/proc/{process}/status does not tell {field}')


def resident_growth(step):
    """Returns by how many bytes the resident memory grows at most while `step` runs."""
    pathlib.Path('/proc/self/clear_refs').write_text('5')  # sets the peak back to what there is now
    before = read_memory('VmRSS')
    step()
    return read_memory('VmHWM') - before


def measure_memory(contender, settings):
    """Yields the bytes that the first training step needs beside parameters and batch."""
    if contender not in ('brain_jax', 'flax'):
        yield {'resident_bytes': resident_growth(contenders.STEPS['train'][contender](settings))}
        return
    train_step, state, batch = contenders.prepare_training(settings.config, contender)
    program = train_step.lower(state, batch).compile()
    num_devices = len(batch['image'].devices())
    step = contenders.repeat_training(program, state, batch)
    yield {
        'temporary_bytes': num_devices * program.memory_analysis().temp_size_in_bytes,  # it tells those of one device
        'resident_bytes': resident_growth(step),
    }


def choose_data(config, folder):
    """Sets `data_dir` to generated images where there is none, and `prepared_dir`; both are made in a folder."""
    from brain_jax.data import phantom

    if not config.data_dir:
        config.data_dir = os.path.join(folder, 'phantom')
        phantom.make_phantom(
            config.data_dir,
            train_per_class=PHANTOM_IMAGES // contenders.NUM_CLASSES,
            test_per_class=PHANTOM_IMAGES // contenders.NUM_CLASSES // 10,
            image_size=config.image_size,
        )
    config.prepared_dir = os.path.join(folder, 'prepared')


def run_search(settings):
    """Yields the shares of near pairs, and of images that have one, that the approximate search finds."""
    from brain_jax.data import leakage, pipeline

    with tempfile.TemporaryDirectory() as folder:
        choose_data(settings.config, folder)
        thumbnails = leakage.thumbnails(pipeline.load_images(settings.config).examples.images)
    shares = leakage.measure_recall(thumbnails)
    names = ('near pairs', 'images with a copy')
    yield {name: None if math.isnan(share) else share for name, share in zip(names, shares, strict=True)}


def run_pipeline(settings, requests):
    """Yields how long the data take to prepare and to load again, and then the speed of the training batches."""
    from brain_jax.data import pipeline

    config = settings.config
    with tempfile.TemporaryDirectory() as folder:
        choose_data(config, folder)
        _, first = timed(pipeline.load_images, config)
        images, second = timed(pipeline.load_images, config)
        batches = pipeline.train_batches(
            pipeline.split_images(images, config).train,
            batch_size=config.batch_size,
            seed=config.seed,
            num_steps=10**9,
        )
        next(batches)
        yield {'first_seconds': first, 'second_seconds': second, 'images': len(images.examples)}
        yield from answer(lambda: next(batches), settings, requests)


def run(task, contender, settings, requests):
    """Returns an iterator over the replies of a contender.

    Args:
      task: 'inference', 'evaluation', 'export', 'train', 'devices', 'memory', 'pipeline' or 'search'.
      contender: a name of `contenders.STEPS`.
      settings: `ConfigDict` of config, stage_sizes, growth_rate and cores.
      requests: lines of JSON.

    Returns:
      An iterator over dictionaries.
    """
    if task == 'search':
        return run_search(settings)
    if task == 'pipeline':
        return run_pipeline(settings, requests)
    if task == 'devices':
        return run_on_devices(settings, requests)
    if task == 'memory':
        return measure_memory(contender, settings)
    return run_steps(contenders.STEPS[task][contender], settings, requests)


def main():
    """Answers on what was the standard output; whatever libraries print goes to the standard error."""
    task, contender, settings = sys.argv[1:]
    replies = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    try:
        for reply in run(task, contender, ml_collections.ConfigDict(json.loads(settings)), sys.stdin):
            print(json.dumps(reply), file=replies, flush=True)
    except Exception as error:  # whatever it is, the other contenders go on
        print(json.dumps({'error': f'{type(error).__name__}: {error}'}), file=replies, flush=True)
        raise


if __name__ == '__main__':
    main()

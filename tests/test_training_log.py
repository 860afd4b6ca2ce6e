"""Tests of brain_jax.training_log."""

import io

import jax
import ml_collections
import numpy as np
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from brain_jax import training_log


def test_hyperparameters_are_flat_and_plain():
    config = ml_collections.ConfigDict({'seed': 3, 'augment': {'zoom': 0.5}, 'decay': (1, 2), 'test': None, 'ok': True})
    expected = {'seed': 3, 'augment.zoom': 0.5, 'decay': '(1, 2)', 'test': 'None', 'ok': True}
    assert training_log.hyperparameters(config) == expected


def test_event_files_hold_images_and_scores(tmp_path):
    still = dict.fromkeys(('rotation', 'zoom', 'shift', 'brightness', 'contrast'), 0.0)
    settings = ml_collections.ConfigDict(still | {'flip_horizontal': False, 'flip_vertical': False})
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    batch = jax.device_put({'image': images, 'index': np.arange(20, dtype=np.int32)})
    scores = {'accuracy': 0.75, 'macro_f1': 0.7, 'loss': 0.5, 'n': 4}
    with training_log.open_writer(tmp_path) as writer:
        training_log.write_augmented(writer, 0, jax.random.key(0), batch, settings)
        training_log.write_scores(writer, 6, 'test', scores, np.array([[2, 1], [0, 1]]), ('glioma', 'notumor'))

    events = event_accumulator.EventAccumulator(str(tmp_path), {event_accumulator.TENSORS: 0})
    events.Reload()
    (shown,) = events.Tensors('augmented')
    pngs = tensor_util.make_ndarray(shown.tensor_proto)[2:]  # after width and height
    assert shown.step == 0 and len(pngs) == 16
    for png, image in zip(pngs, images, strict=False):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), image)  # nothing was drawn to change
    for name, value in scores.items():
        (found,) = events.Tensors(f'test_{name}')
        assert found.step == 6 and tensor_util.make_ndarray(found.tensor_proto) == np.float32(value)
    assert len(tensor_util.make_ndarray(events.Tensors('test_confusion')[0].tensor_proto)) == 2 + 1

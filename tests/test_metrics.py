"""Tests of brain_jax.metrics: against scikit-learn, on the examples that are not masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from brain_jax import metrics

NUM_CLASSES = 5
BATCH_SIZE = 8


def make_batches(num_images, classes, seed):
    """Logits that are right more often than not, in batches whose last rows, masked, are nonsense."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, num_images).astype(np.int32)
    logits = rng.normal(0, 1, (num_images, NUM_CLASSES)).astype(np.float32)
    logits[:, [i for i in range(NUM_CLASSES) if i not in classes]] -= 100
    logits[np.arange(num_images), labels] += 1
    batches = []
    for start in range(0, num_images, BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        missing = BATCH_SIZE - len(labels[part])
        batches.append(
            {
                'labels': np.pad(labels[part], (0, missing)),
                'logits': np.pad(logits[part], ((0, missing), (0, 0)), constant_values=1000),
                'mask': np.arange(BATCH_SIZE) < BATCH_SIZE - missing,
            }
        )
    return labels, logits, batches


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def evaluate(batches):
    """Merges the batches as brain_jax.train does: one compiled update each."""

    @jax.jit
    def update(batch):
        losses = -jnp.take_along_axis(jax.nn.log_softmax(batch['logits']), batch['labels'][:, None], axis=1)[:, 0]
        return metrics.EvalMetrics.single_from_model_output(loss=losses, **batch)

    total = None
    for batch in batches:
        total = update(batch) if total is None else total.merge(update(batch))
    return metrics.summarize(total)


@pytest.mark.parametrize(
    ('num_images', 'classes'),
    [
        (27, range(NUM_CLASSES)),  # the last batch has 3 images
        (32, range(NUM_CLASSES)),
        (27, [0, 2, 3, 4]),  # class 1 is neither there nor predicted
        (5, [3]),
    ],
)
def test_scores_are_those_of_scikit_learn(num_images, classes):
    labels, logits, batches = make_batches(num_images, classes, seed=num_images)
    scores, confusion = evaluate(batches)
    predictions = logits.argmax(axis=-1)
    np.testing.assert_array_equal(
        confusion, sklearn.metrics.confusion_matrix(labels, predictions, labels=range(NUM_CLASSES))
    )
    expected = {
        'accuracy': sklearn.metrics.accuracy_score(labels, predictions),
        'macro_f1': sklearn.metrics.f1_score(labels, predictions, average='macro', labels=np.unique(labels)),
        'loss': sklearn.metrics.log_loss(labels, np.exp(log_softmax(logits)), labels=range(NUM_CLASSES)),
        'n': num_images,
    }
    assert scores == pytest.approx(expected, rel=1e-5)
    assert all(type(value) in (int, float) for value in scores.values())  # they are written as JSON


def test_macro_f1_by_hand():
    # Class 0: 3 right of 4 there and 5 predicted, class 1: 2 of 4 and 3, class 2: nowhere, class 3: predicted only.
    confusion = [[3, 1, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert metrics.macro_f1(confusion) == pytest.approx((6 / 9 + 4 / 7) / 2)
    confusion[0][3] = 1
    assert metrics.macro_f1(confusion) == pytest.approx((6 / 10 + 4 / 7) / 2)


def test_training_metrics():
    """Means over the images, and of the gradient norm over the steps."""
    total = None
    for losses, correct, norm in (([1.0, 2.0], [1.0, 0.0], 3.0), ([4.0, 5.0], [1.0, 1.0], 5.0)):
        step = metrics.TrainMetrics.single_from_model_output(
            loss=jnp.array(losses), correct=jnp.array(correct), gradient_norm=jnp.array(norm)
        )
        total = step if total is None else total.merge(step)
    assert total.compute() == {'loss': 3, 'accuracy': 0.75, 'gradient_norm': 4}


def test_drawn_confusion():
    image = metrics.draw_confusion([[900, 0], [3, 4]], ['glioma', 'no tumour'])
    assert image.dtype == np.uint8
    batch, height, width, channels = image.shape
    assert (batch, channels) == (1, 3)
    assert min(height, width) >= 200
    assert (image[0, 0, 0] == 255).all()
    # The fullest cell is the darkest; the middle of the picture lies within the matrix.
    top_left, bottom_right = image[0, height // 3, width // 2 - 60], image[0, height // 2 + 40, width - 60]
    assert top_left.sum() < bottom_right.sum()

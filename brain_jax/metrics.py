"""CLU metric collections of training and evaluation.

No `from __future__ import annotations` here: clu 0.0.12 reads the annotations as classes.
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay


@flax.struct.dataclass
class ConfusionMatrix(metrics.Metric):
    """Counts of (true class, predicted class): float32 [classes, classes]."""

    count: jax.Array

    @classmethod
    def from_model_output(cls, *, logits, labels, mask, **_):
        num_classes = logits.shape[-1]
        truth = jax.nn.one_hot(labels, num_classes) * mask[:, None]
        return cls(count=truth.T @ jax.nn.one_hot(jnp.argmax(logits, axis=-1), num_classes))

    def merge(self, other):
        return type(self)(count=self.count + other.count)

    def compute(self):
        return self.count


@flax.struct.dataclass
class TrainMetrics(metrics.Collection):
    """Metrics over the training steps since the last report."""

    loss: metrics.Average.from_output('loss')
    accuracy: metrics.Average.from_output('correct')
    gradient_norm: metrics.Average.from_output('gradient_norm')


@flax.struct.dataclass
class EvalMetrics(metrics.Collection):
    """Metrics over a whole split, masked rows left out."""

    loss: metrics.Average.from_output('loss')
    confusion: ConfusionMatrix


def macro_f1(confusion):
    """Computes the mean F1 score of the classes.

    Args:
      confusion: [classes, classes] counts of (true, predicted).

    Returns:
      Mean over the classes that there are images of: for others there is no such score.
    """
    confusion = np.asarray(confusion)
    present = confusion.sum(axis=1) > 0
    occurrences = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float(np.mean(2 * np.diag(confusion)[present] / occurrences[present]))


def summarize(collection):
    """Returns accuracy, macro F1, loss and number of images of an `EvalMetrics`, and its confusion matrix."""
    values = collection.compute()
    confusion = np.asarray(values['confusion']).astype(np.int64)
    count = int(confusion.sum())
    scores = {
        'accuracy': float(np.trace(confusion) / count),
        'macro_f1': macro_f1(confusion),
        'loss': float(values['loss']),
        'n': count,
    }
    return scores, confusion


def draw_confusion(confusion, class_names):
    """Draws a confusion matrix: uint8 [1, height, width, 3], for an image summary."""
    figure = Figure(figsize=(5, 5), layout='constrained')
    canvas = FigureCanvasAgg(figure)
    display = ConfusionMatrixDisplay(np.asarray(confusion, int), display_labels=class_names)
    display.plot(ax=figure.subplots(), cmap='Blues', colorbar=False, xticks_rotation=45)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[None, :, :, :3]

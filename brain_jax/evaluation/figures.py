"""Figures of an evaluation, legible on a narrow screen, in colours that the colour-blind can tell apart.

Every drawing function returns uint8 [height, width, 3].
"""

import base64
import io
import textwrap
import warnings

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image, PngImagePlugin

# Okabe and Ito (2008).
BLUE, VERMILION, GREEN, ORANGE, GREY = '#0072B2', '#D55E00', '#009E73', '#E69F00', '#6b6b6b'
PART_STYLES = ((BLUE, '-'), (ORANGE, '-.'), (GREEN, ':'), (VERMILION, '--'))
_STYLE = {
    'axes.spines.right': False,
    'axes.spines.top': False,
    'axes.titlesize': 10,
    'font.size': 9,
    'legend.frameon': False,
    'text.parse_math': False,  # names of files and classes may hold dollar signs
}


def _draw(paint, size, provenance, **subplots):
    """Calls `paint` with the axes of a new figure and returns its pixels; `provenance` stands at the foot."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing')  # of a script that the font lacks: boxes are drawn
        figure = Figure(size, dpi=160, layout='constrained')
        canvas = FigureCanvasAgg(figure)
        paint(figure.subplots(**subplots))
        figure.supxlabel(provenance, fontsize=5.5, color=GREY)
        canvas.draw()
        return np.array(canvas.buffer_rgba())[:, :, :3]


def _shorten(name):
    return name if len(name) <= 16 else f'{name[:15]}…'


def draw_confusion(confusion, class_names, title, provenance):
    """Draws a confusion matrix, coloured by the share of the true class.

    Args:
      confusion: int [classes, classes], rows are true classes.
      class_names: str [classes].
      title: of the figure.
      provenance: what it was computed from, for its foot.
    """
    confusion = np.asarray(confusion)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    names = [_shorten(name) for name in class_names]

    def paint(axes):
        axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(confusion):
            color = 'white' if shares[row, column] > 0.5 else 'black'
            axes.text(column, row, f'{count:,}', ha='center', va='center', color=color)
        axes.set_xticks(range(len(names)), names, rotation=45, ha='right', rotation_mode='anchor')
        axes.set_yticks(range(len(names)), names)
        axes.set(title=title, xlabel='Predicted', ylabel='True')
        axes.spines[:].set_visible(False)

    side = max(4.0, 1.6 + 0.5 * len(names))
    return _draw(paint, (side, side), provenance)


def draw_reliability(curves, title, provenance):
    """Draws accuracy against confidence, and below how many images are how sure.

    Args:
      curves: {name: (count, confidence, accuracy)}, as of `scores.reliability`, for one or two probabilities.
      title: of the figure.
      provenance: for its foot.
    """

    def paint(panels):
        upper, lower = panels
        upper.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, label='perfect')
        for (name, (count, confidence, accuracy)), color, marker in zip(
            curves.items(), (VERMILION, BLUE), 'so', strict=False
        ):
            upper.plot(confidence, accuracy, color=color, marker=marker, markersize=4, linewidth=1.3, label=name)
            lower.plot(confidence, count / count.sum(), color=color, marker=marker, markersize=4, linewidth=1.3)
        upper.set(title=title, ylabel='Accuracy', xlim=(0, 1.02), ylim=(0, 1.03))
        lower.set(xlabel='Confidence', ylabel='Images', xlim=(0, 1.02), yscale='log')
        for axis in (upper.xaxis, upper.yaxis, lower.xaxis, lower.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
        upper.tick_params(labelbottom=False)
        upper.legend(loc='upper left')

    return _draw(paint, (4.2, 4.6), provenance, nrows=2, height_ratios=(3, 1))


def draw_risk_coverage(curves, thresholds, title, provenance):
    """Draws the error among the images that are answered against their share.

    Args:
      curves: {part: (coverage, risk)}, float [n] each.
      thresholds: list of up to five (name, coverage, risk) to mark.
      title: of the figure.
      provenance: for its foot.
    """

    def paint(axes):
        for (name, (coverage, risk)), (color, line) in zip(curves.items(), PART_STYLES, strict=False):
            axes.plot(coverage, risk, line, color=color, linewidth=1.5, label=name)
        for (name, coverage, risk), marker in zip(thresholds, 'os^Dv', strict=False):
            axes.plot(coverage, risk, marker, color='black', markersize=5, label=name)
        axes.set(title=title, xlabel='Coverage: images answered', ylabel='Risk: errors among them', xlim=(0, 1.01))
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.2))

    return _draw(paint, (4.2, 3.6 + 0.2 * (len(curves) + len(thresholds))), provenance)


def draw_classes(per_class, title, provenance):
    """Draws precision, recall and F1 of every class with their intervals by group; what is not defined is left out.

    Args:
      per_class: of `scores.score_predictions`.
      title: of the figure.
      provenance: for its foot.
    """

    def paint(axes):
        places = np.arange(len(per_class))
        columns = (('precision', BLUE, 'o'), ('recall', VERMILION, 's'), ('f1', GREEN, '^'))
        for shift, (name, color, marker) in zip((-0.22, 0, 0.22), columns, strict=True):
            label = {'f1': 'F1'}.get(name, name)
            axes.plot([], [], color=color, marker=marker, linewidth=1.5, label=label)
            for place, row in zip(places + shift, per_class.values(), strict=True):
                if row[name] is not None:
                    axes.plot(row[name], place, color=color, marker=marker, markersize=5)
                    axes.plot(row[f'{name}_interval'] or [row[name]] * 2, [place] * 2, color=color, linewidth=1.5)
        names = [f'{_shorten(name)}\n{row["n"]:,}' for name, row in per_class.items()]
        axes.set_yticks(places, names)
        axes.set(title=title, ylim=(len(places) - 0.5, -0.5))
        axes.set_xlim(right=1.01)
        axes.grid(axis='x', color='#dddddd', linewidth=0.6)
        axes.legend(ncols=3, loc='upper center', bbox_to_anchor=(0.5, -0.08))

    return _draw(paint, (4.2, 1.6 + 0.62 * len(per_class)), provenance)


def draw_errors(errors, title, provenance):
    """Draws up to twelve wrong images with their names and what was said of them.

    Args:
      errors: list of dictionaries with image (uint8 [size, size]), path, label, predicted and probability.
      title: of the figure.
      provenance: for its foot.
    """
    shown = errors[:12]

    def paint(panels):
        for axes in panels.flat:
            axes.axis('off')
        for axes, error in zip(panels.flat, shown, strict=False):
            axes.imshow(error['image'], cmap='gray', vmin=0, vmax=255)
            text = f'{error["predicted"]} {100 * error["probability"]:.1f} %\nis {error["label"]}'
            axes.set_title(text, fontsize=8)
            path = '\n'.join(textwrap.wrap(error['path'], 30)[:3])
            axes.text(0.5, -0.03, path, transform=axes.transAxes, ha='center', va='top', fontsize=6)
        panels.flat[0].figure.suptitle(title, fontsize=10)

    rows = max(1, -(-len(shown) // 3))
    return _draw(paint, (6.0, 0.8 + 2.55 * rows), provenance, nrows=rows, ncols=3, squeeze=False)


def draw_overlay(image, colours, title, shades, limits, label):
    """Draws an image, the same under a coloured map, and the colour bar.

    Args:
      image: uint8 [size, size].
      colours: uint8 [size, size, 4] of the map, with its opacity.
      title: of the figure.
      shades: the map's colours with their opacity, a matplotlib colour map.
      limits: (low, high), the values at its ends.
      label: what the numbers of the bar are.
    """

    def paint(panels):
        plain, covered, bar = panels
        for axes in (plain, covered):
            axes.imshow(image, cmap='gray', vmin=0, vmax=255)
            axes.axis('off')
        covered.imshow(colours)
        bar.set_facecolor('gray')  # the bar shows the colours as they lie on a grey of middle brightness
        values = np.linspace(0, 1, 256)[:, None]
        bar.imshow(shades(values), origin='lower', extent=(0, 1, *limits), aspect='auto')
        bar.set(xticks=[], ylabel=label, box_aspect=14)
        bar.yaxis.tick_right()
        bar.yaxis.set_label_position('right')
        bar.spines[:].set_visible(False)
        bar.figure.suptitle('\n'.join(textwrap.wrap(title, 60)), fontsize=10)

    return _draw(paint, (6.0, 3.2), 'Not a medical device.', ncols=3, width_ratios=(1, 1, 1 / 14))


def draw_explanations(rows, title, provenance):
    """Draws images with the outline of what is to be found, and beside each its maps with their highest points.

    Args:
      rows: list of dictionaries with image (uint8 [size, size]), mask (bool [size, size]), text, and maps: {name:
        (uint8 [size, size, 4], (row, column))}, the same names in every one.
      title: of the figure.
      provenance: for its foot.
    """

    def paint(panels):
        for (first, *others), row in zip(panels, rows, strict=True):
            for axes in (first, *others):
                axes.imshow(row['image'], cmap='gray', vmin=0, vmax=255)
                axes.contour(row['mask'], (0.5,), colors='#56B4E9', linewidths=0.8)
                axes.axis('off')
            first.set_title(row['text'], fontsize=8)
            for axes, (name, (colours, point)) in zip(others, row['maps'].items(), strict=True):
                axes.imshow(colours)
                axes.plot(point[1], point[0], '+', color='white', markersize=7)
                axes.set_title('\n'.join(textwrap.wrap(name, 22)), fontsize=8)
        panels.flat[0].figure.suptitle(title, fontsize=10)

    columns = 1 + len(rows[0]['maps'])
    size = (1.7 * columns, 0.6 + 2.05 * len(rows))
    return _draw(paint, size, provenance, nrows=len(rows), ncols=columns, squeeze=False)


def to_png(pixels, provenance=''):
    """Returns pixels, uint8 [height, width] or [height, width, 3], as a PNG file's bytes with a note of provenance."""
    notes = PngImagePlugin.PngInfo()
    if provenance:
        notes.add_itxt('Description', provenance)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'PNG', pnginfo=notes, optimize=True)
    return buffer.getvalue()


def to_data_uri(png):
    """Returns the bytes of a PNG file as an address that a page embeds."""
    return 'data:image/png;base64,' + base64.b64encode(png).decode()

"""What a benchmark found, as JSON, as a table and as a picture."""

import io
import json
import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from brain_jax import InputError, files
from brain_jax.evaluation import figures


def format_number(value):
    """Returns a positive number with three digits that count, or all before the point."""
    if value == int(value) or value >= 100:
        return f'{value:,.0f}'
    return f'{value:.{2 if value >= 1 else 3}f}' if value < 10 else f'{value:.1f}'


def describe(report):
    """Returns lines that tell where and how a benchmark was measured."""
    machine, settings = report['machine'], report['settings']
    config = settings['config']
    versions = ', '.join(f'{name} {version}' for name, version in report['versions'].items())
    ours = report['variables']['brain_jax']
    return [
        f'{machine["processor"]}, {machine["cores"]} cores, {machine["memory_gb"]:.0f} GB; {machine["system"]}; '
        f'Python {machine["python"]}.',
        f'{versions}.',
        f'{config["model"]} with random weights, batches of {config["batch_size"]} images of {config["image_size"]} '
        f'pixels, brain_jax in {config["dtype"]}; medians of {settings["rounds"]} rounds in turns, '
        f'{settings["seconds"]:g} seconds each, on the CPU.',
        'A training step of brain_jax augments and clips as well, and its inference starts from grey bytes; evaluation '
        'is that of a run, of each image and its mirror image.',
        f'Set for all: GLIBC_TUNABLES={ours["GLIBC_TUNABLES"]}; for brain_jax: XLA_FLAGS="{ours["XLA_FLAGS"]}".',
    ]


def format_markdown(report):
    """Returns the tables of a benchmark in Markdown; `report` is of `measure.measure`."""
    lines = ['# Benchmark', '']
    for line in describe(report):
        lines += [line, '']
    lines += [
        'The ratio is brain_jax over the contender (under devices: the first number of devices over this one).',
        '',
        '| task | contender | value | ratio |',
        '|---|---|---|---|',
    ]
    for row in report['rows']:
        ratio = '' if row['ratio'] is None else f'{row["ratio"]:.2f}'
        lines.append(f'| {row["task"]} | {row["contender"]} | {format_number(row["value"])} {row["unit"]} | {ratio} |')
    if report['left_out']:
        lines += ['', 'Left out:', '']
        lines += [f'- {left["contender"]} ({left["task"]}): {left["reason"]}' for left in report['left_out']]
    return '\n'.join(lines) + '\n'


def draw(report):
    """Draws bars, a panel for everything that was measured of two contenders or more; returns a PNG file's bytes."""
    groups = {}
    for row in report['rows']:
        if row['ratio'] is not None:
            groups.setdefault(f'{row["task"]}, {row["unit"]}', []).append(row)
    groups = {title: rows for title, rows in groups.items() if len(rows) > 1}
    heights = [0.9 + 0.3 * len(rows) for rows in groups.values()] or [0.9]
    figure = Figure((6.0, sum(heights)), dpi=160, layout='constrained')
    panels = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    if not groups:
        panels[0].axis('off')
    for axes, (title, rows) in zip(panels, groups.items(), strict=False):
        names = [row['contender'] for row in rows]
        colors = [figures.VERMILION if name.startswith('brain_jax') else figures.BLUE for name in names]
        bars = axes.barh(names, [row['value'] for row in rows], color=colors)
        axes.bar_label(bars, [format_number(row['value']) for row in rows], padding=3, fontsize=8)
        axes.set_title(title, fontsize=10, loc='left')
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.spines[['right', 'top']].set_visible(False)
        axes.tick_params(labelsize=8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def make_folder(output):
    """Makes the folder to write to: better that it fails before the measurements than after.

    Raises:
      InputError: where it cannot be made.
    """
    try:
        pathlib.Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'{output} cannot be written to: {error.strerror}') from error


def write(report, output):
    """Writes benchmark.json, benchmark.md and benchmark.png into a folder.

    Raises:
      InputError: where the folder cannot be written to.
    """
    contents = {
        'benchmark.json': json.dumps(report, indent=2) + '\n',
        'benchmark.md': format_markdown(report),
        'benchmark.png': draw(report),
    }
    for name, content in contents.items():
        files.write_whole(pathlib.Path(output, name), content)

"""What an evaluation leaves behind: tables, figures, one self-contained page, a model card, TensorBoard summaries."""

import csv
import io
import json

import jinja2
import numpy as np
from absl import logging
from clu import metric_writers

from brain_jax import files
from brain_jax.data import images
from brain_jax.evaluation import figures, scores, wording

MAX_GALLERY = 200  # wrong images on the page


def list_errors(predictions):
    """Returns the wrong images, the most confident first: dictionaries of image, path and what was said of it."""
    examples, confidence = predictions.examples, predictions.best.max(axis=1)
    wrong = np.flatnonzero(~predictions.correct)
    names = predictions.class_names
    return [
        {
            'image': examples.images[examples.index[i]],
            'path': str(examples.file_names[i]),
            'label': names[examples.labels[i]],
            'predicted': names[predictions.predicted[i]],
            'probability': float(confidence[i]),
            'label_probability': float(predictions.best[i, examples.labels[i]]),
            'part': part_of(predictions, i),
        }
        for i in wrong[np.argsort(-confidence[wrong], kind='stable')]
    ]


def part_of(predictions, i):
    """Returns the name of the part that image i lies in, beside the whole."""
    return next(name for name in ('copied', 'seen_patient', 'unseen') if predictions.parts[name][i])


def draw_figures(predictions, metrics, errors):
    """Returns {name: uint8 [height, width, 3]} of all figures; a part without images has none."""
    provenance = wording.describe_provenance(metrics)
    labels, names = predictions.examples.labels, predictions.class_names
    parts = {name: rows for name, rows in predictions.parts.items() if rows.any()}
    drawn = {}
    for name in parts:
        title = f'{wording.PARTS[name]}: {metrics[name]["n"]:,}'
        drawn[f'confusion_{name}'] = figures.draw_confusion(metrics[name]['confusion'], names, title, provenance)
        drawn[f'classes_{name}'] = figures.draw_classes(metrics[name]['per_class'], title, provenance)
    whole = next(iter(predictions.parts))
    curves = {'as trained': scores.reliability(predictions.probabilities, labels)}
    if predictions.calibrated is not None:
        curves['calibrated'] = scores.reliability(predictions.calibrated, labels)
    drawn['reliability'] = figures.draw_reliability(curves, wording.PARTS[whole], provenance)
    confidence = predictions.best.max(axis=1)
    curves = {
        wording.PARTS[name]: scores.risk_coverage(confidence[rows], predictions.correct[rows])
        for name, rows in parts.items()
    }
    marks = [
        (
            f'threshold for {100 * found["wanted_error"]:g} % errors',
            found['parts'][whole]['coverage'],
            found['parts'][whole]['error'],
        )
        for found in metrics['selective']['thresholds']
        if found['parts'][whole]['error'] is not None
    ]
    drawn['risk_coverage'] = figures.draw_risk_coverage(curves, marks, 'Selective prediction', provenance)
    if errors:
        title = f'The most confident of {len(errors):,} errors'
        drawn['errors'] = figures.draw_errors(errors, title, provenance)
    return drawn


def format_predictions(predictions, metrics):
    """Returns the content of predictions.csv: a row an image, with probabilities as predicted and as calibrated."""
    names, examples = predictions.class_names, predictions.examples
    hashes = {f'{name}_sha256': metrics['hashes'][f'{name}_sha256'] for name in ('checkpoint', 'config', 'split')}
    rows = []
    for i, probabilities in enumerate(predictions.probabilities.tolist()):
        row = {
            'path': examples.file_names[i],
            'label': names[examples.labels[i]],
            'predicted': names[predictions.predicted[i]],
        }
        row |= {f'probability_{name}': probability for name, probability in zip(names, probabilities, strict=True)}
        row |= {'group': examples.groups[i], 'patient': examples.patients[i], 'part': part_of(predictions, i)}
        if predictions.calibrated is not None:
            row |= {f'calibrated_{name}': predictions.calibrated[i, k] for k, name in enumerate(names)}
        rows.append(row | hashes)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_outputs(predictions, metrics, output, workdir):
    """Writes everything, after all of it was made, so that an error leaves nothing half done.

    Args:
      predictions: `evaluate.Predictions`.
      metrics: the content of metrics.json, see `evaluate.evaluate_run`.
      output: pathlib.Path of the folder for metrics.json, predictions.csv, figures and report.html.
      workdir: pathlib.Path of the run, for calibration.json, MODEL_CARD.md and TensorBoard summaries.

    Raises:
      InputError: where a file cannot be written.
    """
    errors = list_errors(predictions)
    drawn = draw_figures(predictions, metrics, errors)
    pngs = {name: figures.to_png(pixels, wording.describe_provenance(metrics)) for name, pixels in drawn.items()}
    calibration = format_json(metrics['calibration'] | {'hashes': metrics['hashes']})
    contents = {output / f'{name}.png': png for name, png in pngs.items()}
    contents |= {
        output / 'predictions.csv': format_predictions(predictions, metrics),
        output / 'calibration.json': calibration,
        output / 'metrics.json': format_json(metrics),
        output / 'report.html': format_page(metrics, pngs, errors),
    }
    if metrics['as_trained']:
        contents[workdir / 'calibration.json'] = calibration
        if metrics['split'] == 'test':
            contents[workdir / 'MODEL_CARD.md'] = format_card(metrics)
    for path, content in contents.items():
        files.write_whole(path, content)
    if metrics['as_trained']:
        write_summaries(workdir, metrics, drawn)
    logging.info('wrote %s', output / 'report.html')


def format_json(value):
    """Returns JSON text; NaN, which is none, would be a defect."""
    return json.dumps(value, indent=2, allow_nan=False) + '\n'


def write_summaries(workdir, metrics, drawn):
    """Writes the figures and the main scores for TensorBoard, beside the curves of the run."""
    writer = metric_writers.SummaryWriter(str(workdir))
    prefix = f'evaluation_{metrics["split"]}'
    names = ('accuracy', 'macro_f1', 'roc_auc', 'ece', 'ece_calibrated', 'aurc')
    values = {f'{prefix}/{part}/{name}': metrics[part][name] for part in wording.parts_of(metrics) for name in names}
    writer.write_scalars(metrics['step'], {name: value for name, value in values.items() if value is not None})
    writer.write_images(metrics['step'], {f'{prefix}/{name}': pixels[None] for name, pixels in drawn.items()})
    writer.close()


def format_card(metrics):
    """Returns the content of MODEL_CARD.md."""
    return environment().get_template('model_card.md').render(metrics=metrics, card=wording.describe_card(metrics))


def format_page(metrics, pngs, errors):
    """Returns the content of report.html, which needs no other file.

    Args:
      metrics: the content of metrics.json.
      pngs: {name: bytes of a PNG file} of `draw_figures`.
      errors: of `list_errors`.
    """
    gallery = [
        error | {'image': figures.to_data_uri(figures.to_png(images.pad_and_resize(error['image'], 128)))}
        for error in errors[:MAX_GALLERY]
    ]
    page = environment().get_template('report.html')
    return page.render(
        metrics=metrics,
        parts={name: metrics[name] for name in wording.parts_of(metrics)},
        part_names=wording.PARTS,
        figures={name: figures.to_data_uri(png) for name, png in pngs.items()},
        gallery=gallery,
        num_errors=len(errors),
        caveats=wording.list_caveats(metrics),
        card=wording.describe_card(metrics),
        provenance=wording.describe_provenance(metrics),
        show=wording.show,
        show_interval=wording.show_interval,
        why_undefined=wording.why_undefined,
    ).lstrip()


def environment():
    """Returns the jinja2 environment: what comes from data is escaped, and a misspelt name is an error."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader('brain_jax.evaluation'),
        autoescape=lambda name: name.endswith('.html'),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Names of classes and folders come from the data, and Markdown passes HTML on.
    found.filters['markdown'] = lambda text: (
        str(text).replace('&', '&amp;').replace('<', '&lt;').replace('|', '\\|').replace('\n', ' ')
    )
    return found

"""What an audit leaves behind: audit.json, groups.csv, one self-contained page, and a summary for the terminal."""

import csv
import io
import pathlib

import numpy as np

from brain_jax import files
from brain_jax.data import images, shortcuts
from brain_jax.evaluation import figures
from brain_jax.evaluation import report as report_files

MAX_PAIRS = 24  # on a contact sheet
_SIDE = 128  # of its images, in pixels
_SECTIONS = {'across': 'test to training', 'within_training': 'within training', 'within_testing': 'within test'}


def write_audit(report, output):
    """Writes audit.json, groups.csv and audit.html, after all of them were made.

    Args:
      report: the dict that `audit.audit` returns.
      output: the folder to write to; it is made if need be.

    Raises:
      InputError: where a file cannot be written, or an image for the page cannot be read any more.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, report['files'][0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(report['files'])
    summary = {name: value for name, value in report.items() if name != 'files'}
    contents = {
        'audit.json': report_files.format_json(summary),
        'groups.csv': table.getvalue(),
        'audit.html': format_page(report),
    }
    for name, text in contents.items():
        files.write_whole(pathlib.Path(output, name), text)


def format_page(report):
    """Returns the content of audit.html, which needs no other file.

    Args:
      report: the dict that `audit.audit` returns; the images of its pairs are read from its data_dir.
    """
    folder = pathlib.Path(report['data_dir'])
    template = report_files.environment().get_template('audit.html')
    return template.render(
        report=report,
        name=folder.name,
        sections=_SECTIONS,
        probes={name: probe.title for name, probe in shortcuts.PROBES.items()},
        sheets=[
            sheet | {'shown': [_picture(folder, pair) for pair in sheet['shown']]} for sheet in _list_sheets(report)
        ],
    )


def _list_sheets(report):
    """Returns the contact sheets: title, number of pairs, and those that are shown, from the whole range evenly."""
    copies = [{'first': pair['training'], 'second': pair['test'], **pair} for pair in report['copies']]
    near = [pair for pair in copies if not pair['aligned'] and not pair['identical']]
    sheets = {
        'Copies in folders of different classes': report['different_labels'],
        'Mirrored or turned': [pair for pair in near if pair['orientation'] != 'same'],
        'Near copies, not turned': [pair for pair in near if pair['orientation'] == 'same'],
        'Alike after a small crop, shift or stretch': [pair for pair in copies if pair['aligned']],
        'Equal pixels': [pair for pair in copies if pair['identical']],
    }
    listed = []
    for title, pairs in sheets.items():
        rows = np.linspace(0, len(pairs) - 1, min(len(pairs), MAX_PAIRS)).round().astype(int)
        listed.append({'title': title, 'count': len(pairs), 'shown': [pairs[i] for i in rows]})
    return [sheet for sheet in listed if sheet['count']]


def _picture(folder, pair):
    """Adds the two images of a pair to it, as data: addresses."""
    return pair | {
        f'{side}_image': figures.to_data_uri(
            images.encode_png(images.pad_and_resize(images.read_image(folder / pair[side]), _SIDE))
        )
        for side in ('first', 'second')
    }


def format_summary(report):
    """Returns an audit as text for a terminal, without the lists."""
    sections = [report[name] for name in _SECTIONS]
    rows = [('', *_SECTIONS.values()), ('images', *(section['images'] for section in sections))]
    rows += [
        (title, *(section[name] for section in sections))
        for title, name in (
            ('same bytes', 'byte_identical'),
            ('same pixels', 'pixel_identical'),
            ('same patient', 'same_patient'),
        )
    ]
    for threshold in report['across']['near']:
        for title, name in ((f'correlation {threshold}', 'near'), ('  without mirroring or turning', 'near_unturned')):
            rows.append((title, *(section[name][threshold] for section in sections)))
    rows.append(('only after a small crop', *(section['aligned'] for section in sections)))
    rows.append(('pairs of different classes', *(section['different_labels'] for section in sections)))
    lines = [f'{title:32}' + ''.join(f'{_count(value):>18}' for value in values) for title, *values in rows]
    found = report['groups']
    lines += [
        '',
        f'{found["count"]:,} groups, {found["across"]:,} of them in both folders with {found["test_images_across"]:,} '
        f'test images; the largest, {found["largest_name"]}, has {found["largest"]:,} images',
        '',
        f'{"accuracy of probes":48}{"standard":>12}{"grouped":>12}',
    ]
    grouped = report['probes_grouped'] or {}
    titles = {'majority': 'the most frequent class'} | {name: probe.title for name, probe in shortcuts.PROBES.items()}
    lines += [
        f'{title:48}' + ''.join(f'{_share(scores.get(name)):>12}' for scores in (report['probes'], grouped))
        for name, title in titles.items()
    ]
    for warning in report['warnings']:
        lines += ['', f'WARNING: {warning["what"]}', *(f'  {example}' for example in warning['examples'])]
        lines += [f'  -> {warning["advice"]}']
    return '\n'.join(lines)


def _count(value):
    """Returns a number, or what stands for one, as text."""
    return 'not known' if value is None else f'{value:,}' if isinstance(value, int) else value


def _share(value):
    """Returns an accuracy as text."""
    return 'not defined' if value is None else f'{100 * value:.1f} %'

"""Tests of what an audit writes."""

import base64
import csv
import html
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from brain_jax import InputError
from brain_jax.data import audit, groups, images, phantom
from brain_jax.evaluation import audit_report

REPOSITORY = pathlib.Path(__file__).parents[1]
ODD_CLASS = 'a <b>"&amp;\' class'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with copies of every kind and names that are no HTML."""
    root = tmp_path_factory.mktemp('report') / '<i>data'
    for i in range(12):
        image, _ = phantom.draw_head(np.random.default_rng(i), phantom.CLASS_NAMES[i % 4], 96)
        copy = {0: image, 1: image[:, ::-1], 2: np.roll(image, 1, axis=1), 3: image // 2}.get(i, 255 - image)
        for name, pixels in ((f'Training/{ODD_CLASS}', image), (f'Testing/{[ODD_CLASS, "other"][i % 2]}', copy)):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / name / f'<u>{i}.png')
    (root / 'Training/other').mkdir()
    for i in range(20, 26):
        image, _ = phantom.draw_head(np.random.default_rng(i), 'glioma', 96)
        Image.fromarray(image).save(root / f'Training/other/{i}.png')
    return root


@pytest.fixture(scope='module')
def report(folder):
    return audit.audit(folder)


@pytest.fixture(scope='module')
def output(report, tmp_path_factory):
    path = tmp_path_factory.mktemp('output') / 'new' / 'audit'
    audit_report.write_audit(report, path)
    return path


def test_files(report, output):
    assert sorted(path.name for path in output.iterdir()) == ['audit.html', 'audit.json', 'groups.csv']
    written = json.loads((output / 'audit.json').read_text())
    assert written == {name: value for name, value in report.items() if name != 'files'}
    table = groups.read_table(output / 'groups.csv')
    assert {path: row.group for path, row in table.items()} == {row['path']: row['group'] for row in report['files']}
    with open(output / 'groups.csv', newline='', encoding='utf-8') as file:
        assert next(csv.reader(file)) == ['path', 'group', 'patient_id', 'source_label']


def test_page_needs_nothing_else(output):
    page = (output / 'audit.html').read_text(encoding='utf-8')
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert addresses and all(address.startswith(('data:', '#')) for address in addresses)
    assert not re.search(r'https?://|<script|@import|url\(', page)
    assert {address for address in addresses if address.startswith('#')} <= {
        f'#{name}' for name in re.findall(r'id="([^"]*)"', page)
    }


def test_page_shows_names_as_they_are(output):
    page = (output / 'audit.html').read_text(encoding='utf-8')
    assert '<u>' not in page and '<i>' not in page and ODD_CLASS not in page
    assert 'a &lt;b&gt;&#34;&amp;amp;&#39; class' in page


def test_page_shows_pairs(folder, report, output):
    page = (output / 'audit.html').read_text(encoding='utf-8')
    figures = [html.unescape(figure) for figure in re.findall(r'<figure class="pair">.*?</figure>', page, re.DOTALL)]
    assert len(figures) == len(report['copies']) + len(report['different_labels']) == 6
    assert sum('class="turned">mirrored<' in figure for figure in figures) == 2  # a copy, of another class at that
    training, test = f'Training/{ODD_CLASS}/<u>2.png', f'Testing/{ODD_CLASS}/<u>2.png'
    (figure,) = (figure for figure in figures if test in figure)
    assert training in figure and 'correlation 0.99' in figure
    for name, data in zip((training, test), re.findall(r'base64,([^"]*)"', figure), strict=True):
        shown = images.decode_image(base64.b64decode(data))
        np.testing.assert_array_equal(shown, images.pad_and_resize(images.read_image(folder / name), 128))


def test_contact_sheets_are_short(report):
    many = report | {'copies': [report['copies'][0] | {'correlation': i / 100} for i in range(100)]}
    (sheet,) = (sheet for sheet in audit_report._list_sheets(many) if sheet['count'] == 100)
    shown = [pair['correlation'] for pair in sheet['shown']]
    assert len(shown) == audit_report.MAX_PAIRS and shown == sorted(shown) and (shown[0], shown[-1]) == (0, 0.99)


def test_what_is_not_known_is_not_a_number(report, output):
    page = (output / 'audit.html').read_text(encoding='utf-8')
    assert report['across']['same_patient'] is None
    assert 'not known' in page and 'not known' in audit_report.format_summary(report)
    undefined = report | {'probes_grouped': None}
    assert audit_report.format_page(undefined).count('not defined') == 6
    assert audit_report.format_summary(undefined).count('not defined') == 6


def test_summary(report):
    lines = audit_report.format_summary(report).splitlines()
    numbers = {line[:32].strip(): line[32:].split() for line in lines[1:]}
    assert numbers['images'] == ['12', '18', '12']
    assert numbers['same pixels'] == ['1', '0', '0']
    assert numbers['correlation 0.98'] == [str(report['across']['near']['0.98']), '0', '0']
    assert sum(line.startswith('WARNING: ') for line in lines) == len(report['warnings'])


def test_nothing_is_written_where_it_cannot_be(report, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='cannot be written'):
        audit_report.write_audit(report, tmp_path / 'file')
    with pytest.raises(InputError, match='not a file'):
        audit_report.write_audit(report | {'data_dir': str(tmp_path)}, tmp_path / 'output')
    assert not (tmp_path / 'output').exists()


def run_script(*flags):
    command = [sys.executable, 'scripts/audit_dataset.py', *flags]
    environment = os.environ | {'PYTHONPATH': str(REPOSITORY)}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


def test_script(folder, report, output, tmp_path):
    process = run_script(f'--data_dir={folder}', f'--output={tmp_path}')
    assert process.returncode == 0, process.stderr
    assert audit_report.format_summary(report) in process.stdout
    for name in ('audit.json', 'groups.csv', 'audit.html'):
        assert (tmp_path / name).read_bytes() == (output / name).read_bytes()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--data_dir=/nowhere'], '/nowhere: no such folder'),
        (['--data_dir=brain_jax', '--groups=/nowhere.csv'], 'there is no Training/ or train/ in it'),
    ],
)
def test_script_ends_with_one_line(flags, message, tmp_path):
    process = run_script(*flags, f'--output={tmp_path / "output"}')
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith('error: ') and message in process.stderr
    assert 'Traceback' not in process.stderr and not (tmp_path / 'output').exists()


def test_page_in_chromium(output, check_in_chromium):
    check_in_chromium(output / 'audit.html')

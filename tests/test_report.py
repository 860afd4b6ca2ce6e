"""Tables, figures, page and card of predictions that are made up."""

import csv
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from scipy import special
from sklearn import metrics as sklearn_metrics

from brain_jax import InputError
from brain_jax.data import leakage, pipeline
from brain_jax.evaluation import evaluate, figures, report, wording

CLASSES = ('glioma', 'meningioma', 'notumor', 'pituitary')
HOSTILE = 'Testing/x/"><script>alert(1)</script>|$\\frac$.jpg'


def make_examples(rng, n, labels):
    return pipeline.Examples(
        images=rng.integers(0, 256, (n, 32, 32), np.uint8),
        index=np.arange(n, dtype=np.int32),
        labels=labels,
        file_names=np.array([f'Testing/x/{i}.jpg' for i in range(n - 1)] + [HOSTILE]),
        sha256=np.char.mod('%064x', np.arange(n)),
        groups=np.char.mod('group %d', np.arange(n) // 3),
        patients=np.where(np.arange(n) % 2, np.char.mod('patient %d', np.arange(n) // 4), ''),
    )


def make_result(n=120, class_names=CLASSES, absent=None, empty=(), temperature=1.5):
    """Returns made-up predictions, the last of them wrong and very sure, and their metrics."""
    rng = np.random.default_rng(0)
    num_classes = len(class_names)
    labels = np.sort(rng.integers(0, num_classes, n)).astype(np.int32)
    labels[labels == absent] = 0
    logits = rng.normal(size=(n, num_classes)) + 2 * np.eye(num_classes)[labels]
    logits[-1] = 9 * np.eye(num_classes)[(labels[-1] + 1) % num_classes]
    part = rng.choice([name for name in ('copied', 'seen_patient', 'unseen') if name not in empty], n)
    predictions = evaluate.Predictions(
        class_names=class_names,
        examples=make_examples(rng, n, labels),
        probabilities=special.softmax(logits, axis=1),
        calibrated=special.softmax(logits / temperature, axis=1) if temperature else None,
        parts={'standard': np.ones(n, bool)} | {name: part == name for name in ('copied', 'seen_patient', 'unseen')},
        nearest=rng.integers(0, num_classes, n),
        matches=leakage.Matches(np.zeros(n, np.int32), np.ones(n, np.float32), np.full(n, 4, np.int8)),
    )
    validation = make_examples(rng, n, labels) if temperature else None
    calibration = evaluate.calibrate(validation, logits, (0.01, 0.2))
    described = {
        'workdir': 'run',
        'split': 'test',
        'protocol': 'standard',
        'fold': None,
        'folds': None,
        'model': 'DenseNet121',
        'mode': 'finetune',
        'step': 7,
        'image_size': 32,
        'dataset': 'brain_tumor_mri/folder:1.0.0',
        'class_names': list(class_names),
        'data': {
            'test': {
                'n': n,
                'groups': n // 3,
                'patients': n // 4,
                'images_of_known_patients': n // 2,
                'classes': {name: int(np.sum(labels == k)) for k, name in enumerate(class_names)},
            }
        },
        'as_trained': True,
        'hashes': {
            'checkpoint_sha256': 'c' * 64,
            'config_sha256': 'e' * 64,
            'split_sha256': 's' * 64,
            'weights_sha256': 'w' * 64,
        },
        'versions': {'jax': '0.10.2'},
    }
    strangers = {'wanted_false_alarms': 0.05, 'threshold': 1.0, 'false_alarms': {'standard': 0.04}}
    metrics = described | evaluate.score_run(predictions, calibration)
    return predictions, metrics | {'out_of_distribution': strangers, 'comparison': None}


@pytest.fixture(scope='module')
def result():
    return make_result()


def render(predictions, metrics):
    errors = report.list_errors(predictions)
    drawn = report.draw_figures(predictions, metrics, errors)
    return report.format_page(metrics, {name: figures.to_png(pixels) for name, pixels in drawn.items()}, errors)


class Tags(html.parser.HTMLParser):
    """Collects the tags of a page, and checks that they are closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.seen, self.addresses = [], set(), []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.addresses += [value for name, value in attrs if name in ('src', 'href')]
        if tag not in ('meta', 'link', 'img', 'br'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


def test_scores_equal_those_of_scikit_learn_on_the_written_predictions(result):
    predictions, metrics = result
    rows = list(csv.DictReader(io.StringIO(report.format_predictions(predictions, metrics))))
    assert [row['path'] for row in rows] == predictions.examples.file_names.tolist()
    assert {row['checkpoint_sha256'] for row in rows} == {'c' * 64}
    for part in ('standard', 'copied', 'seen_patient', 'unseen'):
        chosen = [row for row in rows if part in ('standard', row['part'])]
        labels, predicted = ([CLASSES.index(row[name]) for row in chosen] for name in ('label', 'predicted'))
        for prefix, suffix in (('probability', ''), ('calibrated', '_calibrated')):
            probabilities = np.array([[float(row[f'{prefix}_{name}']) for name in CLASSES] for row in chosen])
            log_loss = sklearn_metrics.log_loss(labels, probabilities)
            assert metrics[part][f'negative_log_likelihood{suffix}'] == pytest.approx(log_loss)
            brier = sklearn_metrics.brier_score_loss(labels, probabilities)
            assert metrics[part][f'brier{suffix}'] == pytest.approx(brier)
            if prefix == 'probability':
                area = sklearn_metrics.roc_auc_score(labels, probabilities, multi_class='ovr')
                assert metrics[part]['roc_auc'] == pytest.approx(area)
        assert metrics[part]['n'] == len(chosen)
        assert metrics[part]['accuracy'] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
        f1 = sklearn_metrics.f1_score(labels, predicted, average='macro')
        assert metrics[part]['macro_f1'] == pytest.approx(f1)
        assert metrics[part]['confusion'] == sklearn_metrics.confusion_matrix(labels, predicted).tolist()


def test_page_needs_nothing_else_and_runs_nothing(result):
    page = render(*result)
    tags = Tags(page)
    assert not tags.open
    assert 'script' not in tags.seen
    assert all(address.startswith(('data:', '#')) for address in tags.addresses)
    assert '"><script' not in page and '&lt;script&gt;alert(1)&lt;/script&gt;' in page
    assert 'Not a medical device' in page and 'c' * 12 in page
    assert page.index('New patients, no copies') < page.index('The whole standard split')


def test_hostile_class_names():
    names = ('<img src=x onerror=alert(1)>', 'a|b', '$\\alpha$', 'notumor')
    predictions, metrics = make_result(class_names=names)
    assert '<img src=x' not in render(predictions, metrics)
    card = report.format_card(metrics)
    assert '<img src=x' not in card and 'a\\|b' in card


def test_errors_come_with_the_most_confident_first(result):
    predictions, _ = result
    errors = report.list_errors(predictions)
    assert errors[0]['path'] == HOSTILE
    assert errors[0]['probability'] == pytest.approx(predictions.calibrated[-1].max())
    assert [error['probability'] for error in errors] == sorted((e['probability'] for e in errors), reverse=True)
    assert len(errors) == np.sum(predictions.probabilities.argmax(axis=1) != predictions.examples.labels)
    np.testing.assert_array_equal(errors[0]['image'], predictions.examples.images[-1])


@pytest.mark.parametrize(
    'changes',
    [
        {'absent': 3},
        {'empty': ('unseen',)},
        {'empty': ('unseen', 'copied')},
        {'temperature': None},
        {'class_names': ('dog', 'cat')},
    ],
)
def test_scores_that_do_not_exist(changes):
    predictions, metrics = make_result(**changes)
    json.dumps(metrics, allow_nan=False)
    page, card = render(predictions, metrics), report.format_card(metrics)
    assert not Tags(page).open
    assert not re.search(r'\bnan\b', re.sub(r'base64,[^"]*', '', page).lower())
    if 'absent' in changes:
        assert metrics['standard']['per_class']['pituitary']['roc_auc'] is None
        assert 'no image of it' in page and 'No image is of pituitary' in card
    if 'empty' in changes:
        assert metrics['unseen']['n'] == 0 and metrics['unseen']['accuracy'] is None
        assert 'no images' in page and 'not defined (no images)' in card
    if changes.get('temperature', 1) is None:
        assert metrics['standard']['ece_calibrated'] is None and metrics['standard']['ece'] > 0
        assert 'Not calibrated: the run kept no validation images' in page
    if 'class_names' in changes:
        assert metrics['standard']['tumor'] is None
    assert ('Images without a tumour usually' in card) == ('class_names' not in changes)


def test_patients_are_scored_once_each(result):
    predictions, metrics = result
    examples = predictions.examples
    known = [name for name in np.unique(examples.patients) if name]
    one_label = [name for name in known if len(set(examples.labels[examples.patients == name])) == 1]
    assert metrics['patients']['n'] == len(one_label)
    assert set(metrics['patients']['with_two_labels']) == set(known) - set(one_label)
    right = [
        np.log(predictions.calibrated[examples.patients == name]).mean(axis=0).argmax()
        == examples.labels[examples.patients == name][0]
        for name in one_label
    ]
    assert metrics['patients']['accuracy'] == np.mean(right)
    assert len(metrics['patients']['wrong']) == np.sum(~np.array(right))


def test_card_tells_what_a_reader_needs(result):
    _, metrics = result
    card = report.format_card(metrics)
    for words in ('not a medical device', 'Intended use', 'brain_tumor_mri/folder:1.0.0', 'c' * 64, 'e' * 64):
        assert words in card
    low, high = metrics['unseen']['accuracy_interval_by_group']
    assert f'{100 * low:.1f}\u2013{100 * high:.1f}' in card
    assert 'For 60 of the 120 images no patient is known' in card
    tables = [line for line in card.splitlines() if line.startswith('|')]
    assert len(tables) > 10
    assert f'{100 * metrics["standard"]["accuracy"]:.1f}' in wording.summarize(metrics)
    assert 'Taken for no image of this kind: 4.0 % (wanted: 5 %)' in wording.summarize(metrics)


def test_files_are_written_whole(result, tmp_path):
    predictions, metrics = result
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/report.html').write_text('old')
    report.write_outputs(predictions, metrics, tmp_path / 'out', tmp_path)
    names = {path.name for path in (tmp_path / 'out').iterdir()}
    assert {'metrics.json', 'predictions.csv', 'calibration.json', 'report.html', 'reliability.png'} <= names
    assert {'confusion_unseen.png', 'classes_standard.png', 'risk_coverage.png', 'errors.png'} <= names
    assert not [name for name in names if name.startswith('.')]
    assert json.loads((tmp_path / 'out/metrics.json').read_text()) == metrics
    stored = json.loads((tmp_path / 'calibration.json').read_text())
    assert stored['temperature'] == metrics['calibration']['temperature']
    assert stored['hashes']['checkpoint_sha256'] == 'c' * 64
    assert (tmp_path / 'MODEL_CARD.md').is_file() and list(tmp_path.glob('events.out.tfevents.*'))
    for path in (tmp_path / 'out').glob('*.png'):
        with Image.open(path) as image:
            assert 'checkpoint cccccccccccc' in image.text['Description']
            assert image.mode == 'RGB' and min(image.size) > 400


def test_page_in_chromium(result, tmp_path, check_in_chromium):
    report.write_outputs(*result, tmp_path / 'out', tmp_path)
    check_in_chromium(tmp_path / 'out/report.html')


def test_output_that_cannot_be_written(result, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='cannot be written'):
        report.write_outputs(*result, tmp_path / 'file/out', tmp_path)

"""Scores against scikit-learn, scipy, published numbers and sums by hand."""

import numpy as np
import pytest
from scipy import special, stats
from sklearn import metrics

from brain_jax import InputError
from brain_jax.evaluation import scores

CLASSES = ('glioma', 'meningioma', 'notumor', 'pituitary')
SKEWED = [0.1, 0.2, 0.3, 0.4]


def predictions(n=300, num_classes=4, seed=0, decimals=2):
    """Predictions that are right most of the time, coarse enough for many ties: probabilities, labels, groups of 3."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(num_classes, n, p=SKEWED[:num_classes] / np.sum(SKEWED[:num_classes]))
    logits = rng.normal(size=(n, num_classes)) + 2 * np.eye(num_classes)[labels]
    probabilities = np.round(special.softmax(logits, axis=1), decimals) + 1e-3
    return probabilities / probabilities.sum(axis=1, keepdims=True), labels, np.char.mod('g%d', np.arange(n) // 3)


def test_scores_are_those_of_scikit_learn():
    probabilities, labels, groups = predictions()
    predicted = probabilities.argmax(axis=1)
    found = scores.score_predictions(probabilities, labels, groups, CLASSES)
    assert found['n'] == 300 and found['groups'] == 100
    assert found['accuracy'] == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert found['confusion'] == metrics.confusion_matrix(labels, predicted).tolist()
    for name, score in (
        ('precision', metrics.precision_score),
        ('recall', metrics.recall_score),
        ('f1', metrics.f1_score),
    ):
        assert found[f'macro_{name}'] == pytest.approx(score(labels, predicted, average='macro'))
        each = [found['per_class'][k][name] for k in CLASSES]
        assert each == pytest.approx(score(labels, predicted, average=None).tolist())
    specificity = [metrics.recall_score(labels != k, predicted != k) for k in range(4)]
    assert [found['per_class'][k]['specificity'] for k in CLASSES] == pytest.approx(specificity)
    assert found['macro_specificity'] == pytest.approx(np.mean(specificity))
    assert found['roc_auc'] == pytest.approx(metrics.roc_auc_score(labels, probabilities, multi_class='ovr'))
    assert found['average_precision'] == pytest.approx(
        metrics.average_precision_score(np.eye(4)[labels], probabilities)
    )


def test_resampled_scores_are_those_of_scikit_learn_with_weights():
    probabilities, labels, _ = predictions()
    predicted = probabilities.argmax(axis=1)
    weights = np.random.default_rng(1).integers(0, 4, (3, len(labels)))
    found = scores._resampled_table(probabilities, labels, predicted, weights)
    for draw, weight in enumerate(weights):
        for k in range(4):
            truth, answer, score = labels == k, predicted == k, probabilities[:, k]
            expected = [
                metrics.precision_score(truth, answer, sample_weight=weight),
                metrics.recall_score(truth, answer, sample_weight=weight),
                metrics.recall_score(~truth, ~answer, sample_weight=weight),
                metrics.f1_score(truth, answer, sample_weight=weight),
                metrics.roc_auc_score(truth, score, sample_weight=weight),
                metrics.average_precision_score(truth, score, sample_weight=weight),
            ]
            np.testing.assert_allclose(found[draw, :, k], expected, rtol=1e-12)


def test_wilson_interval():
    np.testing.assert_allclose(scores.wilson_interval(81, 263), (0.2553, 0.3662), atol=5e-5)  # Newcombe (1998), table I
    np.testing.assert_allclose(scores.wilson_interval(20, 20), (1 / (1 + 1.959964**2 / 20), 1), rtol=1e-6)
    expected = stats.binomtest(1302, 1311).proportion_ci(method='wilson')
    assert scores.wilson_interval(1302, 1311) == pytest.approx([expected.low, expected.high])
    assert scores.wilson_interval(0, 0) is None


def test_intervals_come_from_groups_and_not_from_images():
    rng = np.random.default_rng(0)
    once = rng.random(60) < 0.8
    groups = np.char.mod('g%d', np.arange(60))
    low, high = scores.mean_interval(once, groups)
    # Ten copies of every image tell nothing new.
    assert scores.mean_interval(np.repeat(once, 10), np.repeat(groups, 10)) == pytest.approx([low, high])
    # The normal approximation of the binomial's spread, of 60 draws and not of 600.
    width = 2 * 1.96 * np.sqrt(once.mean() * (1 - once.mean()) / 60)
    assert high - low == pytest.approx(width, rel=0.15)


def test_interval_of_nothing_that_varies():
    assert scores.mean_interval(np.array([1, 0, 1]), np.array(['a', 'a', 'a'])) is None
    assert scores.mean_interval(np.ones(3), np.array(['a', 'b', 'c'])) is None


def test_absent_class_has_no_scores():
    probabilities, labels, groups = predictions()
    present = labels != 3
    probabilities, labels, groups = probabilities[present], labels[present], groups[present]
    assert np.any(probabilities.argmax(axis=1) == 3)
    found = scores.score_predictions(probabilities, labels, groups, CLASSES)
    absent = found['per_class']['pituitary']
    assert absent['n'] == 0 and absent['specificity'] == np.mean(probabilities.argmax(axis=1) != 3)
    for name in ('precision', 'recall', 'f1', 'roc_auc', 'average_precision'):
        assert absent[name] is None and absent[f'{name}_interval'] is None
    areas = [metrics.roc_auc_score(labels == k, probabilities[:, k]) for k in range(3)]
    assert found['roc_auc'] == pytest.approx(np.mean(areas))
    f1 = metrics.f1_score(labels, probabilities.argmax(axis=1), labels=range(3), average='macro')
    assert found['macro_f1'] == pytest.approx(f1)


def test_class_that_is_never_predicted_has_no_precision():
    probabilities = np.array([[0.9, 0.1, 0.0], [0.8, 0.1, 0.1], [0.2, 0.8, 0.0]])
    found = scores.score_predictions(probabilities, np.array([0, 2, 1]), np.array(['a', 'b', 'c']), 'abc')
    assert found['per_class']['c']['precision'] is None
    assert found['per_class']['c']['recall'] == 0 and found['per_class']['c']['f1'] == 0
    assert found['macro_precision'] == (0.5 + 1) / 2


def test_single_class_has_no_curves():
    probabilities, _, groups = predictions(20)
    found = scores.score_predictions(probabilities, np.zeros(20, int), groups, CLASSES)
    assert found['roc_auc'] is None and found['average_precision'] is None
    assert found['per_class']['glioma']['specificity'] is None


def test_empty_part():
    nothing = np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, str)
    found = scores.score_predictions(*nothing, CLASSES)
    assert found.pop('n') == 0 and found.pop('groups') == 0 and np.sum(found.pop('confusion')) == 0
    for row in found.pop('per_class').values():
        assert row.pop('n') == 0 and set(row.values()) == {None}
    assert set(found.values()) == {None}
    assert set(scores.score_calibration(*nothing[:2]).values()) == {None}
    assert scores.score_selection(np.zeros(0), np.zeros(0, bool)) is None
    assert scores.fit_temperature(*nothing[:2]) is None
    assert scores.find_threshold(np.zeros(0), np.zeros(0, bool), nothing[2], 0.01)['threshold'] is None
    assert scores.compare(np.zeros(0, bool), np.zeros(0, bool), nothing[2])['p_value'] is None


@pytest.mark.parametrize('row', [[0.5, 0.2, 0.1, 0.1], [3.0, -1.0, -0.5, -0.5], [np.nan, 0.5, 0.3, 0.2], [1, 1, 1, 1]])
def test_numbers_that_are_no_probabilities(row):
    probabilities, labels, groups = predictions(5)
    probabilities[3] = row
    for call in (
        lambda: scores.score_predictions(probabilities, labels, groups, CLASSES),
        lambda: scores.score_calibration(probabilities, labels),
    ):
        with pytest.raises(InputError, match=r'1 rows of probabilities .* the first is row 3'):
            call()


def test_probabilities_of_short_floats_are_taken():
    probabilities, labels, _ = predictions(50)
    found = scores.score_calibration(probabilities.astype(np.float32), labels)
    assert found['negative_log_likelihood'] == pytest.approx(metrics.log_loss(labels, probabilities), rel=1e-6)


def test_tumor_against_no_tumor():
    probabilities, labels, groups = predictions()
    found = scores.score_tumor(probabilities, labels, groups, CLASSES)
    truth, answer = labels != 2, probabilities.argmax(axis=1) != 2
    assert found['n'] == truth.sum() and found['accuracy'] == np.mean(truth == answer)
    assert found['sensitivity'] == pytest.approx(metrics.recall_score(truth, answer))
    assert found['specificity'] == pytest.approx(metrics.recall_score(~truth, ~answer))
    assert found['precision'] == pytest.approx(metrics.precision_score(truth, answer))
    assert found['roc_auc'] == pytest.approx(metrics.roc_auc_score(truth, 1 - probabilities[:, 2]))
    assert scores.score_tumor(probabilities, labels, groups, ('a', 'b', 'c', 'd')) is None


def test_temperature_is_recovered():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 4)) * 2
    labels = np.array([rng.choice(4, p=p) for p in special.softmax(logits, axis=1)])
    assert scores.fit_temperature(2.5 * logits, labels) == pytest.approx(2.5, rel=0.03)
    assert scores.fit_temperature(0.5 * logits, labels) == pytest.approx(0.5, rel=0.03)


def test_temperature_without_an_error_is_unknown():
    assert scores.fit_temperature(np.eye(3), np.arange(3)) is None
    with pytest.raises(InputError, match='not finite'):
        scores.fit_temperature(np.array([[np.nan, 0.0]]), np.zeros(1, int))


def test_calibration_errors_by_hand():
    # Equal width: bins 9 (0.55, 0.6), 10 (0.7) and 14 (0.95), of 15. In order of confidence: 0.55 0.6 0.7 0.95.
    probabilities = np.array([[0.55, 0.45], [0.4, 0.6], [0.7, 0.3], [0.05, 0.95]])
    labels = np.array([0, 0, 0, 1])  # right, wrong, right, right
    found = scores.score_calibration(probabilities, labels)
    assert found['ece'] == pytest.approx(np.mean([abs(0.55 - 1 + 0.6 - 0), 1 - 0.7, 1 - 0.95]) * 3 / 4)
    assert found['ece_equal_mass'] == pytest.approx(np.mean([1 - 0.55, 0.6, 1 - 0.7, 1 - 0.95]))
    assert found['brier'] == pytest.approx(np.mean([2 * 0.45**2, 2 * 0.6**2, 2 * 0.3**2, 2 * 0.05**2]))
    assert found['negative_log_likelihood'] == pytest.approx(-np.log([0.55, 0.4, 0.7, 0.95]).mean())


def test_calibration_bins():
    rng = np.random.default_rng(0)
    probabilities, labels, _ = predictions(150, decimals=9)
    width = scores.reliability(probabilities, labels)
    mass = scores.reliability(probabilities, labels, equal_mass=True)
    assert width[0].sum() == 150 and list(mass[0]) == [10] * 15
    confidence = np.sort(probabilities.max(axis=1)).reshape(15, 10)
    np.testing.assert_allclose(mass[1], confidence.mean(axis=1))
    # A network that is as right as it is sure has next to no calibration error.
    p = rng.uniform(0.5, 1, 100_000)
    honest = scores.score_calibration(np.stack([p, 1 - p], axis=1), (rng.random(100_000) > p).astype(int))
    assert honest['ece'] < 0.01 and honest['ece_equal_mass'] < 0.01


def test_risk_and_coverage_by_hand():
    confidence, correct = np.array([0.6, 0.9, 0.8, 0.7]), np.array([False, True, False, True])
    coverage, risk = scores.risk_coverage(confidence, correct)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_allclose(risk, [0, 1 / 2, 1 / 3, 2 / 4])
    assert scores.score_selection(confidence, correct) == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 4)
    # Of equal confidence: in whatever order the images come, each counts half an error.
    for order in ([True, False], [False, True]):
        np.testing.assert_allclose(scores.risk_coverage(np.ones(2), np.array(order))[1], [0.5, 0.5])


def test_design_effect():
    correct = np.random.default_rng(0).random(200) < 0.8
    single = np.char.mod('%d', np.arange(200))
    assert scores.design_effect(correct, single) == pytest.approx(200 / 199)
    # Images of a group that are right or wrong together count as one.
    assert scores.design_effect(np.repeat(correct, 5), np.repeat(single, 5)) == pytest.approx(5 * 200 / 199)
    assert scores.design_effect(np.ones(10, bool), np.repeat(['a', 'b'], 5)) == 5
    assert scores.design_effect(np.array([True, False]), np.array(['a', 'a'])) == 2


def test_threshold_for_a_wanted_error():
    confidence = 1 - np.arange(1000) / 1000
    correct = np.arange(1000) < 697
    groups = np.char.mod('%d', np.arange(1000))
    found = scores.find_threshold(confidence, correct, groups, 0.02)
    assert found['threshold'] == confidence[699] and found['coverage'] == 0.7  # of steps of 5 %
    assert found['error'] == pytest.approx(3 / 700)
    # Clopper and Pearson's bound, the certainty shared among twenty coverages.
    assert stats.binom.cdf(3, 700, found['error_bound']) == pytest.approx(0.05 / 20, rel=0.02)
    assert found['certain_threshold'] == confidence[699]
    # The same images ten times are no more evidence.
    tenfold = scores.find_threshold(*(np.repeat(column, 10) for column in (confidence, correct, groups)), 0.02)
    assert tenfold == pytest.approx(found)
    # Fifty images without an error cannot promise 1 %.
    few = scores.find_threshold(confidence[:50], correct[:50], groups[:50], 0.01)
    assert few['error'] == 0 and few['coverage'] == 1 and few['certain_threshold'] is None
    assert few['error_bound'] == pytest.approx(1 - (0.05 / 20) ** (1 / 50))
    assert scores.find_threshold(confidence[::-1], correct, groups, 0.02)['threshold'] is None


def test_certain_threshold_holds_what_it_promises():
    rng = np.random.default_rng(0)
    found, broken = 0, 0
    for _ in range(200):
        confidence = rng.random(1000)
        correct = rng.random(1000) < 0.8 + 0.2 * confidence
        threshold = scores.find_threshold(confidence, correct, np.char.mod('%d', np.arange(1000)), 0.1)[
            'certain_threshold'
        ]
        if threshold is not None:
            found += 1
            broken += 0.2 * (1 - threshold) / 2 > 0.1  # the true error above the threshold
    assert found > 150 and broken <= 200 * 0.05


def test_answered_part():
    confidence, correct = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, True])
    found = scores.score_answered(confidence, correct, 0.8)
    assert (found['answered'], found['coverage'], found['error']) == (2, 0.5, 0.5)
    assert set(scores.score_answered(confidence, correct, None).values()) == {None}
    none_answered = scores.score_answered(confidence, correct, 0.95)
    assert none_answered['coverage'] == 0 and none_answered['error'] is None


def test_one_answer_a_patient():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4], [0.5, 0.5], [0.5, 0.5]])
    labels = np.array([0, 0, 1, 1, 0, 1])
    patients = np.array(['a', 'a', 'b', '', 'c', 'c'])
    groups = np.array(['one', 'one', 'two', 'three', 'four', 'four'])
    names, combined, patient_labels, patient_groups, mixed = scores.combine_patients(
        probabilities, labels, patients, groups
    )
    assert names.tolist() == ['a', 'b'] and mixed == ['c']
    assert patient_labels.tolist() == [0, 1] and patient_groups.tolist() == ['one', 'two']
    means = np.sqrt([0.9 * 0.2, 0.1 * 0.8])  # the geometric mean is that of the log-probabilities
    np.testing.assert_allclose(combined, [means / means.sum(), [0.3, 0.7]])
    nobody = scores.combine_patients(probabilities, labels, np.full(6, ''), groups)
    assert [len(part) for part in nobody] == [0] * 5


def test_comparison_by_hand():
    correct = np.array([True] * 12 + [False] * 3 + [True] * 5)
    other = np.array([True] * 5 + [False] * 7 + [True] * 1 + [False] * 2 + [True] * 5)
    found = scores.compare(correct, other, np.char.mod('%d', np.arange(20)))
    assert (found['only_this_correct'], found['only_other_correct']) == (7, 1)
    assert found['difference'] == pytest.approx(6 / 20)
    assert found['p_value'] == pytest.approx(2 * (1 + 8) / 2**8)  # at most 1 of 8 heads, both sides
    low, high = found['difference_interval']
    assert low < 0.3 < high
    same = scores.compare(correct, correct, np.char.mod('%d', np.arange(20)))
    assert same['p_value'] == 1 and same['difference'] == 0 and same['difference_interval'] is None

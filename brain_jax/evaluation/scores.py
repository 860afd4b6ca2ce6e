"""Scores of predictions with their intervals: arrays in, dictionaries of plain numbers out.

Images of one group (the slices of a patient, copies) say much the same, so intervals come from groups and not from
images. A score that the images cannot give, such as the recall of a class that none of them has, is None: never 0 or 1.
"""

import functools

import numpy as np
from scipy import optimize, special, stats
from sklearn import metrics

from brain_jax import InputError

CLASS_SCORES = ('precision', 'recall', 'specificity', 'f1', 'roc_auc', 'average_precision')
MEAN_SCORES = ('macro_precision', 'macro_recall', 'macro_specificity', 'macro_f1', 'roc_auc', 'average_precision')
CALIBRATION_SCORES = ('ece', 'ece_equal_mass', 'brier', 'negative_log_likelihood')
DRAWS = 1000  # of the bootstrap
BINS = 15  # of the calibration error, as Guo et al. (2017) have it
COVERAGES = np.arange(1, 21) / 20  # at which a threshold is looked for


def check_probabilities(probabilities):
    """Returns the probabilities as float64.

    Raises:
      InputError: where a row is not of probabilities, or its sum differs from one by more than rounding.
    """
    probabilities = np.asarray(probabilities, np.float64)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise InputError(f'probabilities have the shape {probabilities.shape}: give [images, 2 classes or more]')
    impossible = ~np.all(probabilities >= 0, axis=1)  # also NaN
    sums = probabilities.sum(axis=1)
    wrong = np.flatnonzero(impossible | ~(np.abs(sums - 1) <= 1e-3))
    if len(wrong):
        row = wrong[0]
        raise InputError(
            f'{len(wrong)} rows of probabilities do not have the sum 1, or hold a negative one; the first is row '
            f'{row} with the sum {sums[row]:.6g}: give the probabilities of all classes, not logits'
        )
    return probabilities


def wilson_interval(successes, n):
    """Returns the 95 % interval [low, high] of a share of independent draws (Wilson, 1927), None for no draws."""
    if n == 0:
        return None
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(method='wilson')
    return [float(interval.low), float(interval.high)]


def bootstrap(statistic, groups, *, seed=0):
    """Resamples whole groups with replacement.

    Args:
      statistic: function from weights, int [draws, n], how many times an image is drawn, to float [draws, ...].
      groups: str [n].
      seed: equal seeds give equal draws.

    Returns:
      The statistic of every draw, float [DRAWS, ...].
    """
    names, members = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(DRAWS // 50):  # in parts, which keeps the arrays small
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=50)
        samples.append(statistic(counts[:, members]))
    return np.concatenate(samples)


def percentile_interval(samples):
    """Returns the middle 95 % of the draws that have the score; None where all are equal, which bounds nothing."""
    samples = samples[~np.isnan(samples)]
    if len(samples) == 0 or np.ptp(samples) < 1e-12:
        return None
    return np.percentile(samples, (2.5, 97.5)).tolist()


def score_predictions(probabilities, labels, groups, class_names, *, predicted=None, seed=0):
    """Scores the predicted classes, and each class against the rest.

    Args:
      probabilities: float [n, classes].
      labels: int [n].
      groups: str [n].
      class_names: str [classes].
      predicted: int [n]; None: the most probable class.
      seed: of the bootstrap.

    Returns:
      A dictionary of n, groups (how many), accuracy, accuracy_interval (Wilson: as if images were independent),
      accuracy_interval_by_group (bootstrap), the `MEAN_SCORES` over the classes that have the score, per_class with n
      and the `CLASS_SCORES` of each, all of them with an `_interval` by group, and confusion: rows of counts (true,
      predicted).

    Raises:
      InputError: where the probabilities are none.
    """
    probabilities = check_probabilities(probabilities)
    predicted = probabilities.argmax(axis=1) if predicted is None else predicted
    correct = labels == predicted
    n, num_classes = probabilities.shape
    confusion = np.zeros((num_classes, num_classes), int)
    samples = np.full((1, len(CLASS_SCORES), num_classes), np.nan)
    if n:
        confusion = metrics.confusion_matrix(labels, predicted, labels=range(num_classes))
        resampled = functools.partial(_resampled_table, probabilities, labels, predicted)
        samples = bootstrap(resampled, groups, seed=seed)
    table = _class_table(probabilities, labels, predicted)
    per_class = {
        name: {'n': int(np.sum(labels == k))} | _describe(CLASS_SCORES, table[:, k], samples[:, :, k])
        for k, name in enumerate(class_names)
    }
    return {
        'n': n,
        'groups': len(np.unique(groups)),
        'accuracy': float(correct.mean()) if n else None,
        'accuracy_interval': wilson_interval(correct.sum(), n),
        'accuracy_interval_by_group': mean_interval(correct, groups, seed=seed),
        **_describe(MEAN_SCORES, _mean_over_classes(table), _mean_over_classes(samples)),
        'per_class': per_class,
        'confusion': confusion.tolist(),
    }


def mean_interval(values, groups, *, seed=0):
    """Returns the bootstrap interval by group of the mean of values [n], None where there is none."""
    if len(values) == 0:
        return None
    return percentile_interval(bootstrap(lambda weights: weights @ values / weights.sum(axis=1), groups, seed=seed))


def _describe(names, values, samples):
    """Returns {name: value, name_interval: interval} of values [scores] and their draws [draws, scores]."""
    scores = {}
    for i, name in enumerate(names):
        scores[name] = None if np.isnan(values[i]) else float(values[i])
        scores[f'{name}_interval'] = percentile_interval(samples[:, i])
    return scores


def _mean_over_classes(table):
    """Returns the mean over the last axis of the numbers that exist, NaN where none does."""
    exists = ~np.isnan(table)
    count = exists.sum(axis=-1)
    return np.where(count, np.where(exists, table, 0).sum(axis=-1) / np.maximum(count, 1), np.nan)


def _class_table(probabilities, labels, predicted):
    """Returns the `CLASS_SCORES` of each class, float [scores, classes], NaN where there is none."""
    classes = np.arange(probabilities.shape[1])
    table = np.full((len(CLASS_SCORES), len(classes)), np.nan)
    if len(labels) == 0:
        return table
    precision, recall, f1, count = metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=np.nan
    )
    counts = metrics.multilabel_confusion_matrix(labels, predicted, labels=classes)
    present, others = count > 0, count < len(labels)
    # Of a class that no image has, precision and F1 could be nothing but 0.
    table[[0, 1, 3]] = np.where(present, (precision, recall, f1), np.nan)
    table[2, others] = counts[others, 0, 0] / counts[others, 0].sum(axis=1)
    for k in np.flatnonzero(present & others):
        table[4, k] = metrics.roc_auc_score(labels == k, probabilities[:, k])
        table[5, k] = metrics.average_precision_score(labels == k, probabilities[:, k])
    return table


def _resampled_table(probabilities, labels, predicted, weights):
    """Returns `_class_table` of many draws at once, float [draws, scores, classes]."""
    num_classes = probabilities.shape[1]
    cells = np.eye(num_classes**2)[labels * num_classes + predicted]
    confusion = (weights @ cells).reshape(-1, num_classes, num_classes)
    right, true, answered = np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(axis=2), confusion.sum(axis=1)
    total = true.sum(axis=1, keepdims=True)
    with np.errstate(divide='ignore', invalid='ignore'):
        absent = np.where(true == 0, np.nan, 0)
        precision = right / answered + absent
        recall = right / true
        specificity = (total - true - answered + right) / (total - true)
        f1 = 2 * right / (answered + true) + absent
    ranked = [_resampled_areas(probabilities[:, k], labels == k, weights) for k in range(num_classes)]
    return np.stack([precision, recall, specificity, f1, *np.stack(ranked, axis=-1)], axis=1)


def _resampled_areas(score, positive, weights):
    """Returns the areas under the ROC and the precision-recall curve of each draw, float [2, draws]; NaN for none."""
    order = np.argsort(-score)
    ends = np.flatnonzero(np.append(np.diff(score[order]), 1))  # no threshold parts images of equal score
    drawn = weights[:, order]
    answered = np.cumsum(drawn, axis=1)[:, ends].astype(float)
    true = np.cumsum(drawn * positive[order], axis=1)[:, ends].astype(float)
    false = answered - true
    new_true, new_false = np.diff(true, axis=1, prepend=0), np.diff(false, axis=1, prepend=0)
    below = false[:, -1:] - false + new_false / 2  # negatives that a positive of this score outranks, ties half
    precision = true / np.maximum(answered, 1)
    with np.errstate(divide='ignore', invalid='ignore'):
        both = np.where(false[:, -1] > 0, true[:, -1], np.nan)
        return np.stack([np.sum(new_true * below, axis=1) / false[:, -1], np.sum(new_true * precision, axis=1)]) / both


def score_tumor(probabilities, labels, groups, class_names, *, seed=0):
    """Scores tumour against no tumour, whatever the kind of tumour.

    Args:
      probabilities: float [n, classes].
      labels: int [n].
      groups: str [n].
      class_names: str [classes].
      seed: of the bootstrap.

    Returns:
      n and `CLASS_SCORES` of the tumours with their intervals, the recall under its name in medicine, sensitivity; and
      accuracy. None where no class is called notumor.
    """
    if 'notumor' not in class_names:
        return None
    healthy = list(class_names).index('notumor')
    probabilities = check_probabilities(probabilities)
    healthy_probability = probabilities[:, healthy]
    scores = score_predictions(
        np.stack([healthy_probability, 1 - healthy_probability], axis=1),
        (labels != healthy).astype(int),
        groups,
        ('notumor', 'tumor'),
        predicted=(probabilities.argmax(axis=1) != healthy).astype(int),
        seed=seed,
    )
    tumor = {name.replace('recall', 'sensitivity'): value for name, value in scores['per_class']['tumor'].items()}
    return tumor | {name: scores[name] for name in scores if name.startswith('accuracy')}


def fit_temperature(logits, labels):
    """Finds the temperature by which logits are divided so that their softmax is most likely (Guo et al., 2017).

    Args:
      logits: float [n, classes], of images that the network did not learn from.
      labels: int [n].

    Returns:
      The temperature, a float; None without images, or without an error among them: then the sharper the likelier.
    """
    logits = np.asarray(logits, np.float64)
    if not np.all(np.isfinite(logits)):
        raise InputError('the network gives logits that are not finite: its checkpoint is of no use')
    if np.all(logits.argmax(axis=1) == labels):
        return None

    def loss(log_temperature):
        log_probabilities = special.log_softmax(logits / np.exp(log_temperature), axis=1)
        return -np.mean(log_probabilities[np.arange(len(labels)), labels])

    return float(np.exp(optimize.minimize_scalar(loss, bounds=(-5, 5), method='bounded').x))


def score_calibration(probabilities, labels):
    """Returns the `CALIBRATION_SCORES`, None each without images.

    They are the expected calibration error over bins of equal width (Guo et al., 2017) and of equal numbers of images
    (Nguyen and O'Connor, 2015), the Brier score (sum over the classes) and the negative log-likelihood, natural.
    """
    probabilities = check_probabilities(probabilities)
    if len(labels) == 0:
        return dict.fromkeys(CALIBRATION_SCORES)
    classes = range(probabilities.shape[1])
    probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)  # of float32 the sums are not 1 enough
    return {
        'ece': _expected_calibration_error(reliability(probabilities, labels)),
        'ece_equal_mass': _expected_calibration_error(reliability(probabilities, labels, equal_mass=True)),
        'brier': float(metrics.brier_score_loss(labels, probabilities, labels=classes, scale_by_half=False)),
        'negative_log_likelihood': float(metrics.log_loss(labels, probabilities, labels=classes)),
    }


def reliability(probabilities, labels, *, equal_mass=False):
    """Sorts images by their confidence, the probability of the predicted class, into `BINS` bins.

    Args:
      probabilities: float [n, classes].
      labels: int [n].
      equal_mass: whether the bins hold equal numbers of images, else they are equally wide.

    Returns:
      count, mean confidence and accuracy of the bins that hold images: three float arrays [bins].
    """
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    if equal_mass:
        bins = np.empty(len(labels), int)
        bins[np.argsort(confidence, kind='stable')] = np.arange(len(labels)) * BINS // max(1, len(labels))
    else:
        bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count, confidence, correct = (np.bincount(bins, weights, BINS) for weights in (None, confidence, correct))
    full = count > 0
    return count[full].astype(float), confidence[full] / count[full], correct[full] / count[full]


def _expected_calibration_error(bins):
    count, confidence, accuracy = bins
    return float(np.sum(count * np.abs(accuracy - confidence)) / np.sum(count))


def risk_coverage(confidence, correct):
    """Computes the share of errors among the k most confident images, for every k (El-Yaniv and Wiener, 2010).

    Args:
      confidence: float [n].
      correct: bool [n].

    Returns:
      coverage and risk, float [n] each; images of equal confidence count as if in random order.
    """
    order = np.argsort(-confidence)
    _, ties, sizes = np.unique(-confidence[order], return_inverse=True, return_counts=True)
    errors = (np.bincount(ties, ~correct[order]) / sizes)[ties] if len(order) else np.zeros(0)
    answered = np.arange(1, len(order) + 1)
    return answered / max(1, len(order)), np.cumsum(errors) / answered


def score_selection(confidence, correct):
    """Returns the area under the risk-coverage curve (Geifman et al., 2019), None without images."""
    _, risk = risk_coverage(confidence, correct)
    return float(risk.mean()) if len(risk) else None


def design_effect(correct, groups):
    """Returns how many images of these groups tell as much of an accuracy as one independent image, at least 1.

    It is the variance of the share of errors between groups over that of independent images (Kish, 1965). Without an
    error the worst is assumed: that all images of a group are right or wrong together.
    """
    _, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    error, n, count = 1 - correct.mean(), len(correct), len(sizes)
    if count < 2:
        return float(n)
    if error in (0, 1):
        return float(np.sum(sizes**2) / n)
    sums = np.bincount(members, ~correct - error)
    return float(max(1, count / (count - 1) * np.sum(sums**2) / (n * error * (1 - error))))


def find_threshold(confidence, correct, groups, wanted_error):
    """Finds the lowest confidence from which on the error stays at or below a wanted one.

    At each of the `COVERAGES` the error among the most confident images is counted, and bounded from above for new
    images at 95 % certainty: by Clopper and Pearson (1934), where `design_effect` images count as one, and with the
    certainty shared among the coverages (Bonferroni), so that to choose among them is paid for.

    Args:
      confidence: float [n], of validation images.
      correct: bool [n].
      groups: str [n].
      wanted_error: share of wrong answers among those given, in (0, 1).

    Returns:
      A dictionary: wanted_error; threshold, with coverage, error and error_bound at it, where the counted error is at
      most the wanted one; certain_threshold, where the bound is. None where nothing holds it.
    """
    found = dict.fromkeys(('threshold', 'coverage', 'error', 'error_bound', 'certain_threshold'))
    effect = design_effect(correct, groups) if len(correct) else None
    ordered = -np.sort(-confidence)
    for coverage in COVERAGES if len(correct) else ():
        threshold = ordered[int(np.ceil(coverage * len(ordered))) - 1]
        answered = confidence >= threshold
        n, errors = answered.sum() / effect, np.sum(answered & ~correct) / effect
        bound = stats.beta.ppf(1 - 0.05 / len(COVERAGES), errors + 1, n - errors) if errors < n else 1.0
        if errors / n <= wanted_error:
            values = (threshold, answered.mean(), errors / n, bound)
            found |= dict(zip(('threshold', 'coverage', 'error', 'error_bound'), map(float, values), strict=True))
        if bound <= wanted_error:
            found['certain_threshold'] = float(threshold)
    return {'wanted_error': wanted_error} | found


def score_answered(confidence, correct, threshold):
    """Returns coverage, and error with its Wilson interval, of the images at or above a threshold; None without one."""
    answered = confidence >= threshold if threshold is not None else np.zeros(len(correct), bool)
    n, errors = int(answered.sum()), int(np.sum(answered & ~correct))
    known = threshold is not None and len(correct) > 0
    return {
        'answered': n if known else None,
        'coverage': float(answered.mean()) if known else None,
        'error': errors / n if n else None,
        'error_interval': wilson_interval(errors, n),
    }


def combine_patients(probabilities, labels, patients, groups):
    """Makes one answer a patient: the mean of the log-probabilities of the patient's images, normalised again.

    Args:
      probabilities: float [n, classes], calibrated.
      labels: int [n].
      patients: str [n], '' where unknown; such images are left out.
      groups: str [n].

    Returns:
      The patients' names str [p], probabilities [p, classes], labels [p] and groups [p], of the patients whose images
      have one label; and the names of the others, a list.
    """
    known = patients != ''
    names, first, members = np.unique(patients[known], return_index=True, return_inverse=True)
    labels, groups = labels[known], groups[known]
    log_probabilities = np.log(np.maximum(probabilities[known], np.finfo(float).tiny))
    sums = np.zeros((len(names), probabilities.shape[1]))
    np.add.at(sums, members, log_probabilities)
    mixed = np.bincount(members, labels != labels[first][members], len(names)) > 0
    combined = special.softmax(sums / np.bincount(members, minlength=len(names))[:, None], axis=1)
    return names[~mixed], combined[~mixed], labels[first][~mixed], groups[first][~mixed], names[mixed].tolist()


def compare(correct, other_correct, groups, *, seed=0):
    """Compares two classifiers on the same images.

    Args:
      correct: bool [n], of the first.
      other_correct: bool [n], of the second.
      groups: str [n].
      seed: of the bootstrap.

    Returns:
      A dictionary: n, accuracy and other_accuracy, their difference (first less second) with its bootstrap interval by
      group, the counts only_this_correct and only_other_correct, and p_value of McNemar's exact test (1947), as if
      images were independent; None each without images.
    """
    n, only_this, only_other = (
        len(correct),
        int(np.sum(correct & ~other_correct)),
        int(np.sum(~correct & other_correct)),
    )
    discordant = only_this + only_other
    return {
        'n': n,
        'accuracy': float(correct.mean()) if n else None,
        'other_accuracy': float(other_correct.mean()) if n else None,
        'difference': (only_this - only_other) / n if n else None,
        'difference_interval': mean_interval(correct.astype(float) - other_correct, groups, seed=seed),
        'only_this_correct': only_this,
        'only_other_correct': only_other,
        'p_value': (float(stats.binomtest(only_this, discordant).pvalue) if discordant else 1.0) if n else None,
    }

"""The words of an evaluation: how scores are written, what a reader must know of them, the model and data card."""

PARTS = {
    'standard': 'All images of the split',
    'grouped': 'All images of the fold',
    'random': 'All images of the fold',
    'copied': 'With a copy in training',
    'seen_patient': 'Of a seen patient, no copy',
    'unseen': 'Neither copy nor patient',
}
_SHARES = (
    'accuracy',
    'precision',
    'recall',
    'specificity',
    'sensitivity',
    'coverage',
    'error',
    'error_bound',
    'difference',
)


def parts_of(metrics):
    """Returns the names of the parts that were scored, the whole first."""
    return [metrics['protocol'], 'copied', 'seen_patient', 'unseen']


def show(values, name, *, reason=''):
    """Writes a score out.

    Args:
      values: dictionary of scores.
      name: of the score.
      reason: why it may be None.

    Returns:
      Its text, and a note: its interval by group where it has one, or why it is not defined.
    """
    value, interval = values[name], values.get(f'{name}_interval_by_group', values.get(f'{name}_interval'))
    if value is None:
        return 'not defined', reason
    return _format(name, value), '' if interval is None else show_interval(name, interval)


def show_interval(name, interval):
    """Writes an interval of a score out, a pair of numbers or None."""
    if interval is None:
        return 'not defined'
    return '\u2013'.join(_format(name, value).removesuffix('\u00a0%') for value in interval)  # an en dash


def _format(name, value):
    """Returns a number as text: shares of images in per cent, after a space that does not break, others as they are."""
    return f'{100 * value:.1f}\u00a0%' if name.removeprefix('macro_') in _SHARES else f'{value:.3f}'


def why_undefined(values, name, total=None):
    """Returns why a score can be None, in a few words.

    Args:
      values: the scores of a part; or of one class in it, with `n` the number of its images.
      name: of the score.
      total: number of images of the part, where the scores are those of a class.
    """
    if total == 0 or (total is None and values['n'] == 0):
        return 'no images'
    if name.endswith('_calibrated'):
        return 'no temperature'
    if values['n'] == 0:
        return 'no image of it'
    if name == 'precision':
        return 'never predicted'
    return 'no other class'


def describe_provenance(metrics):
    """Returns the hashes of a result as one short line."""
    checkpoint, config, split = (metrics['hashes'][f'{name}_sha256'][:12] for name in ('checkpoint', 'config', 'split'))
    return f'checkpoint {checkpoint} (step {metrics["step"]}), config {config}, split {split}'


def list_caveats(metrics):
    """Returns what a reader must know to judge the scores, as sentences."""
    whole, unseen, evaluated = metrics[metrics['protocol']], metrics['unseen'], metrics['data'][metrics['split']]
    unknown = evaluated['n'] - evaluated['images_of_known_patients']
    absent = [name for name, row in whole['per_class'].items() if row['n'] == 0]
    copies = metrics['copied']['n']
    cases = [
        (
            not metrics['as_trained'],
            'The images or their split are no longer those of the training: what the parts call seen may not have been '
            'learned from, and the other way round.',
        ),
        (
            metrics['split'] == 'validation',
            'These images chose the checkpoint and fitted the temperature: their scores flatter.',
        ),
        (
            metrics['protocol'] == 'random',
            'The split is of single images: patients and copies stand on both sides, and the scores flatter.',
        ),
        (
            unknown,
            f'For {unknown:,} of the {evaluated["n"]:,} images no patient is known. Of them only copies can be found, '
            'so that some that seem unseen may be of patients in training.',
        ),
        (
            0 < unseen['n'] < 100,
            f'Only {unseen["n"]} images have neither a copy nor a known patient in training: the interval of their '
            'accuracy says more than the accuracy.',
        ),
        (
            metrics['protocol'] == 'grouped' and copies,
            f'{copies:,} images look like a copy of one in training although no group is split: the groups do not join '
            'them, or other patients look alike. The part without them is beside the whole.',
        ),
        (absent, f'No image is of {", ".join(absent)}: the scores that need one are not defined.'),
        (metrics['calibration']['note'], f'There is no temperature: {metrics["calibration"]["note"]}.'),
    ]
    return [sentence for applies, sentence in cases if applies]


def summarize(metrics):
    """Returns the main scores as a few lines for the terminal."""
    lines = [f'{"":<28}{"images":>8}{"accuracy":>12}{"95 % by group":>18}{"nearest pixels":>18}']
    for part in parts_of(metrics):
        values = metrics[part]
        accuracy, interval = show(values, 'accuracy', reason='')
        nearest, _ = show(values['nearest_pixels'], 'accuracy')
        lines.append(f'{PARTS[part]:<28}{values["n"]:>8,}{accuracy:>12}{interval:>18}{nearest:>18}')
    whole, temperature = metrics[metrics['protocol']], metrics['calibration']['temperature']
    before, after = (show(whole, name)[0] for name in ('ece', 'ece_calibrated'))
    fitted = 'no temperature' if temperature is None else f'temperature {temperature:.3f}'
    lines.append(f'Expected calibration error {before}, calibrated {after} ({fitted})')
    if metrics['out_of_distribution']:
        share = metrics['out_of_distribution']['false_alarms'][metrics['protocol']]
        wanted = metrics['out_of_distribution']['wanted_false_alarms']
        lines.append(f'Taken for no image of this kind: {100 * share:.1f} % (wanted: {100 * wanted:g} %)')
    if metrics['comparison']:
        row = metrics['comparison']['parts'][metrics['protocol']]
        difference, interval = show(row, 'difference')
        interval = interval or 'no interval'
        p_value = f"McNemar's p {row['p_value']:.3g}, {row['n']:,} images"
        lines.append(f'Less {metrics["comparison"]["workdir"]}: {difference} ({interval}), {p_value}')
    return '\n'.join(lines + [f'Note: {sentence}' for sentence in list_caveats(metrics)])


def describe_card(metrics):
    """Returns the model and data card: a list of sections, each with a title, sentences, and a table or None."""
    model = [
        f'{metrics["model"]}, mode {metrics["mode"]}, {metrics["image_size"]} px, the checkpoint of step '
        f'{metrics["step"]:,}. For an image it names one of {len(metrics["class_names"])} classes: '
        f'{", ".join(metrics["class_names"])}.',
        'It is not a medical device. It must not be used to diagnose, to treat, or to sort patients.',
    ]
    use = [
        'Research and teaching: to compare ways to train, to split data and to measure, on images like those of the '
        'data below. Nothing is known of images from other scanners, sequences, ages or diseases, and the network '
        'answers with one of its classes whatever an image shows.'
    ]
    provenance = [['What', 'Which']]
    provenance += [[name.replace('_sha256', ', SHA-256'), value or 'none'] for name, value in metrics['hashes'].items()]
    provenance += [[name, version] for name, version in metrics['versions'].items()]
    return [
        {'title': 'Model', 'text': model, 'table': None},
        {'title': 'Intended use', 'text': use, 'table': None},
        _describe_data(metrics),
        {'title': 'Split, copies and patients', 'text': _describe_split(metrics), 'table': None},
        _describe_scores(metrics),
        {'title': 'Limits', 'text': _list_limits(metrics), 'table': None},
        {'title': 'Provenance', 'text': [], 'table': provenance},
    ]


def _describe_data(metrics):
    """Returns the section that counts images, groups and patients."""
    rows = [['Split', 'Images', 'Groups', 'Known patients', *metrics['class_names']]]
    for name, counts in metrics['data'].items():
        numbers = [counts['n'], counts['groups'], counts['patients'], *counts['classes'].values()]
        rows.append([name, *(f'{number:,}' for number in numbers)])
    text = [
        f'{metrics["dataset"]} (name, variant and version of the prepared records). A group holds images that belong '
        'together: of one patient, or copies of one another.'
    ]
    return {'title': 'Data', 'text': text, 'table': rows}


def _describe_split(metrics):
    """Returns sentences on how the data were split and what stands on both sides."""
    fold = f'fold {metrics["fold"]} (from 0) of {metrics["folds"]} of all images'
    kinds = {
        'standard': 'Standard: the test images are those of the folder that they came in.',
        'grouped': f'Grouped: {fold}, no group on two sides.',
        'random': f'Random: {fold}, drawn one by one.',
    }
    copies, seen, unseen, n = (metrics[part]['n'] for part in ('copied', 'seen_patient', 'unseen', metrics['protocol']))
    return [
        f'{kinds[metrics["protocol"]]} Validation shares no group with training.',
        f'Of the {n:,} {metrics["split"]} images, {copies:,} have a copy among the images that the run learned from or '
        f'was chosen by ({metrics["copies"]["mirrored_or_turned"]:,} of them mirrored or turned), {seen:,} more are of '
        f'a patient or group seen there, and {unseen:,} are neither. A copy correlates at '
        f'{metrics["copies"]["threshold"]} or above as a thumbnail of 64x64 pixels, in any of eight orientations.',
    ]


def _describe_scores(metrics):
    """Returns the section with the main scores of every part."""
    columns = ('accuracy', 'macro_f1', 'roc_auc', 'ece_calibrated')
    rows = [['Part', 'Images', 'Accuracy', 'Macro F1', 'ROC-AUC', 'Calibration error', 'Nearest pixels']]
    for part in parts_of(metrics):
        values = metrics[part]
        cells = [show(values, name, reason=why_undefined(values, name)) for name in columns]
        cells.append(show(values['nearest_pixels'], 'accuracy', reason='no images'))
        rows.append([PARTS[part], f'{values["n"]:,}', *(f'{text} ({note})' if note else text for text, note in cells)])
    text = [
        'In brackets the 95 % interval, from resampling whole groups. Calibration error is the expected one, after '
        'temperature scaling. Nearest pixels is the accuracy of looking up the most similar training image on 32x32 '
        'pixels, without any learning: the floor that a network must leave behind.'
    ]
    return {'title': 'Scores', 'text': text, 'table': rows}


def _list_limits(metrics):
    """Returns the limits of the model and of its scores, as sentences."""
    limits = list_caveats(metrics)
    if 'notumor' in metrics['class_names']:
        limits.append(
            'Images without a tumour usually come from other sources and other sequences than those with one, as they '
            'do in the Kaggle brain tumour MRI data. A network can then tell the source instead of the disease, which '
            'no split of the same images shows. Their patients are not known: they cannot be split by patient.'
        )
    return [
        *limits,
        'Slices are judged one by one, as someone else chose and cut them; a whole scan holds many that show nothing.',
        'This is not a medical device.',
    ]

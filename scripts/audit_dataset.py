"""Audits a folder of images: copies and patients in both Training and Testing, and shortcuts that tell the class.

    python scripts/audit_dataset.py --data_dir brain-tumor-mri --output audit

Writes audit.json, groups.csv (for --config.groups) and audit.html. See `brain_jax/data/audit.py`.
"""

from absl import app, flags

from brain_jax import InputError
from brain_jax.data import audit, leakage
from brain_jax.evaluation import audit_report

_DATA_DIR = flags.DEFINE_string(
    'data_dir', None, 'Folder with Training/ and Testing/, each with one folder of images a class.', required=True
)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write to.', required=True)
_THRESHOLD = flags.DEFINE_float(
    'threshold', leakage.NEAR_COPY, 'Correlation from which images are copies.', lower_bound=0.5, upper_bound=0.9999
)
_REFERENCE = flags.DEFINE_string(
    'reference',
    None,
    'Folder of images whose patients are known: the .mat files of figshare 1512427, or images and a CSV '
    'file with the columns path and patient_id.',
)
_REFERENCE_THRESHOLD = flags.DEFINE_float(
    'reference_threshold',
    audit.SAME_SLICE,
    'Correlation from which an image is one of the reference.',
    lower_bound=0.5,
    upper_bound=0.9999,
)
_GROUPS = flags.DEFINE_string('groups', None, 'CSV file with the columns path and group or patient_id.')
_SKIP_UNREADABLE = flags.DEFINE_bool('skip_unreadable', False, 'Leave unreadable files out instead of stopping.')


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    try:
        report = audit.audit(
            _DATA_DIR.value,
            threshold=_THRESHOLD.value,
            reference_dir=_REFERENCE.value,
            reference_threshold=_REFERENCE_THRESHOLD.value,
            table=_GROUPS.value,
            skip_unreadable=_SKIP_UNREADABLE.value,
        )
        audit_report.write_audit(report, _OUTPUT.value)
    except InputError as error:
        raise SystemExit(f'error: {error}') from None
    print(audit_report.format_summary(report))
    print(f'\nSee {_OUTPUT.value}/audit.html')


if __name__ == '__main__':
    app.run(main)

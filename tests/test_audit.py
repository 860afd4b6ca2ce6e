"""Tests of the audit, on small folders with planted copies."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from brain_jax import InputError
from brain_jax.data import audit, phantom

CLASSES = ('glioma', 'notumor')


def draw(seed, size=96):
    return phantom.draw_head(np.random.default_rng(seed), phantom.CLASS_NAMES[seed % 4], size)[0]


def save(root, name, image, **options):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(root / name, **options)


def write_table(path, rows):
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder of 20 training and 10 test images, of 96x96 pixels; copies are planted among them."""
    root = tmp_path_factory.mktemp('audit') / 'data'
    for i in range(20):
        save(root, f'Training/{CLASSES[i % 2]}/{i:02}.png', draw(i))
    for i in range(10):
        save(root, f'Testing/{CLASSES[i % 2]}/{i:02}.png', draw(100 + i))
    shutil.copy(root / 'Training/glioma/00.png', root / 'Testing/glioma/00.png')  # the same bytes
    save(root, 'Testing/notumor/01.bmp', draw(1))  # the same pixels
    (root / 'Testing/notumor/01.png').unlink()
    save(root, 'Testing/glioma/02.png', draw(2)[:, ::-1])
    save(root, 'Testing/notumor/03.jpg', draw(3), quality=80)
    (root / 'Testing/notumor/03.png').unlink()
    save(root, 'Testing/glioma/04.png', np.roll(draw(4), 1, axis=1))  # only aligned
    save(root, 'Training/notumor/07.png', np.rot90(draw(6)))  # a copy of glioma/06
    return root


@pytest.fixture(scope='module')
def report(folder):
    return audit.audit(folder)


def test_copies_across(report):
    across = report['across']
    assert {name: across[name] for name in ('images', 'byte_identical', 'pixel_identical', 'aligned', 'copied')} == {
        'images': 10,
        'byte_identical': 1,
        'pixel_identical': 2,
        'aligned': 1,
        'copied': 5,
    }
    assert list(across['near']) == ['0.9', '0.95', '0.98', '0.99', '0.995', '0.999']
    assert across['near']['0.98'] == 4 and across['near_unturned']['0.98'] == 3
    assert across['near']['0.999'] >= 3
    assert across['same_patient'] is None
    assert across['neither'] == 5
    assert across['by_class']['glioma']['copied'] == 3
    assert across['by_class']['notumor']['images'] == 5


PLANTED = {
    'exact': lambda image: image,
    'resized': lambda image: np.asarray(Image.fromarray(image).resize((110, 110), Image.Resampling.BICUBIC)),
    'saved anew': lambda image: image,  # as JPEG
    'mirrored': lambda image: image[:, ::-1],
    'turned': np.rot90,
    'brighter': lambda image: np.minimum(image, 225) + 30,
    'cropped': lambda image: image[2:-2, 2:-2],
}


def test_every_kind_of_copy_is_found_and_nothing_else(tmp_path):
    for i in range(40):
        save(tmp_path, f'Training/{CLASSES[i % 2]}/{i}.png', draw(i, 160))
    planted = {}
    for i, (kind, change) in enumerate(list(PLANTED.items()) * 3):
        name = f'Testing/{CLASSES[i % 2]}/{kind} {i}.{"jpg" if kind == "saved anew" else "png"}'
        save(tmp_path, name, np.ascontiguousarray(change(draw(i, 160))))
        planted[name] = f'Training/{CLASSES[i % 2]}/{i}.png'
    for i in range(20):
        save(tmp_path, f'Testing/{CLASSES[i % 2]}/unrelated {i}.png', draw(200 + i, 160))
    report = audit.audit(tmp_path)
    assert {pair['test']: pair['training'] for pair in report['copies']} == planted
    assert (report['across']['copied'], report['across']['pixel_identical']) == (21, 3)
    assert report['within_training']['copied'] == report['within_testing']['copied'] == 0


def test_copies_within(report):
    assert report['within_training']['images'] == 20
    assert report['within_training']['near']['0.98'] == 2 and report['within_training']['near_unturned']['0.98'] == 0
    assert report['within_testing']['copied'] == 0


def test_lists_of_copies(report):
    copies = {(pair['training'], pair['test']): pair for pair in report['copies']}
    assert copies.keys() == {
        ('Training/glioma/00.png', 'Testing/glioma/00.png'),
        ('Training/notumor/01.png', 'Testing/notumor/01.bmp'),
        ('Training/glioma/02.png', 'Testing/glioma/02.png'),
        ('Training/notumor/03.png', 'Testing/notumor/03.jpg'),
        ('Training/glioma/04.png', 'Testing/glioma/04.png'),
    }
    kinds = {test: (pair['identical'], pair['aligned'], pair['orientation']) for (_, test), pair in copies.items()}
    assert kinds['Testing/notumor/01.bmp'] == (True, False, 'same')
    assert kinds['Testing/glioma/02.png'] == (False, False, 'mirrored')
    assert kinds['Testing/glioma/04.png'] == (False, True, 'same')
    (pair,) = report['different_labels']
    assert (pair['first'], pair['second']) == ('Training/glioma/06.png', 'Training/notumor/07.png')
    assert pair['orientation'] == 'turned 90' and not pair['identical']
    counts = [report[name]['different_labels'] for name in ('across', 'within_training', 'within_testing')]
    assert (pair['section'], counts) == ('within_training', [0, 1, 0])


def test_groups(report):
    group = {row['path']: row['group'] for row in report['files']}
    assert group['Training/glioma/06.png'] == group['Training/notumor/07.png']
    assert group['Training/glioma/04.png'] == group['Testing/glioma/04.png']
    groups = report['groups']
    assert (groups['count'], groups['across'], groups['test_images_across'], groups['largest']) == (24, 5, 5, 2)
    assert groups['count'] == len(set(group.values()))
    assert all(row['patient_id'] == '' for row in report['files'])


def test_report_is_json(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(report['probes']) == set(report['probes_grouped'])
    what = ' '.join(warning['what'] for warning in report['warnings'])
    assert '5 of 10 test images (50.0 %) have a copy' in what and 'No patient is known' in what


def test_patients_of_a_table(folder, tmp_path):
    rows = [
        ('path', 'patient_id', 'source_label'),
        ('Training/glioma/00.png', 'p0', 'glioma'),
        ('Training/glioma/08.png', 'p1', 'glioma'),
        ('Testing/glioma/08.png', 'p1', 'notumor'),
        ('Testing/notumor/09.png', 'p1', ''),
        ('Training/glioma/10.png', '', ''),
        ('Testing/glioma/06.png', 'nan', ''),
        ('Training/glioma/12.png', 'Unknown', ''),
        ('Training/glioma/14.png', 'nan', ''),
        ('Training/glioma/absent.png', 'p9', ''),
    ]
    report = audit.audit(folder, table=write_table(tmp_path / 'patients.csv', rows))
    assert report['across']['same_patient'] == 2
    assert report['within_testing']['same_patient'] == 2
    assert report['within_training']['same_patient'] == 0
    assert report['across']['neither'] == 3
    patients = report['patients']
    assert (patients['count'], patients['images']) == (2, 4)
    assert patients['two_labels'] == [{'patient': 'p1', 'classes': {'glioma': 2, 'notumor': 1}}]
    assert [row['path'] for row in patients['mislabelled']] == ['Testing/glioma/08.png']
    assert patients['unknown_paths'] == ['Training/glioma/absent.png']
    group = {row['path']: row['group'] for row in report['files']}
    assert group['Training/glioma/08.png'] == group['Testing/notumor/09.png'] == 'patient p1'
    assert group['Testing/glioma/00.png'] == 'patient p0'  # through its copy
    assert (
        len({group[f'{name}.png'] for name in ('Testing/glioma/06', 'Training/glioma/12', 'Training/glioma/14')}) == 3
    )
    told = {warning['what']: warning['examples'] for warning in report['warnings']}
    assert told['Paths of the table, of 9, that are not in the data: 1.'] == ['Training/glioma/absent.png']
    assert told['Patients with images of more than one class: 1.'] == ['p1 (glioma, notumor)']
    assert told['Images of another class than their source: 1.'] == ['Testing/glioma/08.png (notumor there)']


def test_groups_of_a_table(folder, tmp_path):
    rows = [('path', 'group'), ('Training/glioma/00.png', 'b'), ('Training/glioma/08.png', 'b')]
    report = audit.audit(folder, table=write_table(tmp_path / 'groups.csv', rows))
    group = {row['path']: row['group'] for row in report['files']}
    assert group['Testing/glioma/00.png'] == group['Training/glioma/08.png'] == 'b'
    assert report['across']['same_patient'] is None


def test_table_of_other_images(folder, tmp_path):
    table = write_table(tmp_path / 'groups.csv', [('path', 'group'), ('a.png', 'b')])
    with pytest.raises(InputError, match=r'names none of the images: its paths must look like Training/glioma/00\.png'):
        audit.audit(folder, table=table)


def test_large_group_and_its_links(folder, tmp_path):
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob('*/*/*'))
    near = {'Training/glioma/02.png': 'left', 'Testing/glioma/02.png': 'right'}  # mirror images of one another
    others = [name for name in names if not name.endswith(('00.png', '01.png', '01.bmp', '03.png', '03.jpg', '04.png'))]
    others = [name for name in others if name not in near and not name.endswith(('06.png', '07.png'))]
    rows = [('path', 'patient_id'), *near.items(), *((name, 'left') for name in others[:5])]
    rows += [(name, 'right') for name in others[5:8]]
    report = audit.audit(folder, table=write_table(tmp_path / 'patients.csv', rows))
    link = report['groups']['largest_link']
    assert report['groups']['largest'] == 10
    assert (link['shared'], link['name'], link['images']) == ('patient', 'left', 6)
    assert {link['pair']['first'], link['pair']['second']} == set(near)
    assert link['pair']['orientation'] == 'mirrored' and link['parts'] == [6, 4]
    (warning,) = (warning for warning in report['warnings'] if 'One group' in warning['what'])
    assert '10 images, 33.3 %' in warning['what'] and 'part of 6 images to one of 4' in warning['examples'][1]


def test_patients_of_a_reference(folder, tmp_path):
    for i, seed in enumerate((8, 9, 108)):  # Training/glioma/08, Training/notumor/09, Testing/glioma/08
        save(tmp_path, f'{i}.png', draw(seed)[:, ::-1])
    rows = [('path', 'patient_id', 'source_label'), ('0.png', 'p', 'glioma'), ('1.png', 'n/a', 'glioma')]
    write_table(tmp_path / 'patients.csv', [*rows, ('2.png', 'p', '')])
    report = audit.audit(folder, reference_dir=tmp_path)
    assert report['across']['same_patient'] == 1
    assert (report['patients']['traced'], report['patients']['count']) == (2, 1)
    assert [row['path'] for row in report['patients']['mislabelled']] == ['Training/notumor/09.png']
    patient = {row['path']: row['patient_id'] for row in report['files']}
    assert {path for path in patient if patient[path]} == {'Training/glioma/08.png', 'Testing/glioma/08.png'}


def test_threshold(folder):
    report = audit.audit(folder, threshold=0.6)
    assert list(report['across']['near'])[:2] == ['0.6', '0.9']
    assert report['across']['near']['0.6'] >= report['across']['near']['0.9'] >= 4
    assert len(report['copies']) == report['across']['copied'] > 5


def test_equal_black_images_are_copies(tmp_path):
    for i, name in enumerate(('Training/glioma', 'Training/notumor', 'Testing/glioma')):
        save(tmp_path, f'{name}/0.png', np.zeros((64, 64), np.uint8))
        save(tmp_path, f'{name}/1.png', draw(i))
    report = audit.audit(tmp_path)
    assert report['across']['near']['0.98'] == report['across']['copied'] == 1
    assert report['across']['by_class']['notumor']['images'] == 0
    assert {(pair['first'], pair['second'], pair['identical']) for pair in report['different_labels']} == {
        ('Training/glioma/0.png', 'Training/notumor/0.png', True)
    }
    assert report['groups']['count'] == 4
    assert report['probes_grouped'] is not None


def test_unreadable_files_are_listed(tmp_path):
    for name in ('Training/glioma/0.png', 'Training/notumor/0.png', 'Testing/glioma/0.png', 'Testing/notumor/0.png'):
        save(tmp_path, name, draw(0))
    (tmp_path / 'Training/glioma/a.png').write_bytes(b'no image')
    (tmp_path / 'Testing/notumor/b.png').write_bytes(b'')
    with pytest.raises(InputError, match=r'cannot read 2 of 6 image files') as error:
        audit.audit(tmp_path)
    assert 'a.png: not a JPEG' in str(error.value) and 'b.png: an empty file' in str(error.value)
    report = audit.audit(tmp_path, skip_unreadable=True)
    assert report['across']['images'] == 2 and len(report['unreadable']) == 2
    assert any(warning['what'] == 'Unreadable files that were left out: 2.' for warning in report['warnings'])
    (tmp_path / 'Testing/glioma/0.png').write_bytes(b'')
    (tmp_path / 'Testing/notumor/0.png').write_bytes(b'')
    with pytest.raises(InputError, match='in one of the two folders no image can be read'):
        audit.audit(tmp_path, skip_unreadable=True)


def test_real_images(shared, tmp_path):
    for name in ('Training/meningioma', 'Training/pituitary', 'Testing/meningioma', 'Testing/pituitary'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(shared / 'brain-tumor-mri' / name)
    report = audit.audit(tmp_path, table=shared / 'brain-tumor-mri-groups.csv')
    assert report['across']['pixel_identical'] == 106 + 5
    assert report['across']['same_patient'] == 188 + 300
    assert report['across']['near_unturned']['0.98'] < 200 < 450 < report['across']['near']['0.98']
    wrong = {row['path'].rpartition('/')[2] for row in report['patients']['mislabelled']}
    assert wrong == {'Te-piTr_0002.jpg', 'Tr-pi_0043.jpg', 'Tr-pi_0515.jpg', 'Tr-pi_0520.jpg'}
    assert len(report['different_labels']) >= 4
    assert report['probes']['nearest_pixels'] > report['probes_grouped']['nearest_pixels'] + 0.05

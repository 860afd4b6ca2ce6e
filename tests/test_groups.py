"""Tests of brain_jax.data.groups."""

import pytest

from brain_jax import InputError
from brain_jax.data import groups


def test_find_groups_joins_through_other_images():
    # d, a and b: one patient (2 and 1 are joined by the copies a, b); c and e: copies; f: alone; g, h: one patient.
    names = ['d', 'e', 'a', 'f', 'b', 'c', 'g', 'h']
    tabled = ['patient 2', '', 'patient 1', '', 'patient 2', '', '', '']
    patients = ['', '', '', '', '', '', 'p7', 'p7']
    pixels = ['1', '2', '3', '4', '3', '2', '5', '6']
    found = groups.find_groups(names, tabled, patients, pixels).tolist()
    assert found == [
        'patient 1', 'image c', 'patient 1', 'image f', 'patient 1', 'image c', 'image g', 'image g'
    ]  # fmt: skip


def test_join_table(caplog):
    row = groups.GroupRow
    table = {
        'Training/a/1': row('', 'p1', ''),
        'Training/b/2': row('', 'p1', ''),
        'Training/b/3': row('', '', ''),
        'absent': row('', 'p3', ''),
    }
    names = ['Training/a/1', 'Training/b/2', 'Training/b/3', 'Training/b/4']
    found, patients = groups.join_table(names, table, ['1', '2', '3', '4'])
    assert patients.tolist() == ['p1', 'p1', '', '']
    assert found.tolist() == ['image Training/a/1', 'image Training/a/1', 'image Training/b/3', 'image Training/b/4']
    assert '1 of 4 paths are not in the data: absent' in caplog.text
    assert '1 images are not in it' in caplog.text
    assert 'patient p1 has images of a and b' in caplog.text
    # Copies join patients.
    found, _ = groups.join_table(names, table, ['1', '2', '2', '4'])
    assert found.tolist() == ['image Training/a/1'] * 3 + ['image Training/b/4']
    with pytest.raises(InputError, match='must look like Training/a'):
        groups.join_table(['Training/a'], table, ['1'])


def test_find_mislabelled(caplog):
    row = groups.GroupRow
    table = {'1': row('', '', 'a'), '2': row('', '', 'b'), '3': row('', '', '')}
    wrong = groups.find_mislabelled(['1', '2', '3', '4'], ['a', 'a', 'a', 'a'], table)
    assert wrong.tolist() == [False, True, False, False]
    assert '2 (b there)' in caplog.text


def test_read_table(tmp_path, caplog):
    path = tmp_path / 'groups.csv'
    path.write_text('patient_id,path,other\n7,a,x\n,b,y\n7,a,z\n')
    assert groups.read_table(path) == {'a': ('', '7', ''), 'b': ('', '', '')}
    assert '1 rows stand there twice: a' in caplog.text


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (b'path,patient\na,1\n', 'columns path and group or patient_id'),
        (b'', 'columns path'),
        (b'path,group\na,1\na,2\n', "a stands there twice, in group '1' and in group '2'"),
        (b'path,group\na,1\n,2\n', 'line 3 has no path'),
        (b'path,group\n\xff,1\n', 'cannot be read'),
    ],
)
def test_bad_table(tmp_path, text, message):
    path = tmp_path / 'groups.csv'
    path.write_bytes(text)
    with pytest.raises(InputError, match=message):
        groups.read_table(path)


def test_no_table(tmp_path):
    with pytest.raises(InputError, match='cannot be read'):
        groups.read_table(tmp_path / 'none.csv')


def test_words_for_no_patient_join_nothing(tmp_path):
    path = tmp_path / 'groups.csv'
    path.write_text('path,patient_id\na,unknown\nb,NaN\nc, 7\n')
    assert [row.patient for row in groups.read_table(path).values()] == ['', '', '7']

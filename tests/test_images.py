import io
import os
import random
import struct

import numpy as np
import pytest
from PIL import Image

from brain_jax import InputError
from brain_jax.data import images

GREY = np.random.default_rng(0).integers(0, 256, (6, 9), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (6, 9, 3), np.uint8)


def encode(pixels, file_format='PNG', **options):
    """Returns an array, or a Pillow image, as the bytes of a file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def luma(colour):
    """Returns ITU-R 601 grey values, float64 [...], of RGB values [..., 3]."""
    return np.asarray(colour, np.float64) @ [0.299, 0.587, 0.114]


@pytest.mark.parametrize('file_format', ['PNG', 'BMP', 'TIFF'])
def test_grey_is_read_exactly(file_format):
    image = images.decode_image(encode(GREY, file_format))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, GREY)


@pytest.mark.parametrize(
    ('file_format', 'options', 'tolerance'),
    [('PNG', {}, 1), ('BMP', {}, 1), ('TIFF', {}, 1), ('WEBP', {'lossless': True}, 1), ('JPEG', {'quality': 95}, 4)],
)
def test_colour_becomes_luma(file_format, options, tolerance):
    ramp = np.stack(np.broadcast_arrays(np.arange(0, 240, 8)[:, None], 100, np.arange(40)), axis=-1).astype(np.uint8)
    image = images.decode_image(encode(ramp, file_format, **options))
    np.testing.assert_allclose(image, luma(ramp), atol=tolerance)


def test_extension_does_not_matter(tmp_path):
    (tmp_path / 'scan.jpg').write_bytes(encode(GREY, 'PNG'))
    np.testing.assert_array_equal(images.read_image(tmp_path / 'scan.jpg'), GREY)


def test_palette():
    image = Image.fromarray(GREY % 3).convert('P')
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    expected = luma(np.eye(3) * 255)[GREY % 3]
    np.testing.assert_allclose(images.decode_image(encode(image)), expected, atol=1)


def test_palette_with_transparent_colour():
    image = Image.fromarray(GREY % 2).convert('P')
    image.putpalette([200, 200, 200, 90, 90, 90])
    expected = np.where(GREY % 2, 90, 0)
    np.testing.assert_array_equal(images.decode_image(encode(image, transparency=0)), expected)


def test_transparency_lies_on_black():
    alpha = np.broadcast_to(np.linspace(0, 255, 9).astype(np.uint8), GREY.shape)
    expected = GREY * (alpha / 255)
    for pixels in (np.stack([GREY, alpha], -1), np.stack([GREY, GREY, GREY, alpha], -1)):
        np.testing.assert_allclose(images.decode_image(encode(pixels)), expected, atol=1)


def test_cmyk():
    cmyk = np.concatenate([COLOUR, np.full((*GREY.shape, 1), 50, np.uint8)], axis=-1)
    image = images.decode_image(encode(Image.fromarray(cmyk, 'CMYK'), 'TIFF'))
    np.testing.assert_allclose(image, luma((255.0 - COLOUR) * (255 - 50) / 255), atol=2)


def test_one_bit():
    image = Image.fromarray(GREY > 127)
    assert image.mode == '1'
    np.testing.assert_array_equal(images.decode_image(encode(image)), np.where(GREY > 127, 255, 0))


@pytest.mark.parametrize(('bits', 'shift'), [(16, 8), (12, 4), (10, 2), (8, 0), (5, 0)])
@pytest.mark.parametrize(('file_format', 'dtype'), [('PNG', '<u2'), ('TIFF', '<u2'), ('TIFF', '>u2'), ('TIFF', '<i4')])
def test_16_bit_container_is_scaled_by_the_depth_in_use(file_format, dtype, bits, shift):
    pixels = np.array([[0, 1, 2**bits // 3], [2**bits // 2, 2**bits - 2, 2**bits - 1]], dtype)
    np.testing.assert_array_equal(images.decode_image(encode(pixels, file_format)), pixels // 2**shift)


def test_16_bit_tiff_in_which_white_is_zero():
    pixels = np.array([[0, 256, 65535]], '<u2')
    exif = Image.Exif()
    exif[0x0106], exif[0x0112] = 0, 3  # white is zero; turned by half
    found = images.decode_image(encode(Image.fromarray(pixels), 'TIFF', exif=exif.tobytes()))
    np.testing.assert_array_equal(found, [[0, 254, 255]])


def test_16_bit_png_with_a_transparent_grey():
    pixels = np.array([[65535, 256, 512]], '<u2')
    np.testing.assert_array_equal(images.decode_image(encode(pixels, transparency=65535)), [[0, 64, 128]])  # 10 bits


def test_8_bit_grey_is_never_stretched():
    np.testing.assert_array_equal(images.decode_image(encode(GREY // 16)), GREY // 16)


@pytest.mark.parametrize('pixels', [np.float32([[0, 0.5]]), np.int32([[-1, 5]]), np.int32([[0, 70000]])])
def test_pixels_without_a_known_range_are_refused(pixels):
    with pytest.raises(InputError, match=r'image: (floating-point|pixels outside)'):
        images.decode_image(encode(pixels, 'TIFF'))


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'TIFF', 'WEBP'])
@pytest.mark.parametrize(
    ('orientation', 'upright'),
    [
        (1, lambda x: x),
        (2, np.fliplr),
        (3, lambda x: np.rot90(x, 2)),
        (4, np.flipud),
        (5, np.transpose),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x, 2).T),
        (8, np.rot90),
    ],
)
def test_exif_orientation(file_format, orientation, upright):
    stored = np.full((16, 32), 40, np.uint8)
    stored[:8, :8] = 220  # one corner is bright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = images.decode_image(encode(stored, file_format, exif=exif.tobytes()))
    np.testing.assert_allclose(image, upright(stored), atol=8)


@pytest.mark.parametrize('exif', [b'', b'junk', b'II*\0\xff\xff\xff\xff', b'MM\0*\0\0\0\x08\0\x09'])
def test_damaged_exif_is_no_obstacle(exif):
    data = encode(GREY, 'JPEG', quality=100, exif=b'Exif\0\0' + exif)
    np.testing.assert_allclose(images.decode_image(data), GREY, atol=4)


def test_first_of_several_frames():
    other = Image.fromarray(255 - GREY)
    for file_format in ('PNG', 'TIFF'):
        data = encode(GREY, file_format, save_all=True, append_images=[other])
        np.testing.assert_array_equal(images.decode_image(data), GREY)


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'BMP', 'TIFF', 'WEBP'])
def test_truncated(file_format):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(pixels, file_format)
    images.decode_image(data)
    for length in (len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(InputError, match=r'^scan: '):
            images.decode_image(data[:length], name='scan')


@pytest.mark.parametrize('data', [b'', b'not an image', b'\xff\xd8\xff', b'GIF89a' + bytes(50), b'%PDF-1.4'])
def test_no_image(tmp_path, data):
    path = tmp_path / 'scan.jpg'
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        images.read_image(path)
    message = str(error.value)
    assert message.startswith(f'{path}: ') and '\n' not in message and 'BytesIO' not in message


def test_gif_is_not_read():
    with pytest.raises(InputError, match='not a JPEG, PNG, BMP, TIFF or WebP image'):
        images.decode_image(encode(GREY, 'GIF'))


@pytest.mark.parametrize(('width', 'height'), [(20_000, 20_000), (10_000, 10_000), (5_793, 5_793), (20_000, 10)])
def test_decompression_bomb_is_refused_by_its_header(width, height):
    data = bytearray(encode(GREY, 'BMP'))
    data[18:26] = struct.pack('<ii', width, height)
    with pytest.raises(InputError, match=r'larger than 32 megapixels|a side longer than 16384 pixels'):
        images.decode_image(bytes(data))


def test_not_a_file(tmp_path):
    os.mkfifo(tmp_path / 'pipe')  # reading it would wait for ever
    for name in ('absent', '.', 'pipe'):
        with pytest.raises(InputError, match='not a file'):
            images.read_image(tmp_path / name)


def test_large_file_is_not_read(tmp_path):
    with open(tmp_path / 'large.tif', 'wb') as file:
        file.truncate(2**26 + 1)
    with pytest.raises(InputError, match='larger than 64 MiB'):
        images.read_image(tmp_path / 'large.tif')


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'BMP', 'TIFF', 'WEBP'])
def test_damaged_bytes_give_an_image_or_one_line(file_format):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(np.tile(COLOUR, (4, 4, 1)), file_format, **({} if file_format == 'BMP' else {'exif': exif.tobytes()}))
    rng = random.Random(0)
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(min(len(data), 200))] = rng.randrange(256)
        try:
            assert images.decode_image(bytes(damaged)).ndim == 2
        except InputError as error:
            assert '\n' not in str(error)


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'BMP', 'TIFF', 'WEBP'])
def test_header(file_format):
    assert images.read_header(encode(COLOUR, file_format)) == (9, 6, 3, file_format)
    if file_format != 'WEBP':  # which knows no grey
        assert images.read_header(encode(GREY, file_format)) == (9, 6, 1, file_format)
    with pytest.raises(InputError, match=r'^scan: not a JPEG'):
        images.read_header(encode(GREY, file_format)[:7], name='scan')


def test_png_keeps_every_pixel():
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(images.encode_png(GREY)))), GREY)


def test_square_of_the_right_size_is_left_alone():
    np.testing.assert_array_equal(images.pad_and_resize(GREY[:, :6], 6), GREY[:, :6])


def test_padding_is_black_and_centred():
    np.testing.assert_array_equal(images.pad_and_resize(GREY, 9), np.pad(GREY, ((1, 2), (0, 0))))
    np.testing.assert_array_equal(images.pad_and_resize(GREY.T, 9), np.pad(GREY.T, ((0, 0), (1, 2))))


def test_shrinking_averages_and_does_not_alias():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 200
    np.testing.assert_allclose(images.pad_and_resize(stripes, 16)[:, 1:-1], 100, atol=2)


def test_enlarging_is_linear_between_pixel_centres():
    enlarged = images.pad_and_resize(np.tile(np.uint8([[0, 100]]), (2, 1)), 4)
    np.testing.assert_array_equal(enlarged, np.tile([0, 25, 75, 100], (4, 1)))


def test_real_images_agree_with_an_independent_decoder(shared):
    tf = pytest.importorskip('tensorflow')
    for path in sorted((shared / 'brain-tumor-mri' / 'Testing').glob('*/*.jpg'))[::100]:
        expected = tf.io.decode_jpeg(path.read_bytes(), dct_method='INTEGER_ACCURATE').numpy()
        expected = luma(expected) if expected.shape[-1] == 3 else expected[..., 0]
        np.testing.assert_allclose(images.read_image(path), expected, atol=1)

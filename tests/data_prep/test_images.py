import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.images import UnreadableImage, decode_image
from tests.data_prep.pictures import picture

LIMIT = 10**6


def decode(path):
    image = decode_image(path, LIMIT)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_a_whole_image_decodes(tmp_path, name):
    picture(40, 60).save(tmp_path / name)
    assert np.abs(decode(tmp_path / name) - np.asarray(picture(40, 60))).mean() < 8


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.95])
def test_a_truncated_image_is_refused(tmp_path, name, share):
    path = tmp_path / name
    picture(64, 64).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UnreadableImage):
        decode(path)


def test_a_png_with_a_flipped_bit_anywhere_is_refused_or_whole(tmp_path):
    path = tmp_path / "a.png"
    picture(24, 24).save(path)
    data, whole = path.read_bytes(), np.asarray(picture(24, 24))
    for position in range(8, len(data), 13):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(decode(path), whole)
        except UnreadableImage:
            continue


def test_a_file_that_is_no_image_is_refused_without_its_path_in_the_reason(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_text("not a picture")
    with pytest.raises(UnreadableImage, match="not a JPEG, PNG or WebP file"):
        decode(path)


def test_other_formats_are_refused_whatever_their_suffix(tmp_path):
    picture(8, 8).save(tmp_path / "a.png", format="TIFF")
    with pytest.raises(UnreadableImage, match="not a JPEG, PNG or WebP file"):
        decode(tmp_path / "a.png")


def test_the_suffix_does_not_matter_for_known_formats(tmp_path):
    picture(8, 8).save(tmp_path / "a.jpg", format="PNG")
    np.testing.assert_array_equal(decode(tmp_path / "a.jpg"), np.asarray(picture(8, 8)))


@pytest.mark.parametrize(("height", "width"), [(1001, 1000), (10**4, 10**5), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, height, width):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, pixels)]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(UnreadableImage, match=r"max_input_pixels=1000000|decompression bomb"):
        decode(tmp_path / "bomb.png")


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90° clockwise to view
    picture(40, 60).save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = decode(tmp_path / "a.jpg")
    assert upright.shape == (60, 40, 3)
    expected = np.asarray(picture(40, 60).rotate(-90, expand=True)).astype(int)
    assert np.abs(upright - expected).mean() < 4


def test_transparent_parts_become_white(tmp_path):
    image = picture(8, 8).convert("RGBA")
    image.putpixel((0, 0), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    image.save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png")[0, :2].tolist() == [[255, 255, 255], [10, 20, 30]]
    image.convert("LA").save(tmp_path / "grey.png")
    assert decode(tmp_path / "grey.png")[0, 0].tolist() == [255, 255, 255]


def test_a_palette_with_a_transparent_colour_becomes_white_there(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    assert decode(tmp_path / "a.png")[0, :2].tolist() == [[255, 255, 255], [0, 255, 0]]


def test_16_bits_of_grey_are_scaled_and_not_clipped(tmp_path):
    levels = np.array([[0, 257, 32896], [65535, 256 * 100, 65278]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    expected = np.rint(levels / 257).astype(int)
    assert decode(tmp_path / "a.png").tolist() == np.repeat(expected[..., None], 3, axis=-1).tolist()


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "P"])
def test_other_modes_become_rgb(tmp_path, mode):
    image = picture(32, 32).convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(decode(path) - expected).mean() < 6


def test_contents_are_decoded_like_files(tmp_path):
    picture(40, 60).save(tmp_path / "a.png")
    contents = (tmp_path / "a.png").read_bytes()
    assert (np.asarray(decode_image(contents, LIMIT)) == np.asarray(picture(40, 60))).all()
    with pytest.raises(UnreadableImage):
        decode_image(contents[:-20], LIMIT)
    with pytest.raises(UnreadableImage, match="not a JPEG"):
        decode_image(b"text", LIMIT)

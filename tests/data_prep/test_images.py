import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
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


JPEGS = [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"mode": "L"}, {"mode": "CMYK"}]


def jpeg(mode="RGB", **options):
    picture(64, 96).convert(mode).save(buffer := io.BytesIO(), "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", JPEGS)
def test_a_jpeg_whose_scan_ends_early_is_refused_though_it_has_an_end_mark(options):
    data = jpeg(**options)
    scan = data.rindex(b"\xff\xda") + 16
    for share in (0.02, 0.5, 0.9):
        cut = data[: scan + int(share * (len(data) - 2 - scan))].rstrip(b"\xff") + b"\xff\xd9"
        Image.open(io.BytesIO(cut)).load()  # Pillow fills it up with grey
        with pytest.raises(UnreadableImage, match="premature end of data segment"):
            decode_image(cut, LIMIT)


@pytest.mark.parametrize("options", JPEGS)
def test_a_jpeg_that_ends_in_zeros_is_refused(options):
    data = jpeg(**options, exif=b"Exif\0\0 a thumbnail \xff\xd8\xff\xd9")
    with pytest.raises(UnreadableImage, match="without an end"):
        decode_image(data[:-300] + bytes(300), LIMIT)


@pytest.mark.parametrize("options", JPEGS)
def test_whole_jpegs_are_decoded_as_pillow_does_whatever_follows_their_end(options):
    data = jpeg(**options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for behind in (b"", b"garbage", b"\xff\xda\xff\xd8", bytes(5000)):
        np.testing.assert_array_equal(decode_image(data + behind, LIMIT), expected)
    np.testing.assert_array_equal(decode_image(data[:-2] + b"xyz\xff\xd9", LIMIT), expected)


def test_headers_that_libjpeg_only_warns_of_are_no_reason_to_refuse_an_image():
    data = jpeg()
    revised = data.replace(b"JFIF\0\1", b"JFIF\0\7")
    assert revised != data
    np.testing.assert_array_equal(decode_image(revised, LIMIT), decode_image(data, LIMIT))


def test_a_jpeg_with_two_sizes_is_refused():
    data = jpeg()
    frame = data.index(b"\xff\xc0")
    length = 2 + int.from_bytes(data[frame + 2 : frame + 4], "big")
    larger = data[frame : frame + 5] + struct.pack(">HH", 60000, 60000) + data[frame + 9 : frame + length]
    with pytest.raises(UnreadableImage):
        decode_image(data[:frame] + larger + data[frame:], LIMIT)


def without_adobe_mark(data):
    """Without APP14."""
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


def test_cmyk_is_read_with_full_ink_as_0_if_adobe_wrote_it_and_as_255_if_not():
    expected = np.asarray(picture(64, 96).convert("CMYK").convert("RGB")).astype(int)
    adobe = jpeg("CMYK", quality=95)
    assert b"Adobe" in adobe
    assert np.abs(np.asarray(decode_image(adobe, LIMIT)) - expected).mean() < 4
    inverted = Image.fromarray(255 - np.asarray(picture(64, 96).convert("CMYK")), "CMYK")
    inverted.save(buffer := io.BytesIO(), "JPEG", quality=95)
    plain = without_adobe_mark(buffer.getvalue())
    assert np.abs(np.asarray(decode_image(plain, LIMIT)) - expected).mean() < 4


def test_ycck_is_read_as_adobe_writes_it():
    cmyk = np.asarray(picture(64, 96).convert("CMYK"))
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(255 - cmyk), 95, "CMYK", "444")
    assert Image.open(io.BytesIO(data)).info["adobe_transform"] == 2
    expected = np.asarray(Image.fromarray(cmyk, "CMYK").convert("RGB")).astype(int)
    assert np.abs(np.asarray(decode_image(data, LIMIT)) - expected).mean() < 4


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(height, width, depth, colour, pixels, *chunks):
    """A PNG file; `pixels` are the contents of IDAT."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_a_png_with_too_few_pixels_is_refused_though_its_chunks_are_whole():
    rows = b"".join(b"\0" + bytes(range(30)) for _ in range(10))
    assert decode_image(png(10, 10, 8, 2, zlib.compress(rows)), LIMIT).size == (10, 10)
    for pixels in (zlib.compress(rows[:200]), zlib.compress(rows)[:-8]):
        with pytest.raises(UnreadableImage, match="truncated"):
            decode_image(png(10, 10, 8, 2, pixels), LIMIT)


def test_a_png_whose_text_unpacks_to_gigabytes_is_refused():
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20)))
    with pytest.raises(UnreadableImage, match="too large"):
        decode_image(png(1, 1, 8, 2, zlib.compress(bytes(4)), bomb), LIMIT)


def test_16_bits_of_each_colour_are_scaled(tmp_path):
    levels = np.array([[[0, 257, 32896], [65535, 256 * 100, 65278]]], ">u2")
    (tmp_path / "a.png").write_bytes(png(1, 2, 16, 2, zlib.compress(b"\0" + levels.tobytes())))
    assert np.abs(decode(tmp_path / "a.png") - levels / 257).max() <= 1


def test_16_bits_with_transparency_are_put_over_white(tmp_path):
    levels = np.array([[32896, 0], [32896, 65535]], ">u2")
    (tmp_path / "a.png").write_bytes(png(1, 2, 16, 4, zlib.compress(b"\0" + levels.tobytes())))
    assert decode(tmp_path / "a.png").tolist() == [[[255] * 3, [128] * 3]]


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, name):
    frames = [picture(32, 48, seed) for seed in range(3)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(decode(tmp_path / name), np.asarray(frames[0]))


def webp_with_its_lengths_corrected(data):
    data = bytearray(data)
    data[4:8] = struct.pack("<I", len(data) - 8)
    data[16:20] = struct.pack("<I", len(data) - 20)
    return bytes(data)


@pytest.mark.parametrize("lossless", [False, True])
def test_a_webp_that_was_cut_is_refused_though_its_lengths_say_that_it_was_not(lossless):
    picture(64, 64).save(buffer := io.BytesIO(), "WEBP", lossless=lossless)
    data = buffer.getvalue()
    assert decode_image(webp_with_its_lengths_corrected(data), LIMIT).size == (64, 64)
    for share in (0.3, 0.9):
        with pytest.raises(UnreadableImage):
            decode_image(webp_with_its_lengths_corrected(data[: int(share * len(data)) // 2 * 2]), LIMIT)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"garbage"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_data_that_cannot_be_read_are_passed_over(exif):
    np.testing.assert_array_equal(decode_image(jpeg(exif=exif), LIMIT), decode_image(jpeg(), LIMIT))


@pytest.mark.parametrize(("height", "width"), [(1001, 1000), (10**4, 10**5), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, height, width):
    (tmp_path / "bomb.png").write_bytes(png(height, width, 8, 2, zlib.compress(bytes(1000))))
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

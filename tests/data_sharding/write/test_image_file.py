"""Image files of every kind: their pixels by hand or by another library; what cannot be read right has a reason."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_sharding.write.image_file import UnreadableImage, decode, load_rgb
from tests.support.pictures import file_of, noise


def test_exif_rotation_is_applied():
    image = noise(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise
    turned = load_rgb(file_of(image, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


def test_every_mode_becomes_rgb():
    gray = Image.linear_gradient("L")
    for image, kind in (
        (gray, "PNG"),
        (gray.convert("1"), "PNG"),
        (gray.convert("LA"), "PNG"),
        (noise(16, 16).convert("P"), "PNG"),
        (noise(16, 16).convert("RGBA"), "PNG"),
        (noise(16, 16).convert("CMYK"), "JPEG"),
        (noise(16, 16).convert("YCbCr"), "JPEG"),
    ):
        assert load_rgb(file_of(image, kind)).mode == "RGB", image.mode
    cyan = load_rgb(file_of(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG")).getpixel((3, 3))
    assert cyan[0] < 10 and min(cyan[1:]) > 245  # not inverted
    deep = Image.fromarray(np.full((16, 16), 0x8000, np.uint16))
    assert load_rgb(file_of(deep, "PNG")).getpixel((3, 3)) == (128, 128, 128)  # scaled, not clipped to white
    clear = load_rgb(file_of(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "PNG"))
    assert clear.getpixel((3, 3)) == (255, 255, 255)  # not the black that transparency hides


def test_damaged_bytes_have_a_reason_that_is_always_the_same():
    """The reason is stored, so it must not hold the address of an object."""
    whole = file_of(noise(64, 64), "JPEG")
    for data in (b"", b"text", whole[:200], whole[: len(whole) // 2], file_of(noise(64, 64), "PNG")[:3000]):
        reasons = set()
        for _ in range(2):
            with pytest.raises(UnreadableImage) as error:
                load_rgb(bytes(bytearray(data)))
            reasons.add(str(error.value))
        assert len(reasons) == 1 and "0x" not in reasons.pop()


def grey(data: bytes) -> list[int]:
    """The first row of a grey image."""
    pixels = np.asarray(load_rgb(data))
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[0, :, 0].tolist()


@pytest.mark.parametrize("most", [1, 15, 255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
def test_netpbm_is_scaled_by_its_declared_maximum(kind, most):
    values = [0, most // 3, most // 2, most]
    repeated = [value for value in values for _ in range(1 if kind in ("P2", "P5") else 3)]
    if kind in ("P2", "P3"):
        body = " ".join(map(str, repeated)).encode()
    else:
        body = b"".join(value.to_bytes(1 if most < 256 else 2, "big") for value in repeated)
    found = grey(f"{kind}\n4 1\n{most}\n".encode() + body)
    assert found[0] == 0 and found[3] == 255
    assert found == pytest.approx([value / most * 255 for value in values], abs=1)


def tiff(bits: int, photometric: int, body: bytes, width: int = 4, **tags: int) -> bytes:
    """A little-endian TIFF of one row, uncompressed."""
    entries = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 1, 279: len(body)}
    entries |= {int(tag[1:]): value for tag, value in tags.items()}
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + bytes(4) + body


DEEP = struct.pack("<4H", 0, 0x4000, 0x8000, 0xFFFF)


def test_tiffs_of_more_than_8_bits_are_scaled():
    assert grey(tiff(16, 1, DEEP)) == [0, 64, 128, 255]
    assert grey(tiff(16, 0, DEEP)) == [255, 191, 127, 0]  # photometric 0: white is zero
    assert grey(tiff(12, 1, bytes([0x00, 0x04, 0x00, 0x80, 0x0F, 0xFF]))) == [0, 64, 128, 255]  # 000 400 800 FFF


def test_a_tiff_is_scaled_by_the_depth_that_it_declares():
    twelve = struct.pack("<4H", 0, 0x400, 0x800, 0xFFF)
    assert grey(tiff(16, 1, twelve, t281=4095)) == [0, 64, 128, 255]
    assert grey(tiff(16, 0, twelve, t281=4095)) == [255, 191, 127, 0]
    assert grey(tiff(16, 1, struct.pack("<4H", 0, 7, 21, 63), t281=63)) == [0, 28, 85, 255]
    assert grey(tiff(8, 1, bytes([0, 7, 21, 63]), t281=63)) == [0, 28, 85, 255]
    assert grey(tiff(8, 1, bytes([0, 64, 128, 255]), t281=255)) == [0, 64, 128, 255]


def test_the_brightest_pixel_is_no_depth_and_a_wrong_one_is_none():
    """By TIFF's own definition the maximum is a statistic."""
    assert grey(tiff(16, 1, DEEP, t281=60000)) == grey(tiff(16, 1, DEEP, t281=4095)) == [0, 64, 128, 255]
    assert grey(tiff(8, 1, bytes([0, 64, 128, 200]), t281=200)) == [0, 64, 128, 200]
    assert grey(tiff(8, 1, bytes([0, 64, 128, 200]), t281=63)) == [0, 64, 128, 200]


def bmp(*pixels: tuple[int, int, int, int]) -> bytes:
    """A row of 32-bit pixels (red, green, blue, alpha), with a header that declares the alpha."""
    body = b"".join(bytes([blue, green, red, alpha]) for red, green, blue, alpha in pixels)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, len(pixels), 1, 1, 32, 3, len(body), 2835, 2835, 0, 0) + masks + bytes(52)
    return b"BM" + struct.pack("<IHHI", 14 + 108 + len(body), 0, 0, 14 + 108) + header + body


def test_a_bitmap_without_any_opacity_is_opaque():
    """Screenshots of Windows: the fourth byte is not set. One that is set somewhere is meant."""
    assert np.asarray(load_rgb(bmp((9, 80, 200, 0), (0, 0, 0, 0)))).tolist() == [[[9, 80, 200], [0, 0, 0]]]
    assert np.asarray(load_rgb(bmp((9, 80, 200, 255), (0, 0, 0, 0)))).tolist() == [[[9, 80, 200], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(16, 2, bytes(24), t277=3, t281=4095), "its 16-bit colours end at 4095, which is not supported"),
        (tiff(16, 2, bytes(24), t277=3, t281=63), "its 16-bit colours end at 63, which is not supported"),
        (tiff(32, 1, struct.pack("<4I", 0, 255, 256, 1 << 31)), "32-bit integers, of which no value is declared"),
        (tiff(32, 1, struct.pack("<4f", 0, 0.5, 1, 255), t339=3), "floating-point numbers, of which no value"),
        (tiff(32, 0, struct.pack("<4f", 0, 0.5, 1, 255), t339=3), "floating-point numbers, of which no value"),
        (tiff(32, 1, struct.pack("<4i", 0, -1, 1, 255), t339=2), "signed integers, of which no value is declared"),
        (tiff(16, 1, struct.pack("<4h", 0, -1, 1, 255), t339=2), "signed integers, of which no value is declared"),
        (tiff(8, 1, bytes(4), t339=2), "signed integers, of which no value is declared"),
        (b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0, 1), "floating-point numbers, of which no value"),
    ],
)
def test_numbers_without_a_declared_white_are_left_out(data, reason):
    with pytest.raises(UnreadableImage, match=reason):
        load_rgb(data)


@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_deep_colours_in_a_tiff_are_right_or_left_out(planes, compression):
    """Pillow reads 16-bit channels in separate planes, uncompressed, as noise; tifffile wrote what is expected."""
    tifffile = pytest.importorskip("tifffile")
    picture = np.asarray(noise(8, 12))
    buffer = io.BytesIO()
    channels = picture if planes == "contig" else picture.transpose(2, 0, 1)
    options = {"planarconfig": planes, "compression": compression}
    tifffile.imwrite(buffer, channels.astype(np.uint16) * 257, photometric="rgb", **options)
    if planes == "separate" and compression is None:
        with pytest.raises(UnreadableImage, match="separate planes"):
            load_rgb(buffer.getvalue())
    else:
        np.testing.assert_array_equal(np.asarray(load_rgb(buffer.getvalue())), picture)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_transparency_of_a_16_bit_png_is_white():
    pixels = zlib.compress(b"\0" + struct.pack(">4H", 0, 0x4000, 0x8000, 0xFFFF))
    header = struct.pack(">IIBBBBB", 4, 1, 16, 0, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"tRNS", struct.pack(">H", 0x4000)), chunk(b"IDAT", pixels)]
    assert grey(b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")) == [0, 255, 128, 255]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n0 0 9 9 rectfill\nshowpage\n%%EOF\n"


def test_a_format_without_a_suffix_is_not_decoded(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript; a file of any name may hold it."""
    ghostscript, started = tmp_path / "gs", tmp_path / "started"
    ghostscript.write_text(f"#!/bin/sh\necho GPL Ghostscript > {started}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    icon, targa = file_of(noise(16, 16), "ICO"), file_of(noise(16, 16), "TGA")
    for data in (EPS, icon, targa, file_of(noise(16, 16), "PCX"), file_of(noise(16, 16), "JPEG2000")):
        with pytest.raises(UnreadableImage, match="not an image of a known format"):
            load_rgb(data)
    assert not started.exists()


def test_of_several_frames_the_first_is_read_and_the_rest_is_told():
    first, second = noise(16, 16), noise(16, 16, 1)
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        alone, several = (
            decode(file_of(first, kind, **options, **more))
            for more in ({}, {"save_all": True, "append_images": [second]})
        )
        assert (alone.first_of_several, several.first_of_several) == (False, True), kind
        np.testing.assert_array_equal(np.asarray(several.image), np.asarray(alone.image))
    phone = decode(file_of(first, "MPO", save_all=True, append_images=[second]))  # the second is a preview
    assert phone.image.size == (16, 16) and not phone.first_of_several
    broken = file_of(first, "GIF", save_all=True, append_images=[second])
    assert decode(broken[:-40]).image.size == (16, 16)

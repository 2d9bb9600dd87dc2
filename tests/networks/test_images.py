"""Image files are read as a viewer shows them, and every error names the file."""

import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("PIL")

from PIL import Image, ImageCms, TiffImagePlugin, features

from attnkern.training.images import ImageError, read_image, stored

#: 16-bit grey values from black to white.
RAMP = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(4, 0)
SHARES = RAMP[0] / 65535


def read(path):
    return read_image(path).permute(1, 2, 0).numpy()


def write_png(path, pixels, colour, *chunks):
    """Write a PNG file without Pillow, which writes neither 16-bit colour nor gamma."""
    rows = b"".join(b"\0" + row.astype(f">u{pixels.itemsize}").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8 * pixels.itemsize, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    framed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))


@pytest.mark.parametrize(
    "name, pixels",
    [
        ("16-bit.png", RAMP),
        ("16-bit.tif", RAMP),
        ("16-bit.pgm", RAMP.astype(np.int32)),
        ("big-endian.tif", RAMP.astype(">u2")),
        ("32-bit.tif", RAMP.astype(np.int32)),
        ("float.tif", SHARES.astype(np.float32)[None].repeat(4, 0)),
        ("float.pfm", SHARES.astype(np.float32)[None].repeat(4, 0)),
        # Values outside the usual range are scaled from their minimum to their maximum.
        ("signed.tif", RAMP.astype(np.int32) - 30_000),
        ("wide.tif", 30_000 * RAMP.astype(np.int32)),
        ("of 255.tif", 255 * SHARES.astype(np.float32)[None].repeat(4, 0)),
    ],
)
def test_high_bit_depth_grey_images(name, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / name)
    found = read(tmp_path / name)
    assert found.shape == (4, 64, 3)
    assert found.dtype == np.uint8
    assert np.abs(found / 255 - SHARES[None, :, None]).max() <= 0.5 / 255 + 1e-6


def patched(path, tag, old, new):
    """Overwrite the value of a SHORT (3) or LONG (4) tag in a little-endian TIFF file."""
    content = path.read_bytes()
    for kind in (3, 4):
        entry = struct.pack("<HHII", tag, kind, 1, old)
        if entry in content:
            path.write_bytes(content.replace(entry, struct.pack("<HHII", tag, kind, 1, new)))
            return
    raise AssertionError(f"tag {tag} is not {old}")


def test_high_bit_depth_tiff_tags(tmp_path):
    path = tmp_path / "white is zero.tif"
    Image.fromarray(RAMP).save(path)
    patched(path, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1, 0)
    assert np.abs(read(path)[0, :, 0] / 255 - (1 - SHARES)).max() < 0.003
    path = tmp_path / "unsigned.tif"
    Image.fromarray(np.array([[0, 2**30, -(2**31), -1]], np.int32)).save(path)
    patched(path, TiffImagePlugin.SAMPLEFORMAT, 2, 1)
    assert read(path)[0, :, 0].tolist() == [0, 64, 128, 255]
    path = tmp_path / "infinite.tif"
    Image.fromarray(np.array([[np.nan, 0, 0.2, np.inf, -np.inf]], np.float32)).save(path)
    assert read(path)[0, :, 0].tolist() == [0, 0, 51, 255, 0]
    path = tmp_path / "12 bits.tif"
    Image.fromarray(np.array([[0xFF, 0xFF, 0x00]], np.uint8)).save(path)  # two 12-bit values in three bytes
    patched(path, TiffImagePlugin.BITSPERSAMPLE, 8, 12)
    patched(path, TiffImagePlugin.IMAGEWIDTH, 3, 2)
    assert read(path)[0, :, 0].tolist() == [255, 239]


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("1", 255, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("LA", (77, 0), (255, 255, 255)),
        ("RGB", (200, 100, 50), (200, 100, 50)),
        ("RGBA", (200, 100, 50, 255), (200, 100, 50)),
        ("RGBA", (200, 100, 50, 128), (227, 177, 152)),  # blended half and half with white
        ("RGBA", (200, 100, 50, 0), (255, 255, 255)),
        ("CMYK", (55, 155, 205, 0), (200, 100, 50)),
        ("YCbCr", (124, 86, 182), (200, 100, 50)),
        ("LAB", (138, 166, 174), (200, 100, 50)),
    ],
)
def test_modes(mode, colour, expected, tmp_path):
    Image.new(mode, (2, 3), colour).save(tmp_path / "image.tif")
    with Image.open(tmp_path / "image.tif") as picture:
        assert picture.mode == mode
    found = read(tmp_path / "image.tif").astype(int)
    assert found.shape == (3, 2, 3)
    assert np.abs(found - expected).max() <= 2


def test_premultiplied_alpha(tmp_path):
    for mode, colour, expected in (("LA", (50, 128), (177, 177, 177)), ("RGBA", (100, 50, 25, 128), (227, 177, 152))):
        Image.new(mode, (2, 3), colour).save(tmp_path / "image.tif")
        patched(tmp_path / "image.tif", TiffImagePlugin.EXTRASAMPLES, 2, 1)
        assert np.abs(read(tmp_path / "image.tif").astype(int) - expected).max() <= 2


@pytest.mark.parametrize(
    "colour, pixel, expected, chunk",
    [
        (0, [51400], (200, 200, 200), ()),
        (0, [51400], (255, 255, 255), (b"tRNS", struct.pack(">H", 51400))),
        (2, [51400, 25700, 12850], (200, 100, 50), ()),
        (4, [51400, 32896], (227, 227, 227), ()),
        (6, [51400, 25700, 12850, 32896], (227, 177, 152), ()),
    ],
)
def test_16_bit_png(colour, pixel, expected, chunk, tmp_path):
    pixels = np.full((2, 2, len(pixel)), pixel, np.uint16)
    write_png(tmp_path / "image.png", pixels, colour, *([chunk] if chunk else []))
    assert np.abs(read(tmp_path / "image.png").astype(int) - expected).max() <= 1


def test_transparent_colours(tmp_path):
    pixels = np.array([[0, 1, 2]], np.uint8)
    palette = Image.fromarray(pixels).convert("P")
    palette.putpalette([200, 100, 50, 9, 9, 9, 0, 0, 255])
    palette.save(tmp_path / "bytes.png", transparency=bytes([255, 0, 128]))
    assert read(tmp_path / "bytes.png")[0].tolist() == [[200, 100, 50], [255, 255, 255], [127, 127, 255]]
    palette.save(tmp_path / "index.gif", transparency=1)
    assert read(tmp_path / "index.gif")[0].tolist() == [[200, 100, 50], [255, 255, 255], [0, 0, 255]]
    Image.fromarray(pixels).save(tmp_path / "grey.png", transparency=2)
    assert read(tmp_path / "grey.png")[0, :, 0].tolist() == [0, 1, 255]


#: For each EXIF orientation, the function that turns an upright image into the stored pixels.
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p, -1),
}


def oriented(path, pixels, orientation):
    tag = Image.Exif()
    tag[0x112] = orientation
    image = Image.fromarray(np.ascontiguousarray(STORED.get(orientation, STORED[1])(pixels)))
    if path.suffix == ".tif":
        image.save(path, tiffinfo={0x112: orientation})
    else:
        image.save(path, exif=tag.tobytes(), **({"quality": 100} if path.suffix == ".jpg" else {"lossless": True}))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", [*STORED, 0, 9])
def test_orientation(orientation, suffix, tmp_path):
    if suffix == ".webp" and not features.check("webp"):
        pytest.skip("Pillow was built without WebP")
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, 8:] = 255
    upright[:4] //= 2
    oriented(tmp_path / f"image{suffix}", upright, orientation)
    found = read(tmp_path / f"image{suffix}").astype(int)
    assert found.shape == upright.shape
    assert np.abs(found - upright).max() <= (4 if suffix == ".jpg" else 0)


def test_invalid_orientation_is_ignored(tmp_path):
    Image.new("RGB", (4, 2), (200, 100, 50)).save(tmp_path / "image.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read(tmp_path / "image.jpg").shape == (2, 4, 3)
    assert stored(tmp_path / "image.jpg") == ((4, 2), 1)


def profile_of_swapped_primaries():
    """An sRGB profile with the red and blue primaries swapped."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    places = [content.index(tag, 128) for tag in (b"rXYZ", b"bXYZ")]
    content[places[0] : places[0] + 4], content[places[1] : places[1] + 4] = b"bXYZ", b"rXYZ"
    return bytes(content)


@pytest.mark.skipif(not features.check("littlecms2"), reason="Pillow was built without LittleCMS")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_colour_profile(suffix, tmp_path):
    path = tmp_path / f"image{suffix}"
    swapped = profile_of_swapped_primaries()
    Image.new("RGB", (8, 8), (200, 100, 50)).save(path, icc_profile=swapped)
    assert np.abs(read(path).astype(int) - (50, 100, 200)).max() <= 3
    if suffix != ".jpg":
        Image.new("RGBA", (8, 8), (200, 100, 50, 0)).save(path, icc_profile=swapped)
        assert (read(path) == 255).all()
    # The sRGB profile changes nothing. Invalid profiles and those of another colour space are ignored.
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    usual = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "usual.png", icc_profile=usual)
    assert np.array_equal(read(tmp_path / "usual.png"), pixels)
    Image.new("RGB", (8, 8), (200, 100, 50)).save(path, icc_profile=b"nothing")
    assert np.abs(read(path).astype(int) - (200, 100, 50)).max() <= 3
    Image.new("L", (8, 8), 77).save(path, icc_profile=swapped)
    assert np.abs(read(path).astype(int) - 77).max() <= 3


def test_png_gamma(tmp_path):
    def shown(*chunks):
        write_png(tmp_path / "image.png", np.full((1, 1, 3), [128, 64, 255], np.uint8), 2, *chunks)
        return read(tmp_path / "image.png")[0, 0].tolist()

    def gamma(value):
        return b"gAMA", struct.pack(">I", round(100_000 * value))

    assert shown(gamma(0.45455)) == [128, 64, 255]
    # A gamma of 1 is linear light, which is encoded as 255·(v/255)^(1/2.2).
    assert shown(gamma(1)) == [186, 136, 255]
    assert shown((b"sRGB", b"\0"), gamma(1)) == [128, 64, 255]


def test_box_refers_to_stored_pixels(tmp_path):
    upright = np.arange(12, dtype=np.uint8).reshape(3, 4)
    oriented(tmp_path / "image.png", upright, 6)
    pixels = STORED[6](upright)  # 4 high, 3 wide
    found = read_image(tmp_path / "image.png", (0.6, 0.9, 2.0, 1.4))[0].numpy()
    assert np.array_equal(found, np.rot90(pixels[1:2, 1:3], -1))
    assert read_image(tmp_path / "image.png", (9, 9, 5, 5)).shape == (3, 1, 1)


def test_errors_name_the_file(tmp_path, monkeypatch):
    noise = Image.effect_noise((99, 99), 50)

    def fails(name, message, kind=ImageError):
        path = tmp_path / name
        with pytest.raises(kind, match=f"^{re.escape(message.format(path=path))}") as caught:
            read_image(path)
        assert len(str(caught.value).splitlines()) == 1

    fails("$none & <such>.png", "there is no image '{path}'", FileNotFoundError)
    (tmp_path / "text.jpg").write_text("text", encoding="utf-8")
    fails("text.jpg", "'{path}' is not an image that can be read")
    (tmp_path / "empty.png").touch()
    fails("empty.png", "'{path}' is not an image that can be read")
    (tmp_path / "folder.png").mkdir()
    fails("folder.png", "'{path}' cannot be read: ")
    for suffix in ("jpg", "png"):
        noise.save(tmp_path / f"whole.{suffix}")
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(content[: 3 * len(content) // 4])
        fails(f"cut.{suffix}", "'{path}' cannot be read: ")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    limit = "8,000 that Pillow opens (twice PIL.Image.MAX_IMAGE_PIXELS)"
    fails("whole.png", f"'{{path}}' has more pixels than the {limit}")
    # Pillow's default limit protects against decompression bombs: small files with very many pixels.
    monkeypatch.undo()
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert os.path.getsize(tmp_path / "bomb.png") < 100_000
    fails("bomb.png", "'{path}' has more pixels than the 178,956,970 that Pillow opens")


def test_error_shows_special_characters_unescaped(tmp_path):
    name = "a\n$b_c<&|%é\\.png"
    (tmp_path / name).touch()
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / name)
    assert f"'{tmp_path / name}'" in str(caught.value)


def test_plain_rgb_image_is_unchanged(tmp_path):
    pixels = torch.randint(256, (3, 9, 13), dtype=torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    assert torch.equal(read_image(tmp_path / "image.png"), pixels)

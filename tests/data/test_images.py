import io

import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.data import images
from limbeck.data.images import EncodedImages
from limbeck.errors import UserError


def png(pixels):
    """The encoded PNG of uint8 [C,H,W]."""
    array = pixels.permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(file, format="PNG")
    return file.getvalue()


def random_images(n, *shape):
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 3])
def test_decoding_gives_back_the_encoded_pixels(channels):
    pixels = random_images(5, channels, 6, 7)
    column = EncodedImages([png(p) for p in pixels])
    assert torch.equal(column.decode_all(progress=False), pixels)
    assert torch.equal(column.select(torch.tensor([4, 2])).decode(torch.tensor([1])), pixels[2:3])


def test_a_size_keeps_the_centre_square_of_a_wide_picture():
    wide = torch.zeros(3, 8, 24).byte()
    wide[:, :, 8:16] = 200
    assert EncodedImages([png(wide)], size=8).decode(torch.tensor([0])).eq(200).all()
    assert EncodedImages([png(wide)], size=(4, 6)).decode(torch.tensor([0])).shape == (1, 3, 4, 6)


def test_16_bit_grey_keeps_its_range_and_transparent_pixels_turn_white():
    deep, clear = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.array([[0, 256 * 128], [65535, 256]], dtype=np.uint16)).save(deep, format="PNG")
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(clear, format="PNG")
    assert EncodedImages([deep.getvalue()]).decode(torch.tensor([0])).flatten().tolist() == [0, 128, 255, 1]
    assert EncodedImages([clear.getvalue()]).decode(torch.tensor([0])).eq(255).all()


def test_masks_keep_their_class_numbers_through_scaling():
    mask = torch.tensor([[0, 11], [5, 3]]).byte()
    decoded = EncodedImages([png(mask[None])], size=4, mask=True).decode(torch.tensor([0]))
    assert decoded.shape == (1, 4, 4) and set(decoded.flatten().tolist()) == {0, 3, 5, 11}


def test_an_unreadable_image_is_named_by_its_path_or_its_row(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(png(random_images(1, 3, 8, 8)[0]))
    bad.write_bytes(good.read_bytes()[:60])
    with pytest.raises(UserError, match=str(bad)):
        EncodedImages([good, bad]).decode_all(progress=False)
    with pytest.raises(UserError, match="in row 1"):
        EncodedImages([good.read_bytes(), b"text"]).decode_all(progress=False)


def test_pictures_of_different_sizes_are_refused_with_the_mend():
    column = EncodedImages([png(torch.zeros(1, 4, 4).byte()), png(torch.zeros(1, 5, 4).byte())])
    with pytest.raises(UserError, match=r"in row 1 is 1x5x4 where the first is 1x4x4: pass image_size"):
        column.decode_all(progress=False)


def test_the_cache_is_read_again_and_keyed_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    monkeypatch.setattr(images, "CACHE_FROM", 2)
    pixels = random_images(4, 1, 3, 3)
    first = EncodedImages([png(p) for p in pixels]).decode_all(progress=False).clone()
    (file,) = (tmp_path / "images").iterdir()
    marked = np.load(file)
    marked[0, 0, 0, 0] ^= 1
    np.save(file, marked)
    again = EncodedImages([png(p) for p in pixels]).decode_all(progress=False)
    assert torch.equal(first, pixels) and torch.equal(again, torch.from_numpy(marked))
    other = EncodedImages([png(p) for p in 255 - pixels]).decode_all(progress=False)
    assert torch.equal(other, 255 - pixels)


def test_a_cache_that_cannot_be_written_costs_only_the_cache(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("LIMBECK_CACHE", str(blocked))
    monkeypatch.setattr(images, "CACHE_FROM", 2)
    pixels = random_images(3, 1, 3, 3)
    with pytest.warns(UserWarning, match="not cached"):
        assert torch.equal(EncodedImages([png(p) for p in pixels]).decode_all(progress=False), pixels)

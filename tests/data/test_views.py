import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from limbeck.data import MultiCrop, SimCLR, Strong, Weak, make_view, views
from limbeck.errors import UserError

SHAPES = [(5, 3, 32, 32), (3, 1, 28, 28), (4, 1, 8, 8), (1, 3, 9, 12)]
ALL = {
    "identity": {},
    "weak": {},
    "strong": {"m": None},
    "multi_crop": {"crops": 3, "size": 6, "scale": (0.05, 0.4)},
    "simclr": {"blur": 0.5},
}


def random_images(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).float() / 255


def picture(image):
    array = (image * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def pixels(image):
    array = torch.from_numpy(np.array(image)).float() / 255
    return array[None] if array.dim() == 2 else array.permute(2, 0, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_view_stays_in_the_unit_range_and_is_replayed_exactly_from_its_parameters(name, shape):
    images, view = random_images(*shape), make_view(name, **ALL[name])
    kept = images.clone()
    torch.manual_seed(3)
    seen = view(images)
    torch.manual_seed(3)
    params = view.draw(images)
    assert torch.equal(view.apply(images, params), seen)
    assert torch.equal(images, kept)  # the batch itself is left alone
    assert seen.shape[0] == shape[0] and seen.dtype == torch.float32
    assert seen.min() >= 0 and seen.max() <= 1
    assert all(isinstance(value, torch.Tensor) for value in params.values())


@pytest.mark.parametrize("name", [name for name in ALL if name != "identity"])
def test_each_sample_draws_for_itself(name):
    images = random_images(1, 3, 32, 32).expand(16, -1, -1, -1)
    torch.manual_seed(0)
    assert len(make_view(name, **ALL[name])(images).flatten(1).unique(dim=0)) > 8


@settings(max_examples=25, deadline=None)
@given(st.integers(-3, 3), st.integers(-3, 3), st.booleans())
def test_weak_is_a_crop_from_the_image_padded_by_reflection_then_flipped(dy, dx, flip):
    images = random_images(1, 3, 8, 10)
    padded = torch.nn.functional.pad(images, (3, 3, 3, 3), mode="reflect")
    expected = padded[..., 3 + dy : 11 + dy, 3 + dx : 13 + dx]
    params = {"shift": torch.tensor([[dy, dx]]), "flip": torch.tensor([flip])}
    assert torch.equal(Weak(3).apply(images, params), expected.flip(-1) if flip else expected)


def test_weak_without_flip_and_padding_is_the_identity_and_small_digits_shift_by_one():
    images = random_images(20, 1, 8, 8)
    assert torch.equal(Weak(padding=0, flip=False)(images), images)
    assert Weak(flip=False).draw(images)["shift"].unique().tolist() == [-1, 0, 1]
    assert not Weak(flip=False).draw(images)["flip"].any()


def test_strong_without_strength_is_weak():
    images = random_images(30, 3, 16, 16)
    view = Strong(n=0, cutout=0)
    params = view.draw(images)
    assert torch.equal(view.apply(images, params), Weak().apply(images, params))


def one_operation(name, images, strength):
    operation = torch.full((len(images),), views.OPERATIONS.index(name))
    return views.rand_augment(images, operation, torch.full((len(images),), strength), fill=0.5)


@pytest.mark.parametrize("name", [n for n in views.OPERATIONS if n not in ("auto_contrast", "equalize")])
def test_an_operation_of_no_strength_changes_nothing(name):
    images = random_images(3, 3, 12, 12)
    assert torch.allclose(one_operation(name, images, 0.0), images, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in views.OPERATIONS if n != "identity"])
def test_an_operation_of_full_strength_changes_a_colour_image(name):
    images = random_images(3, 3, 24, 24) ** 2 * 0.5 + 0.2
    assert (one_operation(name, images, 1.0) - images).abs().mean() > 0.01


def test_samples_are_augmented_as_if_each_were_alone():
    images = random_images(40, 3, 16, 16)
    torch.manual_seed(0)
    operation = torch.randint(len(views.OPERATIONS), (40,))
    strength = torch.rand(40) * 2 - 1
    together = views.rand_augment(images, operation, strength, 0.5)
    for b in range(40):
        rows = slice(b, b + 1)
        alone = views.rand_augment(images[rows], operation[rows], strength[rows], 0.5)
        assert torch.allclose(together[rows], alone, atol=1e-6)


def test_shifts_and_turns_move_pixels_where_they_say_and_bring_in_the_fill():
    images = random_images(1, 1, 20, 20)
    moved = one_operation("translate_x", images, 1.0)  # 0.45 of 20 pixels: 9
    assert torch.allclose(moved[..., :11], images[..., 9:], atol=1e-4)
    assert torch.allclose(moved[..., 11:], torch.tensor(0.5), atol=1e-4)
    turned = one_operation("rotate", images, 3.0)  # a strength of 3 is 90 degrees
    assert torch.allclose(turned, images.rot90(1, (2, 3)), atol=1e-4) or torch.allclose(
        turned, images.rot90(-1, (2, 3)), atol=1e-4
    )


@pytest.mark.parametrize("edge", [8, 16, 20, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_equalize_is_that_of_pillow(channels, edge):
    images = random_images(4, channels, edge, edge) ** 3
    images = (images * 255).round() / 255
    images[3] = 0.4  # flat
    expected = torch.stack([pixels(ImageOps.equalize(picture(image))) for image in images])
    assert torch.allclose(views.equalize(images), expected, atol=1e-6)


@pytest.mark.parametrize("factor", [0.1, 1.0, 1.9])
@pytest.mark.parametrize("name", ["Brightness", "Contrast", "Color", "Sharpness"])
def test_enhancements_are_those_of_pillow_to_a_grey_level(name, factor):
    ours = {
        "Brightness": views.adjust_brightness,
        "Contrast": views.adjust_contrast,
        "Color": views.adjust_saturation,
        "Sharpness": views.adjust_sharpness,
    }[name]
    images = random_images(3, 3, 12, 12)
    expected = torch.stack([pixels(getattr(ImageEnhance, name)(picture(image)).enhance(factor)) for image in images])
    assert (ours(images, torch.full((3,), factor)) - expected).abs().max() <= 2.1 / 255


def test_posterize_and_solarize_are_those_of_pillow():
    images = random_images(2, 3, 12, 12)
    posterized = torch.stack([pixels(ImageOps.posterize(picture(image), 4)) for image in images])
    assert torch.allclose(views.posterize(images, torch.tensor([4, 4])), posterized, atol=1e-6)
    solarized = torch.stack([pixels(ImageOps.solarize(picture(image), 128)) for image in images])
    assert torch.allclose(views.solarize(images, torch.tensor([128, 128]) / 255), solarized, atol=1e-6)


def test_auto_contrast_reaches_from_zero_to_one_and_leaves_flat_channels():
    images = random_images(2, 3, 6, 6) * 0.3 + 0.2
    images[1, 2] = 0.7
    stretched = views.auto_contrast(images)
    assert torch.allclose(stretched[0].amin((1, 2)), torch.zeros(3)) and torch.allclose(
        stretched[0].amax((1, 2)), torch.ones(3)
    )
    assert torch.equal(stretched[1, 2], images[1, 2])


def test_cutout_removes_a_square_that_is_clipped_at_the_border():
    images = torch.ones(2, 1, 8, 8)
    cut = views.cut_out(images, torch.tensor([[0.5, 0.5], [0.0, 0.0]]), 0.5, fill=0.0)
    assert (cut == 0).sum((1, 2, 3)).tolist() == [16, 4]
    assert (cut[0, 0, 2:6, 2:6] == 0).all()


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 1.0), st.integers(0, 99), st.sampled_from([(8, 8), (6, 12), (12, 6)]))
def test_a_crop_covers_the_share_that_was_asked_for_and_lies_inside(share, seed, shape):
    torch.manual_seed(seed)
    box = MultiCrop(4, scale=(share, share), ratio=(0.5, 2.0)).draw(torch.zeros(3, 1, *shape))["box"]
    assert (box >= -1e-6).all() and (box <= 1 + 1e-6).all()
    area = (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])
    assert torch.allclose(area, torch.tensor(share), atol=1e-5)


def test_a_crop_of_whole_pixels_is_exact_and_may_be_flipped():
    images = random_images(1, 3, 8, 8)
    params = {"box": torch.tensor([[[0.25, 0.5, 0.75, 1.0]] * 2]), "flip": torch.tensor([[False, True]])}
    crops = MultiCrop(2, size=4).apply(images, params)
    assert crops.shape == (1, 2, 3, 4, 4)
    assert torch.allclose(crops[:, 0], images[..., 4:, 2:6], atol=1e-5)
    assert torch.allclose(crops[:, 1], images[..., 4:, 2:6].flip(-1), atol=1e-5)


def test_simclr_without_jitter_grey_and_flip_on_the_whole_image_is_the_identity():
    images = random_images(6, 3, 10, 10)
    view = SimCLR(scale=(1.0, 1.0), jitter=0.0, grey=0.0, flip=False)
    assert torch.allclose(view(images), images, atol=1e-5)
    grey = SimCLR(scale=(1.0, 1.0), jitter=0.0, grey=1.0, flip=False)(images)
    assert torch.allclose(grey[:, 0], grey[:, 2]) and torch.allclose(grey, views.to_grey(images), atol=1e-5)


def test_a_hue_turned_by_a_third_swaps_the_channels():
    images = random_images(2, 3, 4, 4)
    turned = views.turn_hue(images, torch.full((2,), 2 * torch.pi / 3))
    assert torch.allclose(turned, images[:, [2, 0, 1]], atol=1e-4)


def test_an_unknown_view_or_argument_is_named_with_what_there_is():
    with pytest.raises(UserError, match="no view 'strnog': did you mean 'strong'"):
        make_view("strnog")
    with pytest.raises(UserError, match="'weak' has no argument 'flips', it has padding, flip"):
        make_view("weak", flips=True)
    with pytest.raises(UserError, match="m=40"):
        make_view("strong", m=40)

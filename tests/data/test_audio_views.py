"""Views of spectrograms: pure in their parameters, one draw a sample, and a memory that survives a resume."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.data import LogMixup, MaskSpans, RandomWindow, ResizeCrop, Samples, Stream, make_view
from limbeck.errors import UserError

B, M, T = 6, 16, 24
NAMES = {"random_window": {"frames": 10}, "log_mixup": {}, "resize_crop": {}, "mask_spans": {}}


def spectrograms(seed: int = 0, rows: int = B) -> Tensor:
    return torch.randn(rows, 1, M, T, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_a_view_is_a_pure_function_of_its_parameters(name: str) -> None:
    view, images = make_view(name, **NAMES[name]), spectrograms()
    view(spectrograms(1))  # something to remember
    before = images.clone()
    params = view.draw(images)
    first = view.apply(images, params)
    view(spectrograms(2))
    torch.testing.assert_close(view.apply(images, params), first)
    assert torch.equal(images, before) and first.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_each_sample_has_its_own_draw(name: str) -> None:
    torch.manual_seed(0)
    view = make_view(name, **NAMES[name])
    view(spectrograms(1))
    same = spectrograms()[:1].expand(B, -1, -1, -1)
    found = view(same)
    assert not torch.equal(found[0], found[1]) or not torch.equal(found[0], found[2])


def test_a_window_is_a_piece_of_the_spectrogram() -> None:
    view = RandomWindow(10)
    images = spectrograms()
    params = view.draw(images)
    for row, start in enumerate(params["start"].tolist()):
        assert torch.equal(view.apply(images, params)[row], images[row, :, :, start : start + 10])


def test_a_window_longer_than_the_clip_is_refused() -> None:
    with pytest.raises(UserError, match="25 frames was asked for, the spectrograms have 24"):
        RandomWindow(25)(spectrograms())


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 100))
def test_mixing_adds_powers(share: float, seed: int) -> None:
    x, m = spectrograms(seed), spectrograms(seed + 1)
    found = LogMixup().apply(x, {"share": torch.full((B,), share), "partner": m})
    torch.testing.assert_close(found, torch.log((1 - share) * x.exp() + share * m.exp()), atol=1e-5, rtol=1e-5)


def test_a_share_of_zero_leaves_even_silence_as_it_is() -> None:
    x = torch.full((B, 1, M, T), -1e4)
    found = LogMixup().apply(x, {"share": torch.zeros(B), "partner": spectrograms()})
    assert torch.equal(found, x)


def test_the_first_batch_is_unmixed_and_later_ones_mix_with_the_latest_unmixed() -> None:
    view = LogMixup(ratio=0.4, memory=8)
    batches = [spectrograms(seed) for seed in range(4)]
    assert torch.equal(view(batches[0]), batches[0])
    for batch in batches[1:3]:
        view(batch)
    latest = torch.cat(batches[:3])[-8:]
    params = view.draw(batches[3])
    equal = (params["partner"][:, None] == latest).flatten(2).all(2)
    assert equal.any(1).all() and (params["share"] <= 0.4).all() and params["share"].any()


def test_the_whole_spectrogram_is_its_own_resize() -> None:
    view, images = ResizeCrop(canvas=(1.0, 1.0)), spectrograms()
    box = torch.tensor([[0, 0, M, T]]).expand(B, 4)
    torch.testing.assert_close(view.apply(images, {"box": box}), images, atol=1e-4, rtol=0)


def test_a_box_is_stretched_as_interpolation_does_inside() -> None:
    view, images = ResizeCrop(), spectrograms()
    top, left, height, width = 2, 9, 12, 20
    found = view.apply(images, {"box": torch.tensor([[top, left, height, width]]).expand(B, 4)})
    canvas = F.pad(images, (6, 6))[:, :, top : top + height, left : left + width]
    wanted = F.interpolate(canvas, size=(M, T), mode="bicubic", align_corners=True)
    torch.testing.assert_close(found[:, :, 2:-2, 2:-2], wanted[:, :, 2:-2, 2:-2], atol=1e-4, rtol=0)


def test_boxes_lie_on_the_canvas_and_have_the_drawn_size() -> None:
    torch.manual_seed(0)
    box = ResizeCrop().draw(spectrograms(rows=500))["box"]
    top, left, height, width = box.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= M).all() and (left + width <= T * 3 // 2).all()
    assert height.min() >= int(0.6 * M) and height.max() == M and width.max() <= 1.5 * T and width.min() >= int(0.6 * T)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), mel_width=st.integers(0, 5), time_width=st.integers(0, 7))
def test_masked_spans_are_no_wider_than_asked(seed: int, mel_width: int, time_width: int) -> None:
    torch.manual_seed(seed)
    images = spectrograms() + 10
    found = MaskSpans(1, mel_width, 1, time_width)(images)
    masked = found == 0
    bands, frames = masked.all(3).sum(2), masked.all(2).sum(2)
    assert bands.max() <= mel_width and frames.max() <= time_width
    assert torch.equal(found[~masked], images[~masked])


def test_a_mask_wider_than_the_spectrogram_is_refused() -> None:
    with pytest.raises(UserError, match="lower its width"):
        MaskSpans(mel_width=M + 1)(spectrograms())


def stream(view: LogMixup) -> Stream:
    made = Stream(Samples({"spectrogram": spectrograms(rows=24)}), 4, {"weak": view}, view_field="spectrogram")
    made.open("unlabelled", seed=0)
    return made


def test_a_resumed_stream_mixes_with_what_it_had_seen() -> None:
    torch.manual_seed(0)
    whole = stream(LogMixup(memory=8))
    for _ in range(3):
        whole.render(whole.next())
    state, random = whole.state_dict(), torch.get_rng_state()
    wanted = whole.render(whole.next())["weak"]
    resumed = stream(LogMixup(memory=8))
    resumed.load_state_dict(state)
    torch.set_rng_state(random)
    assert torch.equal(resumed.render(resumed.next())["weak"], wanted)


def test_opening_a_stream_forgets() -> None:
    view = LogMixup(memory=8)
    first = stream(view)
    first.render(first.next())
    again = stream(view)
    batch = again.render(again.next())
    assert torch.equal(batch["weak"], batch["spectrogram"])

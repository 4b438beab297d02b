"""Media files: reading what people have, writing whole files or none. The rules: test_media_rules.py."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bernini import frames_folder, media, media_write
from bernini.contact_sheet import Panel, contact_sheet, task_sheet
from bernini.frames_folder import check_frames_folder, write_frames
from bernini.media import MediaError, frame_indices
from bernini.media_rules import Timeline


def ramp(count: int, width: int = 64, height: int = 48) -> Tensor:
    """Frame ``i`` is one flat grey of level ``8 + 7 i``: a decoded frame tells its number."""
    levels = torch.arange(count, dtype=torch.uint8) * 7 + 8
    return levels[:, None, None, None].expand(count, height, width, 3).contiguous()


def numbers(frames: Tensor) -> list[int]:
    """The numbers of :func:`ramp` frames."""
    return [round((float(frame.float().mean()) - 8) / 7) for frame in frames]


def encode(path: Path, frames: Tensor, times: Sequence[float], codec: str = "libx264", **options: str) -> Path:
    """Writes frames at arbitrary times in milliseconds, losslessly if the codec is H.264."""
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.options, stream.bit_rate = {"qp": "0"} if codec == "libx264" else {}, 4_000_000
        for pixels, time in zip(frames, times, strict=True):
            picture = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
            picture.pts, picture.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


# --- pixels ---------------------------------------------------------------------------------------------------------


def test_model_conversion_is_lossless() -> None:
    frames = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 16, 1).expand(-1, -1, -1, 3)
    x = media.to_model(frames)
    assert x.shape == (3, 2, 8, 16) and x.min() == -1 and x.max() == 1
    assert torch.equal(media.from_model(x), frames)
    assert torch.equal(media.from_model(x * 3), media.from_model((x * 3).clamp(-1, 1)))
    assert media.to_model(frames[0]).shape == (3, 1, 8, 16)


def test_model_conversion_refuses_wrong_tensors() -> None:
    with pytest.raises(ValueError, match="not finite"):
        media.from_model(torch.full((3, 1, 2, 2), float("nan")))
    with pytest.raises(ValueError, match=r"expected float \[3, F, H, W\]"):
        media.from_model(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="uint8"):
        media.to_model(torch.zeros(1, 2, 2, 3))


def test_resize_is_antialiased_and_stays_in_range() -> None:
    stripes = (torch.arange(64) % 2 * 255).to(torch.uint8)[None, None, :, None].expand(1, 64, 64, 3)
    small = media.resize(stripes, (8, 16))
    assert small.shape == (1, 16, 8, 3) and small.dtype == torch.uint8
    assert (small.float() - 127.5).abs().max() < 8  # without antialias every sample would be 0 or 255
    edge = media.resize((torch.arange(8) > 3).to(torch.uint8)[None, None, :, None].expand(1, 8, 8, 3) * 255, (32, 32))
    assert edge[0, 0, 0, 0] == 0 and edge[0, 0, -1, 0] == 255


# --- reading videos -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fps", "expected"), [(16, list(range(17))), (24, [0, 1, 1, 2, 3, 3, 4]), (8, [0, 2, 4, 6])])
def test_reads_at_another_rate(tmp_path: Path, fps: int, expected: list[int]) -> None:
    media_write.write_video(tmp_path / "clip.mp4", ramp(17), 16, crf=0)
    clip = media.read_video(tmp_path / "clip.mp4", fps=fps, num_frames=81)
    assert clip.fps == fps and numbers(clip.frames)[: len(expected)] == expected
    assert numbers(clip.frames) == frame_indices(17, 16.0, fps, 81)


def test_repeats_the_last_frame_where_the_rule_points_past_the_end(tmp_path: Path) -> None:
    media_write.write_video(tmp_path / "clip.mp4", ramp(16), 16, crf=0)
    assert numbers(media.read_video(tmp_path / "clip.mp4").frames) == [*range(16), 15]
    assert numbers(media.read_video(tmp_path / "clip.mp4", num_frames=8).frames) == list(range(9))  # 8 asks for 9


def test_reads_every_rule(tmp_path: Path) -> None:
    media_write.write_video(tmp_path / "clip.mp4", ramp(33), 16, crf=0)
    for rule in ("renderer", "full", "full_vit"):
        clip = media.read_video(tmp_path / "clip.mp4", rule=rule)
        assert numbers(clip.frames) == frame_indices(33, 16.0, 16, 81, rule)
        assert clip.fps == (2 if rule == "full_vit" else 16)


def test_variable_rate_goes_by_timestamps(tmp_path: Path) -> None:
    """Eight frames shown for 1/4 s each, then eight for 1/16 s: the slow half must not race by."""
    times = [n / 4 for n in range(8)] + [2 + n / 16 for n in range(9)]
    path = encode(tmp_path / "variable.mkv", ramp(17), times)
    clip = media.read_video(path, fps=16, num_frames=81)
    seen = numbers(clip.frames)
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 16
    assert sum(number < 8 for number in seen) / len(seen) == pytest.approx(2 / 2.5, abs=0.08)


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".avi", ".gif"])
def test_counts_frames_where_the_container_does_not_say(tmp_path: Path, suffix: str) -> None:
    codec = {".mkv": "libx264", ".webm": "libvpx", ".avi": "mpeg4", ".gif": "gif"}[suffix]
    path = tmp_path / f"clip{suffix}"
    if suffix == ".gif":
        pictures = [Image.fromarray(frame.numpy()) for frame in ramp(9)]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40)
    else:
        encode(path, ramp(9), [n / 25 for n in range(9)], codec)
    clip = media.read_video(path, fps=25)
    assert clip.frames.shape == (9, 48, 64, 3) and numbers(clip.frames) == list(range(9))


def test_one_frame(tmp_path: Path) -> None:
    media_write.write_video(tmp_path / "one.mp4", ramp(1), 16)
    clip = media.read_video(tmp_path / "one.mp4")
    assert clip.frames.shape == (1, 48, 64, 3)


def test_odd_sizes_are_snapped(tmp_path: Path) -> None:
    path = encode(tmp_path / "odd.avi", ramp(5, width=101, height=75), [n / 25 for n in range(5)], "mpeg4")
    assert media.read_video(path, fps=25).frames.shape == (5, 80, 96, 3)
    assert media.read_video(path, fps=25, max_size=64).frames.shape == (5, 48, 64, 3)
    assert media.read_video(path, fps=25, min_size=150).frames.shape == (5, 144, 208, 3)
    assert media.read_video(path, fps=25, size=(32, 16)).frames.shape == (5, 16, 32, 3)


def test_frames_turned_by_metadata_come_out_upright(tmp_path: Path) -> None:
    """A phone's portrait video: stored lying, with a display matrix that turns it a quarter clockwise."""
    picture = torch.zeros(1, 48, 64, 3, dtype=torch.uint8)
    picture[:, :, :16] = 255  # the left edge, which that turn brings to the top
    media_write.write_video(tmp_path / "lying.mp4", picture.expand(5, -1, -1, -1), 16)
    data = bytearray((tmp_path / "lying.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    assert struct.unpack(">9i", data[matrix : matrix + 36])[0] == 1 << 16
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    frame = media.read_video(tmp_path / "turned.mp4").frames[0].float()
    assert frame.shape == (64, 48, 3)
    assert frame[:12].mean() > 240 and frame[20:].mean() < 15


def test_colours_survive(tmp_path: Path) -> None:
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [128, 128, 128], [255, 255, 255]])
    frames = colours.to(torch.uint8)[:, None, None, :].expand(-1, 16, 16, 3)
    media_write.write_video(tmp_path / "colours.mkv", frames, 16)
    back = media.read_video(tmp_path / "colours.mkv", num_frames=5).frames
    assert (back.int() - frames[:5].int()).abs().max() <= 4


# --- files that cannot be read --------------------------------------------------------------------------------------


def test_unreadable_files_are_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video " * 100)
    Image.new("RGB", (32, 32)).save(tmp_path / "still.png")
    for name, reason in {
        "missing.mp4": "no such file",
        ".": "is a directory",
        "empty.mp4": "is empty",
        "empty.mp4/inside.mp4": "cannot be opened",
        "text.mp4": "cannot be read as a video",
        "still.png": "is a still image",
    }.items():
        with pytest.raises(MediaError, match=reason) as caught:
            media.read_video(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    for name, reason in {"missing.png": "no such file", "empty.mp4": "is empty", "text.mp4": "is not an image"}.items():
        with pytest.raises(MediaError, match=reason):
            media.read_image(tmp_path / name)


def test_sound_alone_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match=r"sound\.mp4: holds sound but no pictures"):
        media.read_video(tmp_path / "sound.mp4")


@pytest.mark.filterwarnings("ignore:.*can be decoded")
def test_cut_off_files(tmp_path: Path) -> None:
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (33, 48, 64, 3), dtype=np.uint8))
    media_write.write_video(tmp_path / "whole.mp4", noise, 16)
    data = (tmp_path / "whole.mp4").read_bytes()
    body = data.index(b"mdat") + 4
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[:body])
    with pytest.raises(MediaError, match="cut off or damaged"):
        media.read_video(cut)
    cut.write_bytes(data[:100])
    with pytest.raises(MediaError, match="nothing that can be read"):
        media.read_video(cut)
    cut.write_bytes(data[: (body + len(data)) // 2])  # what is there is used
    assert 1 < len(media.read_video(cut).frames) < 33
    for start in range(body, len(data), 2):  # frames that are there but hold rubbish
        data = data[:start] + b"\0" + data[start + 1 :]
    cut.write_bytes(data)
    with pytest.raises(MediaError, match="cut off or damaged"):
        media.read_video(cut)


def test_frames_that_cannot_be_decoded_are_left_out_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that stops early, as some do in a damaged file: the rest is spread over the wanted frames."""
    media_write.write_video(tmp_path / "clip.mp4", ramp(33), 16, crf=0)
    whole = media._scan
    monkeypatch.setattr(media, "_scan", lambda path: Timeline(32.0, [n / 32 for n in range(whole(path).total * 2)]))
    with pytest.warns(RuntimeWarning, match="only 33 of 66 frames"):
        clip = media.read_video(tmp_path / "clip.mp4")
    assert numbers(clip.frames) == frame_indices(33, 32.0, 16, 81)


# --- images ---------------------------------------------------------------------------------------------------------


def test_images_of_every_kind_become_rgb(tmp_path: Path) -> None:
    grey16 = np.full((32, 48), 0x8000, dtype=np.uint16)
    half_red = np.zeros((32, 48, 4), dtype=np.uint8)
    half_red[..., 0], half_red[..., 3] = 255, 128
    palette = Image.new("P", (48, 32), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    pictures = {
        "grey.png": (Image.new("L", (48, 32), 77), (77, 77, 77)),
        "one_bit.png": (Image.new("1", (48, 32), 1), (255, 255, 255)),
        "grey16.png": (Image.fromarray(grey16), (128, 128, 128)),
        "grey16.tiff": (Image.fromarray(grey16), (128, 128, 128)),
        "alpha.png": (Image.fromarray(half_red), (255, 127, 127)),
        "grey_alpha.png": (Image.new("LA", (48, 32), (0, 0)), (255, 255, 255)),
        "palette.png": (palette, (0, 0, 255)),
        "cmyk.tiff": (Image.new("CMYK", (48, 32), (0, 0, 0, 255)), (0, 0, 0)),
    }
    for name, (picture, colour) in pictures.items():
        picture.save(tmp_path / name)
        pixels = media.read_image(tmp_path / name)
        assert pixels.shape == (32, 48, 3) and pixels.dtype == torch.uint8, name
        assert pixels[7, 9].tolist() == list(colour), name
    palette.save(tmp_path / "clear.png", transparency=1)
    assert media.read_image(tmp_path / "clear.png").unique().tolist() == [255]


def test_images_follow_the_camera_orientation(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 32))
    picture.paste("white", (0, 0, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = media.read_image(tmp_path / "turned.jpg").float()
    assert pixels.shape == (64, 32, 3) and pixels[:14].mean() > 250 and pixels[20:].mean() < 5


def test_images_are_resized_like_videos(tmp_path: Path) -> None:
    Image.new("RGB", (1920, 1080), "teal").save(tmp_path / "large.png")
    assert media.read_image(tmp_path / "large.png").shape == (480, 848, 3)
    assert media.read_image(tmp_path / "large.png", max_size=1280).shape == (720, 1280, 3)
    assert media.read_image(tmp_path / "large.png", size=(64, 32))[0, 0].tolist() == [0, 128, 128]


def test_damaged_images_are_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(MediaError, match=r"cut\.png: cannot be read as an image"):
        media.read_image(tmp_path / "cut.png")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(MediaError, match="8 or 16 bits"):
        media.read_image(tmp_path / "float.tiff")


# --- writing --------------------------------------------------------------------------------------------------------


def test_videos_are_h264_at_their_rate(tmp_path: Path) -> None:
    for name, fps in {"a.mp4": 16, "b.mkv": 24, "c.mov": 29.97}.items():
        media_write.write_video(tmp_path / name, ramp(9), fps)
        with av.open(str(tmp_path / name)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert float(stream.average_rate or 0) == pytest.approx(fps, rel=1e-3)
            assert sum(packet.size > 0 for packet in container.demux(stream)) == 9
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.mp4", "b.mkv", "c.mov"]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".gif"])
def test_the_same_frames_give_the_same_file(tmp_path: Path, suffix: str) -> None:
    """Whatever fresh memory holds. x264's AVX-512 code takes it for macroblocks where 128 does not divide the width;
    that shows only in pictures that move, not in noise."""
    time, y, x = torch.meshgrid(torch.arange(17), torch.arange(160), torch.arange(240), indexing="ij")
    ramps, waves = (x + 5 * time) / 17, (y - 3 * time) / 13 + x / 40
    colours = [60 * torch.sin(ramps + turn) + 50 * torch.cos(waves + turn) for turn in range(3)]
    frames = (127 + torch.stack(colours, -1)).to(torch.uint8)
    perturb = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # glibc fills what it gives and takes
    written = set()
    try:
        for level in (0, 1, 85, 170):
            perturb(-6, level)  # M_PERTURB
            media_write.write_video(tmp_path / f"out{suffix}", frames, 16)
            written.add((tmp_path / f"out{suffix}").read_bytes())
    finally:
        perturb(-6, 0)
    assert len(written) == 1


def test_writing_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="even width and height, got 63x48"):
        media_write.write_video(tmp_path / "odd.mp4", ramp(2, width=63), 16)
    with pytest.raises(MediaError, match=r"unknown suffix '\.txt'"):
        media_write.write_video(tmp_path / "clip.txt", ramp(2), 16)
    with pytest.raises(ValueError, match="uint8"):
        media_write.write_video(tmp_path / "float.mp4", ramp(2).float(), 16)
    with pytest.raises(ValueError, match="fps must be positive"):
        media_write.write_video(tmp_path / "still.mp4", ramp(2), 0)
    with pytest.raises(MediaError, match=f"the directory {tmp_path}/nowhere does not exist"):
        media_write.write_video(tmp_path / "nowhere" / "clip.mp4", ramp(2), 16)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(MediaError, match="is a directory"):
        media_write.write_image(tmp_path / "folder.png", ramp(1)[0])
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.png"]


def test_a_directory_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # a read-only directory does not stop root, who may run the tests
    with pytest.raises(MediaError, match=r"clip\.mp4: cannot be written \(Permission denied\)"):
        media_write.write_video(tmp_path / "clip.mp4", ramp(2), 16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    path = tmp_path / "clip.mp4"
    media_write.write_video(path, ramp(3), 16)
    before = path.read_bytes()
    seen: list[str] = []

    class Frames:
        @staticmethod
        def from_ndarray(*_: object, **__: object) -> None:
            seen.extend(entry.name for entry in tmp_path.iterdir())
            raise error

    monkeypatch.setattr(av, "VideoFrame", Frames)
    with pytest.raises(error):
        media_write.write_video(path, ramp(9), 16)
    assert len(seen) == 2, "the new file grows beside the old one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["clip.mp4"] and path.read_bytes() == before


def test_new_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    media_write.write_image(tmp_path / "image.png", ramp(1)[0])
    assert (tmp_path / "image.png").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_images_come_back(tmp_path: Path) -> None:
    image = torch.from_numpy(np.random.default_rng(1).integers(0, 255, (32, 48, 3), dtype=np.uint8))
    media_write.write_image(tmp_path / "image.png", image)
    assert torch.equal(media.read_image(tmp_path / "image.png"), image)


def test_contact_sheet_shows_every_row(tmp_path: Path) -> None:
    colours = torch.tensor([[200, 30, 30], [30, 200, 30]], dtype=torch.uint8)
    rows = [
        ("a red video " * 30, colours[0].expand(17, 64, 96, 3)),
        ("one green image", colours[1].expand(48, 48, 3)),
    ]
    contact_sheet(rows, tmp_path / "sheet.png", title="two rows")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    cell = 224  # pixels of the long edge
    red = (np.abs(sheet - colours[0].numpy()).sum(-1) < 10).sum()
    green = (np.abs(sheet - colours[1].numpy()).sum(-1) < 10).sum()
    assert red == 6 * cell * round(cell * 64 / 96)
    assert green == cell * cell
    assert (sheet[:40].sum(-1) < 100).any(), "a title in black"
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([], tmp_path / "none.png")


# --- animations, folders of frames, results of any kind -------------------------------------------------------------


@pytest.mark.parametrize(("fps", "count"), [(16, 9), (29.97, 30), (100, 5), (16, 1)])
def test_animations_keep_frames_and_rate(tmp_path: Path, fps: float, count: int) -> None:
    media_write.write_video(tmp_path / "a.gif", ramp(count).clone(), fps)
    with av.open(str(tmp_path / "a.gif")) as container:
        stamps = [frame.pts for frame in container.decode(video=0)]
    assert stamps == [int(100 * number / min(fps, 50) + 0.5) for number in range(count)], "hundredths of a second"
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.info["loop"] == 0, "for ever"
    assert numbers(media.read_video(tmp_path / "a.gif", fps=min(fps, 50)).frames)[:5] == list(range(count))[:5]


def test_animations_have_a_palette_of_their_own(tmp_path: Path) -> None:
    """Colours that no fixed palette has, the same in all frames: nothing flickers where nothing moves."""
    ring = torch.linspace(0, 1, 64)
    colours = torch.stack([150 + 40 * ring, 60 + 25 * ring, 100 + 30 * ring], -1).to(torch.uint8)
    frames = colours.expand(6, 49, 64, 3).contiguous()
    media_write.write_video(tmp_path / "a.gif", frames, 10)
    got = media.read_video(tmp_path / "a.gif", fps=10, size=(64, 49)).frames[:5]
    assert (got.float() - frames[:5].float()).abs().mean() < 3, "an odd size, and good colours"
    assert all(torch.equal(got[0], frame) for frame in got)


def test_any_result(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.gif", "a.png", "a.webp", "a.jpg"):
        media_write.check_output(tmp_path / name, 1)
        media_write.write_media(tmp_path / name, media.Clip(ramp(1), 16))
    assert len(list(tmp_path.iterdir())) == 5
    for name in ("b.png", "b.JPG"):
        assert media_write.is_picture(name)
        for refuse in (
            lambda path: media_write.check_output(path, 5),
            lambda path: media_write.write_media(path, media.Clip(ramp(5), 16)),
        ):
            with pytest.raises(
                MediaError, match=r"5 frames do not fit into a picture; the suffixes of videos are \.mp4"
            ):
                refuse(tmp_path / name)
    for name, message in {
        "c": "unknown suffix ''",
        "c.webm": "expected one of .mp4",
        "no/c.gif": "does not exist",
    }.items():
        with pytest.raises(MediaError, match=message):
            media_write.check_output(tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 5, "a check leaves nothing"


def test_a_folder_of_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_frames_folder(tmp_path / "new")
    assert not list(tmp_path.iterdir())
    write_frames(tmp_path / "new", ramp(12))
    (tmp_path / "empty").mkdir()
    write_frames(tmp_path / "empty", ramp(2))
    assert [path.name for path in sorted((tmp_path / "new").iterdir())] == [f"{n:05d}.png" for n in range(12)]
    assert torch.equal(media.read_image(tmp_path / "new" / "00011.png"), ramp(12)[11])
    assert len(list((tmp_path / "empty").iterdir())) == 2
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode
    with pytest.raises(MediaError, match="new: exists and is not empty"):
        write_frames(tmp_path / "new", ramp(2))
    with pytest.raises(MediaError, match=r"00000\.png: exists and is no folder"):
        check_frames_folder(tmp_path / "new" / "00000.png")
    with pytest.raises(MediaError, match="frames: cannot be written .the directory .*nowhere does not exist"):
        check_frames_folder(tmp_path / "nowhere" / "frames")
    with pytest.raises(ValueError, match="uint8"):
        write_frames(tmp_path / "float", ramp(2).float())
    monkeypatch.chdir(tmp_path)
    check_frames_folder("relative")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new", "usual"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_folder_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | BaseException
) -> None:
    seen: list[int] = []

    def write(path: Path, _: Tensor) -> None:
        seen.append(len(list(tmp_path.iterdir())))
        if len(seen) == 3:
            raise error
        path.touch()

    monkeypatch.setattr(frames_folder, "write_image", write)
    stopped = error is KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt if stopped else MediaError, match=None if stopped else "No space left"):
        write_frames(tmp_path / "frames", ramp(5))
    assert seen == [1, 1, 1] and not list(tmp_path.iterdir())


def test_the_sheet_of_tasks(tmp_path: Path) -> None:
    """Every source and the result of every task can be found in the picture by its colour."""

    def flat(count: int, *colour: int) -> Tensor:
        return torch.tensor(colour, dtype=torch.uint8).expand(count, 40, 60, 3).contiguous()

    panels = [
        Panel("t2i", "words", [], flat(1, 200, 0, 0)),
        Panel("rv2v", "words", [("film", flat(9, 0, 200, 0)), ("still", flat(1, 0, 0, 200)[0])], flat(9, 200, 200, 0)),
    ]
    task_sheet(panels, tmp_path / "sheet.png", "title")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    tile = 168 * 112
    for colour, tiles in (((200, 0, 0), 1), ((0, 200, 0), 2), ((0, 0, 200), 1), ((200, 200, 0), 4)):
        assert int((np.abs(sheet - colour).max(-1) < 8).sum()) == pytest.approx(tiles * tile, rel=0.01)
    task_sheet(panels[:1], tmp_path / "one.png", "title")
    with Image.open(tmp_path / "one.png") as one:
        assert one.height < sheet.shape[0]
    with pytest.raises(ValueError, match="at least one panel"):
        task_sheet([], tmp_path / "none.png", "title")

"""The rendered letters: complete, distinct, disjoint, reproducible to the byte, and of a sensible difficulty."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="glyphs need matplotlib's fonts")
pytest.importorskip("PIL", reason="glyphs need Pillow")

from fastmaml.tasks import Glyphs, glyphs
from fastmaml.tasks.glyph_alphabets import ALPHABETS, Alphabet, letters
from fastmaml.tasks.glyph_drawers import DRAWERS, draw, make_drawers
from fastmaml.tasks.glyph_fonts import BOX, CANVAS, FACES, FontFace, coverage, fallbacks
from fastmaml.tasks.glyph_strokes import draw_with_pen, soften, thin
from fastmaml.tasks.glyphs import load_glyphs


@pytest.fixture(scope="module")
def sources() -> dict[str, Glyphs]:
    return {split: Glyphs(split=split) for split in ("train", "val", "test")}


# ---------------------------------------------------------------- the set


def test_there_are_hundreds_of_characters_in_more_than_ten_scripts(sources):
    assert {split: source.characters for split, source in sources.items()} == {
        "train": pytest.approx(780, abs=30),
        "val": pytest.approx(82, abs=8),
        "test": pytest.approx(175, abs=10),
    }
    scripts = {unicodedata.name(chr(point)).split()[0] for point in load_glyphs().points}
    assert len(scripts) > 10, scripts


def test_alphabets_belong_to_one_split(sources):
    alphabets = {split: {name.split("/")[0] for name in source.class_names} for split, source in sources.items()}
    assert set.union(*alphabets.values()) == {a.name for a in ALPHABETS}
    assert sum(map(len, alphabets.values())) == len(ALPHABETS)


def test_look_alikes_count_once():
    points = set(load_glyphs().points)
    for latin, greek, cyrillic in ("AΑА", "OΟО", "TΤТ", "HΗН"):
        assert len(points & {ord(latin), ord(greek), ord(cyrillic)}) == 1
    assert {ord(c) for c in "AЖΞקⵣ"} <= points


def test_every_drawing_has_ink_and_no_two_are_the_same(sources):
    for source in sources.values():
        flat = source.images.reshape(-1, 28 * 28)
        ink = flat.mean(1) / 255
        assert ink.min() > 0.003 and ink.max() < 0.6
        assert flat.max() == 255
        assert len(np.unique(flat, axis=0)) == len(flat)


def test_ink_rarely_leaves_the_frame(sources):
    images = sources["train"].images[:, :, 0] > 127
    border = np.zeros((28, 28), bool)
    border[[0, -1]] = border[:, [0, -1]] = True
    assert (images & border).any((-2, -1)).mean() < 0.05


def test_a_batch_has_the_right_shape_and_range(sources):
    batch = sources["train"].sample(4)
    assert [tuple(t.shape) for t in batch] == [(4, 5, 1, 28, 28), (4, 5), (4, 75, 1, 28, 28), (4, 75)]
    assert batch.support_x.dtype == torch.float32 and batch.query_x.min() >= 0 and batch.query_x.max() == 1
    assert batch.query_x.mean() < 0.3  # ink = 1 on empty paper


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_tasks_are_neither_trivial_nor_hopeless_for_pixels(split):
    batch = Glyphs(split=split, rotations=False).sample(300, step=0)
    distance = torch.cdist(batch.query_x.flatten(2), batch.support_x.flatten(2))
    assert 0.35 < (distance.argmin(2) == batch.query_y).float().mean() < 0.60


def test_train_characters_are_turned_and_others_not(sources):
    assert sources["train"].classes == 4 * sources["train"].characters
    assert sources["test"].classes == sources["test"].characters


# ---------------------------------------------------------------- drawing


def drawings(seed: int, count: int = 40) -> np.ndarray:
    lines = thin(FontFace("DejaVuSerif").masks(range(0x10D0, 0x10D0 + count)))
    drawer = make_drawers(seed)[1]
    return draw(lines, drawer, np.random.Generator(np.random.Philox(key=np.array([seed, 1], np.uint64))))


def test_the_same_seed_draws_the_same_bytes_and_another_does_not():
    assert drawings(0).tobytes() == drawings(0).tobytes()
    assert drawings(0).tobytes() != drawings(1).tobytes()


def test_a_new_rendering_equals_the_cached_one(tmp_path, monkeypatch):
    """Two independent renderings of the whole set, shortened to one alphabet."""
    few = (Alphabet("Hebrew", "train", ((0x5D0, 0x5EA),)),)
    monkeypatch.setattr("fastmaml.tasks.glyph_characters.ALPHABETS", few)
    first, second = (load_glyphs(3, tmp_path / folder) for folder in ("a", "b"))
    assert first.images.tobytes() == second.images.tobytes() and len(first.points) > 10
    monkeypatch.setattr(glyphs, "render_glyphs", lambda _: pytest.fail("rendered again"))
    again = load_glyphs(3, tmp_path / "a")
    assert again.images.tobytes() == first.images.tobytes() and again[1:] == first[1:]


def test_drawers_are_many_and_different():
    drawers = make_drawers(0)
    assert len(set(drawers)) == DRAWERS and {d.face for d in drawers} == set(FACES)
    assert len({d.pen for d in drawers}) >= 4
    assert make_drawers(0) == drawers != make_drawers(1)


def test_a_drawing_is_never_the_same_twice():
    lines = thin(FontFace("DejaVuSans").masks([ord("R")] * 10))
    images = draw(lines, make_drawers(0)[0], np.random.Generator(np.random.Philox(key=[0, 0])))
    assert len({image.tobytes() for image in images}) == 10


def test_masks_fill_their_box_and_are_centred():
    masks = FontFace("DejaVuSans").masks([ord(c) for c in "AWiⵣ"])
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert max(height, width) == pytest.approx(BOX, abs=2)
        assert abs(rows[0] + rows[-1] - CANVAS + 1) <= 1 and abs(columns[0] + columns[-1] - CANVAS + 1) <= 1


def test_every_face_finds_every_letter_somewhere():
    covered = coverage("DejaVuSans")
    for face in FACES:
        assert fallbacks(face)[0] == face and set().union(*map(coverage, fallbacks(face))) >= covered


def test_letters_are_letters_on_their_own():
    found = letters(Alphabet("x", "train", ((0x30, 0x24F), (0x2B0, 0x2B8))), range(0x400))
    assert {ord("A"), ord("ß"), ord("ø")} <= set(found)
    assert not {ord("5"), ord("é"), ord("×"), 0x2B0} & set(found)


def test_thinning_leaves_one_pixel_wide_lines_and_keeps_holes():
    mask = np.zeros((2, 40, 40), bool)
    mask[0, 10:17, 5:35] = True  # a bar
    mask[1, 8:32, 8:32] = True  # a ring
    mask[1, 14:26, 14:26] = False
    lines = thin(mask)
    assert (lines <= mask).all()
    assert lines[0].sum(0).max() == 1 and lines[0].sum() > 20
    assert (lines[1, 20] > 0).sum() == 2 and (lines[1, :, 20] > 0).sum() == 2
    assert (thin(lines.astype(bool)) == lines).all()


def test_thinning_keeps_diagonal_lines_of_any_width():
    row, column = np.mgrid[:60, :60]
    for width in range(1, 9):
        mask = ((row - column >= 0) & (row - column < width) & (row > 9) & (row < 50))[None]
        lines = thin(mask)[0]
        assert lines.sum() >= 35 and lines.sum(1).max() <= 2


def test_thinning_neither_breaks_a_letter_nor_joins_its_parts():
    """Connected parts, counted by flooding, of print and of centre line."""
    masks = FontFace("DejaVuSans").masks([ord(c) for c in "KX8iΞЖ\u05e7\u0e97"])
    assert [parts(mask) for mask in masks] == [parts(lines) for lines in thin(masks)] == [1, 1, 1, 2, 3, 1, 2, 1]


def parts(ink: np.ndarray) -> int:
    left, count = {(int(y), int(x)) for y, x in np.argwhere(ink)}, 0
    while left:
        count, reached = count + 1, [left.pop()]
        while reached:
            y, x = reached.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            reached.extend(near)
    return count


def test_a_dot_stays_visible():
    mask = np.zeros((1, 40, 40), bool)
    mask[0, 18:23, 18:23] = True
    assert thin(mask).sum() == 9


@pytest.mark.parametrize(
    ("squared_radius", "area"), [(0, 1), (1, 5), (2, 9), (4, 13), (5, 21), (8, 25), (9, 29), (10, 37)]
)
def test_a_pen_leaves_a_disc(squared_radius, area):
    lines = np.zeros((1, 15, 15), np.uint8)
    lines[0, 7, 7] = 1
    ink = draw_with_pen(lines, squared_radius)
    assert ink.sum() == area and (ink == ink[:, ::-1]).all() and (ink == ink.transpose(0, 2, 1)).all()


def test_soften_is_the_mean_of_nine():
    ink = np.zeros((1, 5, 5), np.uint8)
    ink[0, 2, 2] = 1
    assert soften(ink)[0, 1:4, 1:4] == pytest.approx(np.full((3, 3), 1 / 9)) and soften(ink).sum() == pytest.approx(1)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"ways": 2000}, "ways=2000 is more than the .* characters of glyphs train"),
        ({"shots": 10, "query_shots": 11}, "shots=10 \\+ query_shots=11 is more than the 20 images"),
        ({"split": "eval"}, "unknown split 'eval': choose one of train, val, test"),
        ({"drawing_seed": -1}, "drawing_seed must be at least 0, not -1"),
    ],
    ids=str,
)
def test_bad_settings_are_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Glyphs(**arguments)


@pytest.mark.parametrize("missing", ["matplotlib", "PIL"])
def test_a_missing_extra_is_named(monkeypatch, missing):
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    with pytest.raises(ImportError, match="pip install 'fastmaml\\[vision\\]'"):
        Glyphs()

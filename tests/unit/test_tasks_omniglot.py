"""Omniglot from zips: stand-ins of full size for the loader, the real ones (FASTMAML_DATA) for known facts."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmaml.tasks import Omniglot, omniglot_files
from fastmaml.tasks.cache import cache_folder
from fastmaml.tasks.omniglot_files import BACKGROUND, EVALUATION, Part, decode, load_omniglot
from fastmaml.tasks.omniglot_splits import lake_split, vinyals_split

EVALUATION_ALPHABETS = {
    "Angelic", "Atemayar_Qelisayer", "Atlantean", "Aurek-Besh", "Avesta", "Ge_ez", "Glagolitic", "Gurmukhi", "Kannada", "Keble",
    "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)", "Oriya", "Sylheti", "Syriac_(Serto)", "Tengwar",
    "Tibetan", "ULOG",
}  # fmt: skip
GIVEN_DATA, GIVEN_CACHE = os.environ.get("FASTMAML_DATA"), cache_folder()
SMALL = Part("images_background", 3, "")


def png(code: int, side: int = 105) -> bytes:
    """A 1-bit picture, white but for 2 by 2 finished pixels of ink for every bit of `code`."""
    pixels = np.full((side, side), 255, np.uint8)
    for bit in range(11):
        if code >> bit & 1:
            pixels[10 * bit // 2 : 10 * bit // 2 + 4, :8] = 0
    out = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(out, "PNG")
    return out.getvalue()


def write_zip(path: Path, folder: str, characters: list[str], pictures: list[bytes], drawers: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as out:
        out.writestr(f"{folder}/", "")
        out.writestr(f"__MACOSX/{folder}/._Greek", "litter of another system")
        for number, (character, picture) in enumerate(zip(characters, pictures)):
            for drawer in range(drawers):
                out.writestr(f"{folder}/{character}/{number + 1:04d}_{drawer + 1:02d}.png", picture)
    return path


@pytest.fixture
def small(tmp_path) -> Path:
    return write_zip(
        tmp_path / "images_background.zip",
        SMALL.name,
        [f"Greek/character0{i}" for i in (1, 2, 3)],
        [png(i) for i in (1, 2, 3)],
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """Zips with all 1623 names; the picture says the character's rank in alphabetical order."""
    root = tmp_path_factory.mktemp("full")
    names = sorted(vinyals_split())
    for part in (BACKGROUND, EVALUATION):
        chosen = [n for n in names if (n.split("/")[0] in EVALUATION_ALPHABETS) == (part is EVALUATION)]
        write_zip(root / "omniglot" / part.file_name, part.name, chosen, [png(names.index(n)) for n in chosen])
    return root


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, module_cache) -> None:
    """Neither the user's cache nor a real data set takes part unless a test asks for it."""
    monkeypatch.setenv("FASTMAML_CACHE", str(module_cache))
    monkeypatch.delenv("FASTMAML_DATA", raising=False)


# ---------------------------------------------------------------- splits


def test_vinyals_split_has_the_published_counts():
    owners = list(vinyals_split().values())
    assert [owners.count(split) for split in ("train", "val", "test")] == [1028, 172, 423]


@pytest.mark.parametrize(("splits", "counts"), [("vinyals", (1028, 172, 423)), ("lake", (813, 151, 659))])
def test_splits_are_disjoint_and_complete(full, splits, counts):
    sources = [Omniglot(split=split, splits=splits, root=full) for split in ("train", "val", "test")]
    assert tuple(source.characters for source in sources) == counts
    assert len({name for source in sources for name in source.class_names}) == 1623
    assert [source.classes for source in sources] == [4 * counts[0], counts[1], counts[2]]


def test_lake_splits_by_alphabet_and_tests_on_the_evaluation_set():
    owner = lake_split(["B/character01", *(f"{a}/character01" for a in "ACDEFG")], ["Z/character01"])
    assert [name[0] for name, split in owner.items() if split == "val"] == ["C", "D", "E", "F", "G"]
    assert owner["A/character01"] == owner["B/character01"] == "train" and owner["Z/character01"] == "test"


def test_images_belong_to_their_names(full):
    source = Omniglot(split="test", root=full, resize="nearest")
    names = sorted(vinyals_split())
    for index in (0, 100, 422):
        with zipfile.ZipFile(full / "omniglot" / "images_evaluation.zip") as archive:
            rank = names.index(source.class_names[index])
            original = np.asarray(Image.open(io.BytesIO(png(rank))).resize((28, 28)))  # a 1-bit picture: NEAREST
            assert any(source.class_names[index] in name for name in archive.namelist())
        assert ((source.images[index, :, 0] == 255) == ~original).all()


def test_a_batch_has_ink_1_and_the_right_shape(full):
    batch = Omniglot(5, 1, 15, root=full).sample(4)
    assert [tuple(t.shape) for t in batch] == [(4, 5, 1, 28, 28), (4, 5), (4, 75, 1, 28, 28), (4, 75)]
    assert batch.query_x.min() >= 0.0 and 0.8 < batch.query_x.max() <= 1.0 and batch.query_x.mean() < 0.5
    one_bit = Omniglot(5, 1, 15, root=full, resize="nearest").sample(4)
    assert set(one_bit.query_x.unique().tolist()) == {0.0, 1.0}


# ---------------------------------------------------------------- files


def test_decoding_happens_once(full, monkeypatch):
    Omniglot(split="val", root=full)
    monkeypatch.setattr(omniglot_files, "decode", lambda *_: pytest.fail("decoded again"))
    Omniglot(split="test", root=full)


def test_a_changed_zip_is_decoded_again(full, tmp_path):
    shutil.copytree(full / "omniglot", tmp_path / "omniglot")
    Omniglot(root=tmp_path)
    (tmp_path / "omniglot" / BACKGROUND.file_name).write_bytes(b"")
    with pytest.raises(ValueError, match="images_background.zip is damaged or incomplete"):
        Omniglot(root=tmp_path)


@pytest.mark.parametrize("below", ["", "omniglot", "omniglot-py"])
def test_zips_are_found_in_the_usual_places(full, tmp_path, monkeypatch, below):
    (tmp_path / below).mkdir(exist_ok=True)
    for part in (BACKGROUND, EVALUATION):
        os.link(full / "omniglot" / part.file_name, tmp_path / below / part.file_name)
    monkeypatch.setenv("FASTMAML_DATA", str(tmp_path))
    assert omniglot_files._find(BACKGROUND, None, False) == tmp_path / below / BACKGROUND.file_name


def test_a_missing_zip_is_one_helpful_sentence(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="images_background.zip is missing: put the public .* --root.* --download'$"
    ) as caught:
        Omniglot(root=tmp_path, download=False)
    assert "\n" not in str(caught.value)


def test_no_network_is_one_helpful_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(omniglot_files, "SOURCE", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="is missing and downloading it from http.* failed .*--root$") as caught:
        Omniglot(root=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_download_lands_in_the_root_and_is_used(full, tmp_path, monkeypatch):
    def fetch(url: str, target: Path, md5: str) -> None:
        assert url == f"{omniglot_files.SOURCE}/{target.name}" and len(md5) == 32
        shutil.copy2(full / "omniglot" / target.name, target)

    monkeypatch.setattr(omniglot_files, "download_file", fetch)
    assert Omniglot(root=tmp_path, split="val").characters == 172
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images_background.zip", "images_evaluation.zip"]


def test_a_good_zip_is_read_whatever_its_checksum(small):
    names, images = decode(SMALL, small, resize="nearest")
    assert names == [f"Greek/character0{i}" for i in (1, 2, 3)] and images.shape == (3, 20, 28, 28)
    assert set(np.unique(images)) == {0, 255}


def test_a_truncated_zip_is_one_sentence(small):
    small.write_bytes(small.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="is damaged or incomplete \\(File is not a zip file\\): delete it, then run"):
        decode(SMALL, small)


def test_a_corrupt_picture_is_one_sentence(small):
    data = bytearray(small.read_bytes())
    at = data.index(b"IDAT") + 6
    data[at] ^= 0xFF
    small.write_bytes(data)
    with pytest.raises(
        ValueError,
        match="is damaged or incomplete \\(Bad CRC-32 for file 'images_background/Greek/character01/0001_01.png'\\)",
    ):
        decode(SMALL, small)


def test_a_picture_that_is_none_is_one_sentence(tmp_path):
    path = write_zip(
        tmp_path / "images_background.zip",
        SMALL.name,
        ["A/character01", "A/character02", "A/character03"],
        [b"not a png"] * 3,
    )
    with pytest.raises(ValueError, match="A/character01/0001_01.png in .* is not a readable picture"):
        decode(SMALL, path)


def test_a_picture_cut_short_is_one_sentence(tmp_path):
    path = write_zip(
        tmp_path / "images_background.zip",
        SMALL.name,
        ["A/character01", "A/character02", "A/character03"],
        [png(1)[:-30]] * 3,
    )
    with pytest.raises(ValueError, match="is not a readable picture"):
        decode(SMALL, path)


def test_pictures_of_another_size_are_refused(tmp_path):
    path = write_zip(
        tmp_path / "images_background.zip",
        SMALL.name,
        ["A/character01", "A/character02", "A/character03"],
        [png(1, 64)] * 3,
    )
    with pytest.raises(ValueError, match="is 64x64 pixels, not 105x105"):
        decode(SMALL, path)


def test_missing_characters_are_counted(small):
    with pytest.raises(
        ValueError, match="holds 3 characters of images_background, not 964: it is not the public Omniglot zip"
    ):
        decode(BACKGROUND, small)


def test_the_other_zip_under_this_name_is_refused(small):
    with pytest.raises(ValueError, match="holds 0 characters of images_evaluation, not 659"):
        decode(EVALUATION, small)


def test_missing_drawings_are_counted(tmp_path):
    path = write_zip(
        tmp_path / "x.zip", SMALL.name, ["A/character01", "A/character02", "A/character03"], [png(1)] * 3, drawers=19
    )
    with pytest.raises(ValueError, match="holds 19 drawings of A/character01, not 20"):
        decode(SMALL, path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"split": "valid"}, "unknown split 'valid'"),
        ({"splits": "ravi"}, "unknown splits 'ravi': choose 'vinyals' or 'lake'"),
        ({"resize": "bicubic"}, "unknown resize 'bicubic'"),
        ({"ways": 173, "split": "val"}, "ways=173 is more than the 172 characters of omniglot val"),
        ({"shots": 6}, "shots=6 \\+ query_shots=15 is more than the 20 images"),
    ],
    ids=str,
)
def test_bad_settings_are_one_sentence(full, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Omniglot(root=full, **arguments)


# ---------------------------------------------------------------- the real data


def unpacked() -> Path:
    """Folder with the real zips: that of FASTMAML_DATA, or what its unpack.py writes, kept in the user's cache folder."""
    if not GIVEN_DATA:
        pytest.skip(
            "FASTMAML_DATA is not set: it names a folder with the Omniglot zips, or with omniglot_105.npz and unpack.py"
        )
    data = Path(GIVEN_DATA)
    if any((data / below / BACKGROUND.file_name).is_file() for below in ("", "omniglot", "omniglot-py")):
        return data
    packed = data / "omniglot_105.npz"
    if not packed.is_file() or not (data / "unpack.py").is_file():
        pytest.fail(f"FASTMAML_DATA={data} has neither the Omniglot zips nor omniglot_105.npz with unpack.py")
    target = GIVEN_CACHE / f"test-omniglot-{packed.stat().st_size}-{packed.stat().st_mtime_ns}"
    if not target.is_dir():
        spec = importlib.util.spec_from_file_location("unpack", data / "unpack.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        module.omniglot(part / "omniglot")
        try:
            part.rename(target)
        except OSError:  # another worker of pytest was first
            shutil.rmtree(part)
            assert target.is_dir()
    return target


@pytest.fixture
def real(elsewhere, monkeypatch) -> Path:
    monkeypatch.setenv("FASTMAML_CACHE", str(GIVEN_CACHE))
    return unpacked()


def nearest_neighbour_accuracy(source: Omniglot, tasks: int = 600) -> float:
    batch = source.sample(tasks, step=0)
    distance = torch.cdist(batch.query_x.flatten(2), batch.support_x.flatten(2))
    return (distance.argmin(2) == batch.query_y).float().mean().item()


@pytest.mark.parametrize(("ways", "known"), [(5, 0.420), (20, 0.225)])
def test_pixel_nearest_neighbour_meets_the_known_figure(real, ways, known):
    # The known figures are for smoothly resized images. 600 tasks have a standard deviation of 0.9 % (5-way) and
    # 0.35 % (20-way). The known run has the same deviation, so the tolerance is 3 sqrt(2) times as large.
    accuracy = nearest_neighbour_accuracy(Omniglot(ways, 1, 1, "test", root=real))
    assert accuracy == pytest.approx(known, abs={5: 0.038, 20: 0.015}[ways])


def test_pixel_nearest_neighbour_is_lower_on_one_bit_images(real):
    accuracy = nearest_neighbour_accuracy(Omniglot(5, 1, 1, "test", root=real, resize="nearest"))
    assert 0.33 < accuracy < 0.40  # 36.5 % with the tasks of any seed; the thin lines of NEAREST rarely overlap


def test_official_runs_meet_the_known_figure_exactly(real):
    runs = real / "omniglot" / "official_runs.json"
    if not runs.is_file():
        pytest.skip("official_runs.json does not lie beside the zips")
    background, evaluation = load_omniglot(real)
    index = {name: i for i, name in enumerate(background.names + evaluation.names)}
    images = np.concatenate((background.images, evaluation.images)) / 255

    def pick(items: list[dict[str, Any]]) -> np.ndarray:
        return np.stack([images[index[item["class"]], item["drawer"] - 1].ravel() for item in items])

    right = []
    for run in json.loads(runs.read_text()):
        train, test = pick(run["train"]), pick(run["test"])
        distance = ((test[:, None] - train[None]) ** 2).sum(-1)
        right.append(np.mean(distance.argmin(1) == np.array(run["label"])))
    assert np.mean(right) == pytest.approx(0.210, abs=1e-12)


def test_the_split_list_is_the_published_one(real):
    published = real / "omniglot" / "splits.json"
    if not published.is_file():
        pytest.skip("splits.json does not lie beside the zips")
    expected = {name: split for split, names in json.loads(published.read_text())["vinyals"].items() for name in names}
    assert vinyals_split() == expected

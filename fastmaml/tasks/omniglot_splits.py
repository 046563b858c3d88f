"""The published splits of Omniglot's characters. A character is named "Alphabet/characterNN"."""

from __future__ import annotations

from importlib import resources

LAKE_VALIDATION_ALPHABETS = 5


def vinyals_split() -> dict[str, str]:
    """Character -> split of Vinyals et al. (2016): 1028 train, 172 val, 423 test."""
    text = resources.files(__package__).joinpath("omniglot_vinyals.txt").read_text("utf-8")
    owner = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        split, alphabet, numbers = line.split()
        first, last = map(int, numbers.split("-"))
        owner.update({f"{alphabet}/character{number:02d}": split for number in range(first, last + 1)})
    return owner


def lake_split(background: list[str], evaluation: list[str]) -> dict[str, str]:
    """Character -> split of Lake et al. (Science, 2015): the evaluation set tests, the background set trains.

    Lake et al. have no validation set. We use the last five of the thirty background alphabets, in alphabetical order:
    Ojibwe, Sanskrit, Syriac, Tagalog, Tifinagh (151 characters; 813 remain).
    """
    held_out = set(sorted({name.split("/")[0] for name in background})[-LAKE_VALIDATION_ALPHABETS:])
    owner = {name: "val" if name.split("/")[0] in held_out else "train" for name in background}
    owner.update(dict.fromkeys(evaluation, "test"))
    return owner

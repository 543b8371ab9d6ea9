"""Writes MTIL's eleven data sets as records of pictures and classes, from the copies that torchvision keeps.

    python recipes/prepare_mtil.py --data_root /where/MTIL/is               what lies there
    python recipes/prepare_mtil.py --data_root /where/MTIL/is --download    what is missing is fetched by torchvision

    <data_root>/{fgvc-aircraft-2013b, caltech101, dtd, ...}                as torchvision has them
    <data_root>/{aircraft, caltech101, ...}/{train,test}.json              written here; paths are relative to data_root
    <data_root>/{cifar100,mnist}/pictures/{train,test}/*.png               likewise, of sets without picture files

Splits are those of ZSCL: torchvision's, or 80 to 20 of the set in a fixed order (Caltech101, EuroSAT, SUN397; seed 42).
Only SUN397's order is not ZSCL's, which is that of the file system. Stanford Cars' page is gone, so torchvision cannot
fetch it: it takes `stanford_cars/` from elsewhere. `--only NAME ...` takes some of the sets.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import random_split
from torchvision import datasets

from mllm_keeplora.command_line import OptionParser, command
from mllm_keeplora.distributed.progress import progress
from mllm_keeplora.errors import ConfigError
from mllm_keeplora.resources import shipped
from mllm_keeplora.runs.files import write_json
from mllm_keeplora.yaml_files import read_yaml

TRAIN_SHARE, SPLIT_SEED = 0.8, 42  # ZSCL's, of sets without a split of their own

Shown = list[tuple[Path | Image.Image, int]]  # picture, class


class Source(NamedTuple):
    """A set of torchvision's.

    Attributes:
        build: the set, or a half of it.
        halves: arguments for the training and the test half; None where the set is split here.
        pictures: the pictures of what was built, with the number of their class.
        named: whether its own names of classes, blanks for underscores, are the stream's.
    """

    build: Callable[..., Any]
    halves: tuple[dict[str, Any], dict[str, Any]] | None
    pictures: Callable[[Any], Shown]
    named: bool = True


def _files(attribute: str) -> Callable[[Any], Shown]:
    return lambda built: [
        (Path(file), label) for file, label in zip(getattr(built, attribute), built._labels, strict=True)
    ]


def _samples(attribute: str) -> Callable[[Any], Shown]:
    return lambda built: [(Path(file), int(label)) for file, label in getattr(built, attribute)]


def _caltech101(built: Any) -> Shown:
    folder = Path(built.root) / "101_ObjectCategories"
    named = [(built.categories[label], index, label) for index, label in zip(built.index, built.y, strict=True)]
    return [(folder / name / f"image_{index:04d}.jpg", label) for name, index, label in named]


def _arrays(built: Any) -> Shown:
    return [
        (Image.fromarray(torch.as_tensor(each).numpy()), int(y))
        for each, y in zip(built.data, built.targets, strict=True)
    ]


def _halves(key: str, train: Any, test: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return {key: train}, {key: test}


SPLIT = _halves("split", "train", "test")
SOURCES = {
    "aircraft": Source(datasets.FGVCAircraft, SPLIT, _files("_image_files")),
    "caltech101": Source(datasets.Caltech101, None, _caltech101, named=False),
    "cifar100": Source(datasets.CIFAR100, _halves("train", True, False), _arrays),
    "dtd": Source(datasets.DTD, SPLIT, _files("_image_files")),
    "eurosat": Source(datasets.EuroSAT, None, _samples("samples"), named=False),
    "flowers": Source(datasets.Flowers102, SPLIT, _files("_image_files"), named=False),
    "food": Source(datasets.Food101, SPLIT, _files("_image_files")),
    "mnist": Source(datasets.MNIST, _halves("train", True, False), _arrays),
    "oxford_pet": Source(datasets.OxfordIIITPet, _halves("split", "trainval", "test"), _files("_images")),
    "stanford_cars": Source(datasets.StanfordCars, SPLIT, _samples("_samples")),
    "sun397": Source(datasets.SUN397, None, lambda built: sorted(_files("_image_files")(built))),
}


def main() -> None:
    with command():
        parser = OptionParser(Path(sys.argv[0]).name, __doc__)
        parser.add_argument("--data_root", type=Path, required=True, help="folder of the sets, as torchvision has them")
        parser.add_argument("--download", action="store_true", help="let torchvision fetch what is missing")
        parser.add_argument("--only", nargs="+", choices=list(SOURCES), default=list(SOURCES), help="some of the sets")
        given = parser.read(sys.argv[1:])
        for name in given.only:
            counts = prepare(name, given.data_root, given.download)
            print(f"{name}: {counts[0]} pictures to learn from, {counts[1]} to test on")


def prepare(name: str, root: Path, download: bool = False) -> tuple[int, int]:
    """Writes the records of one set.

    Args:
        name: of the set, a key of `SOURCES`.
        root: folder of the sets.
        download: whether torchvision may fetch it.

    Returns:
        Number of pictures in each half.

    Raises:
        ConfigError: the set is not there, is incomplete, or its classes are not those of the stream.
    """
    names: list[str] = read_yaml(shipped(f"recipes/streams/classes/{name}.yaml"))["names"]
    counts = []
    for half, shown in zip(("train", "test"), _read(name, root, download, names), strict=True):
        records = []
        for number, (picture, label) in enumerate(progress(f"{name} {half}", "pictures", shown)):
            if isinstance(picture, Image.Image):
                file = root / name / "pictures" / half / f"{number:05d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                picture.save(file)
                picture = file
            records.append({"image": picture.relative_to(root).as_posix(), "class": names[label]})
        (root / name).mkdir(exist_ok=True)
        write_json(root / name / f"{half}.json", records)
        counts.append(len(records))
    return counts[0], counts[1]


def _read(name: str, root: Path, download: bool, names: Sequence[str]) -> Iterator[Shown]:
    """The pictures of the training half, then those of the test half."""
    source = SOURCES[name]
    for half in source.halves or ({},):
        try:
            options = {"download": True} if download and name != "stanford_cars" else {}
            built = source.build(str(root), **half, **options)
            shown = source.pictures(built)
        except (RuntimeError, OSError, KeyError, ValueError) as error:
            raise ConfigError(
                f"{name}: torchvision does not find it in {root} ({error}); fetch it with --download, or put it there"
            ) from error
        own = [each.replace("_", " ") for each in built.classes] if source.named else names
        if sorted(own) != sorted(names):
            wrong = sorted(set(own) ^ set(names))
            raise ConfigError(f"{name}: its classes are not those of recipes/streams/classes/{name}.yaml: {wrong[:5]}")
        shown = [(picture, names.index(own[label])) for picture, label in shown]
        if source.halves is not None:
            yield shown
            continue
        train = int(TRAIN_SHARE * len(shown))
        seeded = torch.Generator().manual_seed(SPLIT_SEED)
        parts: Any = random_split(shown, [train, len(shown) - train], seeded)  # type: ignore[arg-type]
        for part in parts:
            yield [shown[index] for index in part.indices]


if __name__ == "__main__":
    main()

"""MTIL's sets in the layout in which torchvision keeps them, a few tiny pictures each, through to the reader."""

import gzip
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from mllm_keeplora.data.records import read_records
from mllm_keeplora.data.stream import load_stream
from mllm_keeplora.errors import ConfigError
from mllm_keeplora.recipes.prepare_mtil import SOURCES, prepare

ROOT = Path(__file__).resolve().parents[2]
STREAMS = [ROOT / f"recipes/streams/mtil_order_{order}.yaml" for order in (1, 2)]


def names(task: str) -> list[str]:
    stream = load_stream(STREAMS[0], check_files=False)
    [spec] = [spec for spec in stream.tasks if spec.name == task]
    classes = stream.classes(spec)
    assert classes is not None
    return list(classes.names)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (200, 30, 90)).save(path)


def lines(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\n" for text in texts))


def aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b/data"
    lines(data / "variants.txt", *names("aircraft"))
    lines(data / "images_variant_train.txt", "1025794 707-320", "1340192 MD-11")
    lines(data / "images_variant_test.txt", "1514522 F/A-18")
    for number in (1025794, 1340192, 1514522):
        picture(data / f"images/{number}.jpg")


def caltech101(root: Path) -> None:
    own = ["Faces", "Faces_easy", "Leopards", "Motorbikes", *names("caltech101")[4:]]
    assert own[4:] == sorted(own[4:], key=lambda name: own.index(name))
    folder = root / "caltech101/101_ObjectCategories"
    for number, name in enumerate(["BACKGROUND_Google", *own[:4], *(f"a{i:03d}" for i in range(97))]):
        picture(folder / name / f"image_{1 if number else 7:04d}.jpg")


def cifar100(root: Path) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    fine = [name.replace(" ", "_") for name in names("cifar100")]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": fine}))
    for half, labels in (("train", [0, 1, 99]), ("test", [1])):
        pixels = np.arange(len(labels) * 3072).reshape(len(labels), 3072).astype(np.uint8)
        (folder / half).write_bytes(pickle.dumps({"data": pixels, "fine_labels": labels}))


def dtd(root: Path) -> None:
    own = names("dtd")
    for half in ("train", "test"):
        files = [f"{name}/{name}_{half}.jpg" for name in own]
        lines(root / f"dtd/dtd/labels/{half}1.txt", *files)
        for file in files:
            picture(root / "dtd/dtd/images" / file)


EUROSAT = "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"


def eurosat(root: Path) -> None:
    for name in EUROSAT.split():
        picture(root / f"eurosat/2750/{name}/{name}_1.jpg")


def flowers(root: Path) -> None:
    folder = root / "flowers-102"
    for number in range(1, 4):
        picture(folder / f"jpg/image_{number:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([77, 1, 102])})
    savemat(folder / "setid.mat", {"trnid": np.array([1, 2]), "valid": np.array([], int), "tstid": np.array([3, 1])})


def food(root: Path) -> None:
    own = [name.replace(" ", "_") for name in names("food")]
    for half, number in (("train", 1), ("test", 2)):
        path = root / f"food-101/meta/{half}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({name: [f"{name}/{number}"] for name in own}))
        for name in own:
            picture(root / f"food-101/images/{name}/{number}.jpg")


def mnist(root: Path) -> None:
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    for prefix, labels in (("train", [3, 0]), ("t10k", [9])):
        pixels = np.full((len(labels), 28, 28), 7, np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.array(labels, np.uint8))):
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(head + array.tobytes())
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))


def oxford_pet(root: Path) -> None:
    own = sorted(names("oxford_pet"), key=str.lower)
    stems = [
        name.replace(" ", "_") if number % 2 else name.replace(" ", "_").lower() for number, name in enumerate(own)
    ]
    for half, number in (("trainval", 100), ("test", 101)):
        rows = [f"{stem}_{number} {label} 1 1" for label, stem in enumerate(stems, start=1)]
        lines(root / f"oxford-iiit-pet/annotations/{half}.txt", *rows)
        for stem in stems:
            picture(root / f"oxford-iiit-pet/images/{stem}_{number}.jpg")


def stanford_cars(root: Path) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(names("stanford_cars"), dtype=object)})
    kind = np.dtype([("class", "O"), ("fname", "O")])
    for path, half in (("devkit/cars_train_annos.mat", "train"), ("cars_test_annos_withlabels.mat", "test")):
        savemat(folder / path, {"annotations": np.array([(1, "00001.jpg"), (196, "00002.jpg")], dtype=kind)})
        picture(folder / f"cars_{half}/00001.jpg")
        picture(folder / f"cars_{half}/00002.jpg")


def sun397(root: Path) -> None:
    own = [name.replace(" ", "_") for name in names("sun397")]
    lines(root / "SUN397/ClassName.txt", *(f"/{name[0]}/{name}" for name in own))
    for name in ("abbey", "apse/indoor", "theater/indoor_procenium", "youth_hostel", "wave"):
        picture(root / f"SUN397/{name[0]}/{name}/sun_aaaa.jpg")


# Set -> what lays it out, pictures of each half, a picture and its class.
CASES: dict[str, tuple[Callable[[Path], None], tuple[int, int], str, str]] = {
    "aircraft": (aircraft, (2, 1), "fgvc-aircraft-2013b/data/images/1514522.jpg", "F/A-18"),
    "caltech101": (caltech101, (80, 21), "caltech101/101_ObjectCategories/Faces_easy/image_0001.jpg", "centered face"),
    "cifar100": (cifar100, (3, 1), "cifar100/pictures/test/00000.png", "aquarium fish"),
    "dtd": (dtd, (47, 47), "dtd/dtd/images/zigzagged/zigzagged_train.jpg", "zigzagged"),
    "eurosat": (eurosat, (8, 2), "eurosat/2750/SeaLake/SeaLake_1.jpg", "lake or sea"),
    "flowers": (flowers, (2, 2), "flowers-102/jpg/image_00003.jpg", "blackberry lily"),
    "food": (food, (101, 101), "food-101/images/hot_and_sour_soup/2.jpg", "hot and sour soup"),
    "mnist": (mnist, (2, 1), "mnist/pictures/train/00000.png", "3 - three"),
    "oxford_pet": (oxford_pet, (37, 37), "oxford-iiit-pet/images/American_Bulldog_100.jpg", "American Bulldog"),
    "stanford_cars": (stanford_cars, (2, 2), "stanford_cars/cars_test/00002.jpg", "smart fortwo Convertible 2012"),
    "sun397": (sun397, (4, 1), "SUN397/a/apse/indoor/sun_aaaa.jpg", "apse/indoor"),
}


@pytest.fixture(autouse=True)
def _small_copies_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision compares the hashes of these two."""
    monkeypatch.setattr(datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CIFAR100, "meta", {**datasets.CIFAR100.meta, "md5": None})
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)


@pytest.mark.parametrize("task", CASES)
def test_a_set_is_read_as_torchvision_keeps_it(tmp_path: Path, task: str) -> None:
    lay_out, counts, file, name = CASES[task]
    lay_out(tmp_path)
    assert prepare(task, tmp_path) == counts
    stream = load_stream(STREAMS[1], tmp_path, check_files=False)
    [spec] = [spec for spec in stream.tasks if spec.name == task]
    shown = {}
    for source, count in zip((stream.train_file(spec), stream.test_file(spec)), counts, strict=True):
        assert source is not None
        samples, bad = read_records(source, tmp_path, classes=stream.classes(spec))
        assert (len(samples), bad) == (count, {})
        shown |= {sample.media[0].path: sample.answers[0] for sample in samples.values()}
    assert all(path.is_file() for path in shown)
    assert shown[tmp_path / file] == name


def test_splits_that_a_set_does_not_have_are_zscls(tmp_path: Path) -> None:
    """torch's random_split with seed 42 in the order of folders, as its `split_dataset`."""
    eurosat(tmp_path)
    prepare("eurosat", tmp_path)
    train = json.loads((tmp_path / "eurosat/train.json").read_text())
    assert [record["image"].split("/")[2] for record in train] == [EUROSAT.split()[i] for i in (2, 6, 1, 8, 4, 5, 0, 9)]


def test_every_set_has_a_case_and_both_orders_learn_all() -> None:
    assert set(CASES) == set(SOURCES)
    orders = [[spec.name for spec in load_stream(path, check_files=False).tasks] for path in STREAMS]
    assert all(sorted(order) == sorted(CASES) for order in orders)
    assert (orders[0][0], orders[0][-1], orders[1][0], orders[1][-1]) == (
        *("aircraft", "sun397"),
        *("stanford_cars", "cifar100"),
    )


@pytest.mark.parametrize("task", CASES)
def test_a_set_that_is_not_there_is_named(tmp_path: Path, task: str) -> None:
    with pytest.raises(ConfigError, match=f"{task}: torchvision does not find it in .*--download"):
        prepare(task, tmp_path)


def test_classes_of_another_release_are_named(tmp_path: Path) -> None:
    aircraft(tmp_path)
    lines(tmp_path / "fgvc-aircraft-2013b/data/variants.txt", *names("aircraft")[:-1], "Zeppelin")
    with pytest.raises(ConfigError, match="its classes are not those of .*aircraft.yaml: .*Zeppelin"):
        prepare("aircraft", tmp_path)

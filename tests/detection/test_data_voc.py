"""The Pascal VOC reader: layouts, conventions, malformed files, and the BCCD photographs where they are at hand."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ioubal_kernels.detection.data import DataError, check_dataset, describe, load_dataset, load_pair, to_coco_dict

BCCD = Path(__file__).resolve().parents[3] / "shared" / "data" / "bccd"

SIZE = "<size><width>16</width><height>12</height><depth>3</depth></size>"


def box(xmin=3, ymin=4, xmax=8, ymax=9):
    return f"<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>"


def item(name="cat", bndbox=None, extra=""):
    return f"<object><name>{name}</name>{extra}{box() if bndbox is None else bndbox}</object>"


def xml(*objects, size=SIZE, filename="whatever.jpg"):
    return f"<annotation><filename>{filename}</filename>{size}{''.join(objects)}</annotation>"


def write(root: Path, annotations: dict, splits: dict | None = None):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in annotations.items():
        (root / "Annotations" / f"{name}.xml").write_bytes(text if isinstance(text, bytes) else text.encode())
        Image.new("RGB", (16, 12)).save(root / "JPEGImages" / f"{name}.jpg")
    for split, ids in (splits or {"train": list(annotations)}).items():
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return root


BOMB = (
    '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    "<annotation><filename>&b;</filename></annotation>"
)
EXTERNAL = '<!DOCTYPE annotation [<!ENTITY e SYSTEM "file:///etc/hostname">]><annotation><name>&e;</name></annotation>'

FAULTS = {
    "empty": ("", r"the file is empty \(0 bytes\)"),
    "blank": (" ", "not valid XML: no element found"),
    "truncated": (xml(item())[:-20], "not valid XML: "),
    "not xml": ("just text", "not valid XML: syntax error"),
    "broken utf-8": (b'<?xml version="1.0"?><annotation>\xff</annotation>', "not valid XML: "),
    "unknown encoding": (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "not (valid XML|usable): "),
    "another root": ("<html></html>", "expected the element <annotation> at the top, got <html>"),
    "entity bomb": (BOMB, "a DOCTYPE is refused"),
    "external entity": (EXTERNAL, "a DOCTYPE is refused"),
    "plain doctype": ("<!DOCTYPE annotation>" + xml(item()), "a DOCTYPE is refused"),
    "undefined entity": (xml(item("&cat;")), "not valid XML: undefined entity"),
    "utf-16 doctype": (("<!DOCTYPE annotation>" + xml(item())).encode("utf-16"), "a DOCTYPE is refused"),
    "no name": (xml("<object>" + box() + "</object>"), "a.xml: object 1: <name> is missing or empty"),
    "blank name": (xml(item("cat"), item("  ")), "a.xml: object 2: <name> is missing or empty"),
    "no bndbox": (xml(item(bndbox="")), "object 1: <bndbox> is missing"),
    "no xmax": (xml(item(bndbox=box().replace("<xmax>8</xmax>", ""))), "xmax: expected a finite number, got None"),
    "text for a number": (xml(item(bndbox=box(xmin="left"))), "xmin: expected a finite number, got 'left'"),
    "empty number": (xml(item(bndbox=box(ymax=""))), "ymax: expected a finite number, got ''"),
    "NaN": (xml(item(bndbox=box(ymin="nan"))), "ymin: expected a finite number, got 'nan'"),
    "infinity": (xml(item(bndbox=box(ymin="inf"))), "ymin: expected a finite number, got 'inf'"),
    "underscored number": (xml(item(bndbox=box(xmax="1_0"))), "xmax: expected a finite number, got '1_0'"),
    "inverted": (xml(item(bndbox=box(xmin=9, xmax=4))), "expected xmin <= xmax and ymin <= ymax"),
    "difficult maybe": (xml(item(extra="<difficult>maybe</difficult>")), "difficult: expected 0 or 1, got 'maybe'"),
    "width a word": (
        xml(item(), size=SIZE.replace("16", "wide")),
        "size: width: expected a positive integer, got 'wide'",
    ),
    "height negative": (
        xml(item(), size=SIZE.replace("12", "-12")),
        "size: height: expected a positive integer, got '-12'",
    ),
    "another size": (xml(item(), size=SIZE.replace("16", "17")), "the annotation says 17 x 12, the file has 16 x 12"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_malformed_annotation(tmp_path, name):
    text, message = FAULTS[name]
    write(tmp_path, {"a": text, "b": xml(item())})
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(tmp_path)
    assert len(caught.value.problems) == 1


SPLIT_FAULTS = {
    "missing annotation": ("a\nabsent\n", "absent.xml: the annotation file does not exist"),
    "listed twice": ("a\nb\na\n", "image id 'a' is listed twice"),
    "parent": ("a\n../b\n", "image id '../b' is refused: it contains '..'"),
    "absolute": ("/etc/hostname\na\n", "image id '/etc/hostname' is refused: it is an absolute path"),
    "sub-folder": ("x/b\n", "image id 'x/b' is refused: it contains '/'"),
    "backslash": ("x\\b\n", "image id .* is refused: it contains a backslash"),
    "three words": ("a b c\n", "line 1: expected one image id, got 'a b c'"),
    "not text": (b"\xff\xfe\x00", "cannot be read as a list of image ids"),
}


@pytest.mark.parametrize("name", SPLIT_FAULTS)
def test_malformed_split_file(tmp_path, name):
    text, message = SPLIT_FAULTS[name]
    write(tmp_path, {"a": xml(item()), "b": xml(item())})
    (tmp_path / "ImageSets/Main/train.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path)


def test_empty_split_and_no_objects(tmp_path):
    write(tmp_path, {"a": xml(item())}, {"train": ["a"], "hold": []})
    with pytest.raises(DataError, match="split 'hold': expected at least one image, got none"):
        load_dataset(tmp_path, "hold")
    write(tmp_path / "x", {"a": xml()})
    with pytest.raises(DataError, match="expected at least one object in the annotation files, got none"):
        load_dataset(tmp_path / "x")


def test_missing_image(tmp_path):
    write(tmp_path, {"a": xml(item()), "b": xml(item())})
    (tmp_path / "JPEGImages/b.jpg").unlink()
    with pytest.raises(DataError, match="JPEGImages/b.jpg: the file does not exist"):
        load_dataset(tmp_path)


def test_linked_annotation_to_outside_is_refused(tmp_path):
    write(tmp_path / "set", {"a": xml(item())})
    (tmp_path / "outside.xml").write_text(xml(item()))
    (tmp_path / "set/Annotations/b.xml").symlink_to(tmp_path / "outside.xml")
    with pytest.raises(DataError, match="b.xml: it is a link to outside"):
        load_dataset(tmp_path / "set")


def test_coordinates_flags_and_warts(tmp_path):
    objects = (
        item("dog", box(1, 1, 16, 12)),
        item("cat", box("3.5", "4.25", "8", "9.0"), "<difficult>1</difficult>"),
        item("cat", box(5, 5, 5, 5)),
        item("cat", box(10, 10, 40, 40)),
        item("cat", box(30, 30, 40, 40)),
    )
    write(tmp_path, {"a": xml(*objects, filename="other.jpg"), "b": xml()})
    dataset = load_dataset(tmp_path)
    # x1 = xmin - 1 and y1 = ymin - 1: a box over the whole image has the image's area.
    expected = [[0, 0, 16, 12], [2.5, 3.25, 8, 9], [9, 9, 16, 12]]
    first, second = dataset.records
    np.testing.assert_array_equal(first.boxes, np.array(expected, np.float32))
    assert first.areas.tolist() == [192, 5.5 * 5.75, 21]
    assert first.difficult.tolist() == [False, True, False] and len(second.boxes) == 0
    assert dataset.classes == ("cat", "dog") and first.labels.tolist() == [1, 0, 0]
    np.testing.assert_array_equal(first.train_boxes, np.array(expected, np.float32)[[0, 2]])
    assert dataset.notes.counts() == {
        "empty boxes dropped": 1,
        "boxes clipped to the image": 1,
        "boxes outside the image dropped": 1,
    }
    assert Path(first.path).name == "a.jpg"
    # Difficult objects are ignored in evaluation.
    assert [a["iscrowd"] for a in to_coco_dict(dataset)["annotations"]] == [0, 1, 0]
    assert "images without boxes: 1" in describe(dataset)


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_a_missing_size_is_read_from_the_image(tmp_path, size):
    record = load_dataset(write(tmp_path, {"a": xml(item(), size=size)})).records[0]
    assert (record.width, record.height) == (16, 12)


def test_a_changed_difficult_flag_is_other_data(tmp_path):
    """A run that goes on, or a comparison, would otherwise take two different evaluations for one."""
    before = load_dataset(write(tmp_path, {"a": xml(item())})).fingerprint()
    write(tmp_path, {"a": xml(item(extra="<difficult>1</difficult>"))})
    assert load_dataset(tmp_path).fingerprint() != before


def test_a_split_that_holds_others_shares_their_pictures(tmp_path):
    """The check does not warn of trainval; it does of one picture in train and in val."""
    splits = {"train": ["a"], "val": ["b"], "trainval": ["a", "b"]}
    write(tmp_path, {"a": xml(item()), "b": xml(item())}, splits)
    for shade, shared in ((90, False), (0, True)):
        Image.new("RGB", (16, 12), (shade, 0, 0)).save(tmp_path / "JPEGImages/b.jpg")
        assert any("pictures in two splits" in line for line in check_dataset(tmp_path).warnings) == shared


def test_image_suffixes(tmp_path):
    write(tmp_path, {"a": xml(item()), "b": xml(item())})
    (tmp_path / "JPEGImages/a.jpg").rename(tmp_path / "JPEGImages/a.JPG")
    Image.open(tmp_path / "JPEGImages/b.jpg").save(tmp_path / "JPEGImages/b.png")
    (tmp_path / "JPEGImages/b.jpg").unlink()
    assert [Path(r.path).name for r in load_dataset(tmp_path).records] == ["a.JPG", "b.png"]


def test_classes_come_from_all_annotation_files_in_a_stable_order(tmp_path):
    write(tmp_path, {"a": xml(item("person"), item("cat")), "b": xml(item("dog"))}, {"train": ["a"], "val": ["b"]})
    pair = load_pair(tmp_path)
    assert pair.training.classes == pair.evaluation.classes == ("cat", "dog", "person")
    assert pair.training.records[0].labels.tolist() == [2, 0]
    fixed = load_dataset(tmp_path, "val", classes=("person", "dog", "cat", "cow"))
    assert fixed.num_classes == 4 and fixed.records[0].labels.tolist() == [1]
    write(tmp_path, {"a": xml(item("person"), item("person"))}, {"train": ["a"]})
    with pytest.raises(DataError, match="image a: unknown class 'person': expected one of cat, dog") as caught:
        load_dataset(tmp_path, "train", classes=("cat", "dog"))
    assert str(caught.value).count("unknown class") == 1


def test_default_splits(tmp_path):
    texts = {name: xml(item()) for name in "abcd"}
    splits = {"train": ["a"], "val": ["b"], "trainval": ["b", "a"], "test": ["c", "d"]}
    write(tmp_path, texts, splits)
    (tmp_path / "ImageSets/Main/cat_train.txt").write_text("a  1\nb -1\n")
    pair = load_pair(tmp_path)
    assert (pair.training.split, pair.evaluation.split) == ("trainval", "test")
    assert [r.name for r in pair.training.records] == ["b", "a"]
    assert pair.training.splits == ("test", "train", "trainval", "val")
    pair = load_pair(tmp_path, "train", "val")
    assert (len(pair.training), len(pair.evaluation)) == (1, 1)
    assert [r.name for r in load_dataset(tmp_path, "train+test").records] == ["a", "c", "d"]
    for name in "cd":
        (tmp_path / f"Annotations/{name}.xml").unlink()
    pair = load_pair(tmp_path)
    assert (pair.training.split, pair.evaluation.split) == ("train", "val")


def test_without_split_files_everything_is_one_split(tmp_path):
    write(tmp_path, {"b": xml(item()), "a": xml(item())})
    (tmp_path / "ImageSets/Main/train.txt").unlink()
    pair = load_pair(tmp_path)
    assert pair.training.split == "all" and [r.name for r in pair.training.records] == ["a", "b"]
    assert pair.evaluation is None
    assert "none to evaluate on" in describe(pair.training, pair.evaluation)


def test_years_are_joined(tmp_path):
    kit = tmp_path / "VOCdevkit"
    write(kit / "VOC2007", {"a": xml(item()), "t": xml(item())}, {"trainval": ["a"], "test": ["t"]})
    write(kit / "VOC2012", {"a": xml(item("dog"))}, {"trainval": ["a"], "test": ["x", "y"]})
    pair = load_pair(tmp_path)
    assert [r.name for r in pair.training.records] == ["VOC2007/a", "VOC2012/a"]
    assert [r.id for r in pair.training.records] == [1, 2]
    # The 2012 test annotations are not public: that year's test list is left out.
    assert [r.name for r in pair.evaluation.records] == ["VOC2007/t"]
    assert [r.name for r in load_dataset(tmp_path, "VOC2012/trainval").records] == ["VOC2012/a"]
    joined = load_dataset(tmp_path, "VOC2007/trainval+VOC2007/test")
    assert [r.name for r in joined.records] == ["VOC2007/a", "VOC2007/t"]
    with pytest.raises(DataError, match="split 'VOC2010/test' does not exist: expected one of "):
        load_dataset(tmp_path, "VOC2010/test")
    assert load_dataset(kit / "VOC2007", "test").records[0].name == "t"


def voc0712(tmp_path):
    """07+12 in the archives' layout: VOC2012's test list has its images and no annotations."""
    kit = tmp_path / "VOCdevkit"
    splits = {"train": ["000001"], "val": ["000002"], "trainval": ["000001", "000002"], "test": ["000003", "000004"]}
    write(kit / "VOC2007", {f"{k:06}": xml(item("cat"), item("dog")) for k in range(1, 5)}, splits)
    names = ["2008_000001", "2008_000002", "2008_000003", "2008_000004", "2008_000005"]
    splits = {"train": names[:1], "val": names[1:2], "trainval": names[:2], "test": names[2:]}
    write(kit / "VOC2012", {name: xml(item("person")) for name in names}, splits)
    for name in names[2:]:
        (kit / f"VOC2012/Annotations/{name}.xml").unlink()
    return tmp_path


def test_07_12(tmp_path):
    pair = load_pair(voc0712(tmp_path))
    assert (pair.training.split, pair.evaluation.split) == ("trainval", "test")
    assert [r.name for r in pair.training.records] == [
        "VOC2007/000001", "VOC2007/000002", "VOC2012/2008_000001", "VOC2012/2008_000002",
    ]  # fmt: skip
    assert [r.name for r in pair.evaluation.records] == ["VOC2007/000003", "VOC2007/000004"]
    # The devkit's result files name images without the year.
    assert [r.source_id for r in pair.training.records] == ["000001", "000002", "2008_000001", "2008_000002"]
    assert pair.training.classes == pair.evaluation.classes == ("cat", "dog", "person")
    assert pair.training.labelled and pair.evaluation.labelled
    # Downloads without VOC2007's test annotations evaluate on val.
    for name in ("000003", "000004"):
        (tmp_path / f"VOCdevkit/VOC2007/Annotations/{name}.xml").unlink()
    pair = load_pair(tmp_path)
    assert (pair.training.split, pair.evaluation.split) == ("train", "val")


def test_unlabelled_test_images(tmp_path):
    dataset = load_dataset(voc0712(tmp_path), "VOC2012/test")
    assert (dataset.labelled, len(dataset), dataset.num_boxes) == (False, 3, 0)
    assert dataset.classes == ("cat", "dog", "person")
    assert [(r.name, r.source_id, r.width, r.height) for r in dataset.records][0] == (
        "VOC2012/2008_000003", "2008_000003", 16, 12,
    )  # fmt: skip
    # The layout task's annotations of a few test images do not make it a labelled split.
    (tmp_path / "VOCdevkit/VOC2012/Annotations/2008_000003.xml").write_text(xml(item("person")))
    assert not load_dataset(tmp_path, "VOC2012/test").labelled
    assert load_pair(tmp_path).evaluation.records[0].name == "VOC2007/000003"
    with pytest.raises(DataError, match="split 'VOC2012/test' has no annotations"):
        load_pair(tmp_path, eval_split="VOC2012/test")
    (tmp_path / "VOCdevkit/VOC2012/JPEGImages/2008_000004.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="2008_000004.jpg: the file is empty"):
        load_dataset(tmp_path, "VOC2012/test")


def test_a_folder_of_test_images_alone(tmp_path):
    write(tmp_path, {"a": xml(), "b": xml()}, {"test": ["a", "b"]})
    for path in (tmp_path / "Annotations").iterdir():
        path.unlink()
    (tmp_path / "Annotations").rmdir()
    dataset = load_dataset(tmp_path, "test", classes=("cat", "dog"))
    assert (dataset.labelled, dataset.classes, len(dataset)) == (False, ("cat", "dog"), 2)
    for role in ("train", "eval"):
        with pytest.raises(DataError, match=f"no default split for {role}: name one of test"):
            load_dataset(tmp_path, role=role)


def test_a_missing_annotation_of_a_test_split_is_found(tmp_path):
    voc0712(tmp_path)
    (tmp_path / "VOCdevkit/VOC2007/Annotations/000004.xml").unlink()
    with pytest.raises(DataError, match="000004.xml: the annotation file does not exist"):
        load_pair(tmp_path)


def test_annotations_that_are_all_missing_are_named(tmp_path):
    """Of any other split than a test split: its images are no unlabelled ones."""
    write(tmp_path, {"a": xml(item()), "b": xml(), "c": xml()}, {"train": ["a"], "val": ["b", "c"]})
    for name in "bc":
        (tmp_path / f"Annotations/{name}.xml").unlink()
    with pytest.raises(DataError, match="split 'val': .*b.xml: the annotation file does not exist") as caught:
        load_dataset(tmp_path, "val")
    assert len(caught.value.problems) == 2


@pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD photographs are not here")
def test_bccd():
    pair = load_pair(BCCD)
    assert (pair.training.split, pair.evaluation.split) == ("trainval", "test")
    assert (len(pair.training), len(pair.evaluation)) == (292, 72)
    assert pair.training.num_boxes + pair.evaluation.num_boxes == 4886
    assert pair.training.classes == pair.evaluation.classes == ("Platelets", "RBC", "WBC")
    assert pair.training.notes.items == {"empty boxes dropped": ["BloodImage_00338", "BloodImage_00343"]}
    assert pair.evaluation.notes.items == {}
    assert {(r.width, r.height) for r in pair.training.records} == {(640, 480)}
    assert (len(load_dataset(BCCD, "train")), len(load_dataset(BCCD, "val"))) == (205, 87)


@pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD photographs are not here")
def test_bccd_full_check():
    report = check_dataset(BCCD, splits=("trainval", "test"))
    assert report.ok and report.problems == []
    counts = [report.stats[split]["boxes_by_class"] for split in ("trainval", "test")]
    assert {name: sum(count[name] for count in counts) for name in counts[0]} == {
        "Platelets": 361,
        "RBC": 4153,
        "WBC": 372,
    }
    assert "split trainval: near-duplicate box pairs: 7" in report.text
    assert "empty boxes dropped: 2 (BloodImage_00338, BloodImage_00343)" in report.text


def test_a_single_row_or_column_is_a_box(tmp_path):
    """Coordinates are inclusive: xmin = xmax is one pixel column."""
    write(
        tmp_path, {"a": xml(item(bndbox=box(5, 2, 5, 9)), item(bndbox=box(3, 7, 8, 7)), item(bndbox=box(4, 4, 4, 4)))}
    )
    dataset = load_dataset(tmp_path)
    assert dataset.records[0].boxes.tolist() == [[4, 1, 5, 9], [2, 6, 8, 7]]
    assert dataset.records[0].areas.tolist() == [8, 6] and dataset.notes.counts() == {"empty boxes dropped": 1}
    assert [a["bbox"] for a in to_coco_dict(dataset)["annotations"]] == [[4, 1, 1, 8], [2, 6, 6, 1]]


def test_mutated_files_give_only_the_documented_error(tmp_path):
    write(tmp_path, {"a": xml(item(), item("dog", box("1.5", 2, 16, 12)))})
    path = tmp_path / "Annotations/a.xml"
    original = path.read_bytes()
    rng, refused = random.Random(3), 0
    for _ in range(500):
        data = bytearray(original)
        for _ in range(rng.randrange(1, 4)):
            start = rng.randrange(len(data))
            if rng.random() < 0.5:
                data[start] = rng.randrange(256)
            else:
                del data[start : start + rng.choice((1, 3, 20))]
            data = data or bytearray(b" ")
        path.write_bytes(data)
        try:
            dataset = load_dataset(tmp_path, check_files=False)
        except DataError:
            refused += 1
            continue
        boxes = dataset.records[0].boxes
        assert np.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
    assert 150 < refused < 500

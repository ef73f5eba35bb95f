"""Tables and arrays of labels: right, or refused in one line with the row, the value or the header."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medformer.data import ScanError
from medformer.data.labels import LabelTable, check_arrays, read_arrays, read_label_table
from medformer.data.tables import read_table
from medformer.errors import UserError
from medformer.evaluation import tasks

GOOD = "path,edema,pneumonia\na.png,1,0\nb.png,0,\nc.png,1,1\n"


def read(folder: Path, content: str | bytes, *asked: str, name: str = "t.csv", outside: bool = False) -> LabelTable:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_label_table(path, asked, outside=outside)


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        "\ufeff" + GOOD,
        GOOD.encode("utf-16"),
        GOOD.encode("utf-32"),
        GOOD.replace(",", ";"),
        GOOD.replace(",", "\t"),
        GOOD.replace(",", "|"),
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", "\r"),
        GOOD.replace("\n", "\n\n"),
        GOOD.replace("path", "PATH"),
        GOOD.replace("path", " Path "),
        GOOD.replace("1", " 1 ").replace("0", "0.0"),
        GOOD.replace("1", '"1"'),
        GOOD.replace("\n", ",\n").replace("pneumonia,", "pneumonia,age"),
        "id,Patient Name,age,path,edema,pneumonia\n1,x,63,a.png,1,0\n0,y,1,b.png,0,\n1,z,70,c.png,1,1\n",
    ],
    ids=range(16),
)  # fmt: skip
def test_one_table_however_it_is_written(tmp_path: Path, content: str | bytes) -> None:
    table = read(tmp_path, content)
    assert (table.kind, table.names) == ("labels", ("edema", "pneumonia"))
    assert [[str(v) for v in row] for row in table.targets] == [["1.0", "0.0"], ["0.0", "nan"], ["1.0", "1.0"]]
    assert [file.name for (file,) in table.files if file] == ["a.png", "b.png", "c.png"]
    assert "path: scans; edema: a label; pneumonia: a label; 1 of 6 labels are empty, unknown" in table.notes[0]


def test_latin_1_is_read_and_said_to_be_a_guess(tmp_path: Path) -> None:
    table = read(tmp_path, "path,label\na.png,krank\nb.png,gesund für jetzt\n".encode("latin-1"))
    assert table.names == ("gesund für jetzt", "krank")
    assert "Windows-1252 (a guess: it is not UTF-8)" in table.notes[0]


def test_a_column_that_merely_lies_there_is_a_label_when_asked_for_only(tmp_path: Path) -> None:
    table = read(tmp_path, "path,age,sex,edema\na,63,1,1\nb,70,0,0\n")
    assert table.names == ("edema",)
    assert "columns left aside, no labels: age ('63'), sex ('1')" in table.notes[1]
    assert read(tmp_path, "path,age,sex,edema\na,63,1,1\nb,70,0,0\n", "SEX", "edema").names == ("sex", "edema")
    with pytest.raises(ScanError, match="row 2: age is '63', must be 0, 1 or empty"):
        read(tmp_path, "path,age\na,63\nb,0\n", "age")
    table = read(tmp_path, "path,label,age\na,x,3\nb,y,4\n")
    assert (table.kind, table.names, table.notes[1]) == (
        "classes", ("x", "y"), "columns left aside, no labels: age ('3')",
    )  # fmt: skip


def test_classes_are_names_or_whole_numbers_in_their_order(tmp_path: Path) -> None:
    assert read(tmp_path, "path,label\na,10\nb,2.0\nc,2\nd,x\n").names == ("2", "10", "x")


def test_paths_stay_in_the_folder_of_the_table_unless_absolute_and_asked_for(tmp_path: Path) -> None:
    inside = tmp_path / "sub" / "a.png"
    assert read(tmp_path, f"path,label\n{inside},x\nsub/../b.png,y\n").files == ((inside,), (tmp_path / "b.png",))
    table = f"path,label\n{tmp_path.parent / 'a.png'},x\n"
    with pytest.raises(ScanError, match=r"row 2: path '.*' leads out of the table's folder; --outside true"):
        read(tmp_path, table)
    assert read(tmp_path, table, outside=True).files == ((tmp_path.parent / "a.png",),)
    with pytest.raises(ScanError, match="write an absolute path"):
        read(tmp_path, "path,label\n../a.png,x\n", outside=True)


BAD_LABELS = ("7", "-1", ".7", "1.7", "inf", "-inf", "1e9", "nan", "yes", "True", "0,5", "1;0", "٣", "0x1", "1 0", "--")
BAD_CLASSES = (".7", "1,7", "inf", "1e309", "-1", "nan", "N/A", "null", "?", "1e10")


def bad_tables() -> Iterator[tuple[str, str | bytes, str]]:
    """Tables with one thing wrong each, and what the refusal says."""
    rng = random.Random(0)
    for value in BAD_LABELS:
        row = rng.randrange(2, 5)
        rows = ["path\tedema", "a\t1", "b\t0", "c\t1"]
        rows[row - 1] = f"{'abc'[row - 2]}\t{value}"
        yield f"label {value!r}", "\n".join(rows), f"row {row}: edema is {value!r}, must be 0, 1 or empty"
    for value in BAD_CLASSES:
        row = rng.randrange(2, 4)
        rows = ["path\tlabel", "a\tx", "b\ty"]
        rows[row - 1] = f"{'ab'[row - 2]}\t{value}"
        yield f"class {value!r}", "\n".join(rows), f"row {row}: label is {value!r}"
    for cut in (1, 2):
        lines = GOOD.splitlines()
        lines[2] = ",".join(lines[2].split(",")[:cut])
        yield f"short row {cut}", "\n".join(lines), f"line 3 has {cut} cells, the header 3 (path, edema, pneumonia)"
    yield "long row", GOOD.replace("b.png,0,", "b.png,0,1,1"), "line 3 has 4 cells, the header 3"
    yield "decimal commas", "path,edema\na,1,0\nb,0,0\n", "line 2 has 3 cells"
    for twice in ("edema,edema", "edema, Edema ", "path,edema", "EDEMA,edema"):
        yield f"twice {twice}", f"path,{twice}\na,1,0\n", "occurs twice in path"
    for empty in ("", "\n\n", " \n", "\ufeff", "path,edema\n", "file,label\na,1\n", "a.png,1\nb.png,0\n", ";;\n"):
        yield f"no rows {empty!r}", empty, "needs a header with the column path and at least one row"
    yield "no labels", "path\na\n", "give exactly one of label, mask, value, or one column for each label"
    yield "only an age", "path,age\na,63\nb,64\n", "age ('63') are not; --labels NAME takes a column for one"
    yield "both", "path,label,mask\na,x,m\n", "give exactly one of label, mask"
    yield "case alone", "path,label\na,Benign\nb,benign\n", "'Benign' and 'benign' differ in capital letters"
    yield "no class", "path,label\na,x\nb,\n", "row 3 has no label"
    yield "no path", "path,label\n,x\nb,y\n", "row 2 has no path"
    yield "no mask", "path,mask\na,m\nb,\n", "row 3 has no mask"
    yield "folder itself", "path,label\n.,x\n", "row 2: path '.' leads out"
    for out in ("../a", "sub/../../a", "/etc/passwd", "..", "a/../.."):
        yield f"out {out}", f"path,label\n{out},x\n", f"row 2: path {out!r} leads out of the table's folder"
    yield "long path", f"path,label\n{'a' * 300},x\n", "path is 300 characters long"
    yield "patient", "path,label,patient\na,x,p\nb,y,\n", "row 3 has no patient"
    yield "split", "path,label,split\na,x,train\nb,y,tset\n", "row 3: split 'tset' must be train, val or test"
    yield "half a split", "path,label,split\na,x,train\nb,y,\n", "row 3: split '' must be"
    yield "too many classes", "path,label\n" + "".join(f"a,c{i}\n" for i in range(1001)), "1,001 different values"
    yield "UTF-16 without mark", GOOD.encode("utf-16-le"), "holds zero bytes"
    yield "binary", bytes(range(256)), "holds zero bytes"
    yield "neither", b"path,label\na,\x81\xff\n", "neither UTF-8 nor Windows-1252"
    yield (
        "torn UTF-16",
        b"\xff\xfe" + GOOD.encode("utf-16-le") + b"\x00\xd8\x00",
        "table cannot be read ('utf-16-le' codec",
    )
    yield "open quote", 'path,label\na,"x\nb,y\n', "table cannot be read (unexpected end of data)"
    yield "stray quote", 'path,label\na,"x"y\n', "table cannot be read"
    yield "long field", f"path,label\na,{'x' * (2**22 + 1)}\n", "field larger than field limit"
    yield "many columns", "path," + ",".join(f"c{i}" for i in range(10_001)) + "\n", "cells; no table of labels"


BAD = list(bad_tables())


def test_there_are_sixty_bad_tables() -> None:
    assert len(BAD) >= 60


@pytest.mark.parametrize(("content", "message"), [pytest.param(c, m, id=name) for name, c, m in BAD])
def test_a_bad_table_is_refused_in_one_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "task.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="--task") as caught:
        tasks.read_task(path, 2, None, 0, iter)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def arrays(**more: object) -> dict[str, np.ndarray]:
    base = {"train_images": np.zeros((4, 5, 5), np.uint8), "train_labels": np.array([[0], [1], [1], [0]])}
    return {name: np.asarray(value) for name, value in (base | more).items()}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 7, 0], "train_labels[2] is 7, must be a whole number of 0 to 3"),
        ([0, 1, 10**9, 0], "train_labels[2] is 1e+09"),
        ([0, 1, -1, 0], "train_labels[2] is -1"),
        ([0.7, 1.7, 0, 1], "train_labels[0] is 0.7"),
        ([0, np.inf, 0, 1], "train_labels[1] is inf"),
        ([0, np.nan, 0, 1], "train_labels[1] is nan"),
        ([2**63, 0, 0, 1], "train_labels[0] is 9.22337e+18"),
        ([[0, 7], [1, 1], [0, 0], [1, 0]], "train_labels[0, 1] is 7, must be 0, 1, or -1 or NaN"),
        ([[0, 0.5], [1, 1], [0, 0], [1, 0]], "train_labels[0, 1] is 0.5"),
        ([[0, -np.inf], [1, 1], [0, 0], [1, 0]], "train_labels[0, 1] is -inf"),
        (["a", "b", "a", "b"], "train_labels is <U1, must be numbers"),
        ([1j, 0, 0, 1], "train_labels is complex128"),
        ([0, 1, 0], "shape (3,) for 4 images"),
        ([[[0]], [[1]], [[0]], [[1]]], "shape (4, 1, 1) for 4 images"),
        (np.zeros((4, 0)), "shape (4, 0) for 4 images"),
        (np.zeros((4, 2000)), "2,000 columns"),
    ],
)
def test_arrays_of_no_labels_are_refused_with_their_place(labels: object, message: str) -> None:
    with pytest.raises(ScanError) as caught:
        check_arrays(arrays(train_labels=labels), ["train"])
    assert message in str(caught.value)


def test_arrays_keep_classes_and_unknown_labels() -> None:
    (classes,), count = check_arrays(arrays(), ["train"])
    assert (classes.tolist(), classes.dtype.kind, count) == ([0, 1, 1, 0], "i", 2)
    (known,), count = check_arrays(arrays(train_labels=[[0, 1], [1, -1], [np.nan, 0], [1, 1]]), ["train"])
    assert count == 2
    assert math.isnan(known[1, 1])
    assert math.isnan(known[2, 0])
    with pytest.raises(ScanError, match="labels of 1 and 2 columns in one archive"):
        check_arrays(arrays(val_images=np.zeros((1, 5, 5)), val_labels=[[0, 1]]), ["train", "val"])
    with pytest.raises(ScanError, match="train_patients is"):
        check_arrays(arrays(train_patients=["a"]), ["train"])


def test_archives_of_objects_and_of_more_than_memory_are_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "object.npz", train_images=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("no zip")
    for name in ("object", "text"):
        with pytest.raises(ScanError, match=r"not an \.npz of plain arrays"):
            read_arrays(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "large.npz", train_images=np.zeros((64, 64), np.uint8))
    monkeypatch.setattr("medformer.data.labels.MAX_VOLUME_BYTES", 4000)
    with pytest.raises(ScanError, match="declares 4,224 bytes; made up or too large"):
        read_arrays(tmp_path / "large.npz")


def test_a_task_without_a_difference_is_refused(tmp_path: Path) -> None:
    for i in range(6):
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) + i).save(tmp_path / f"{i}.png")
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"m{i}.png")
    for column, cell, message in (("label", "x", "only class x"), ("mask", "m{}.png", "only background in every mask")):
        (tmp_path / "task.csv").write_text(
            f"path,{column}\n" + "".join(f"{i}.png,{cell.format(i)}\n" for i in range(6))
        )
        with pytest.raises(UserError, match=message):
            tasks.read_task(tmp_path / "task.csv", 2, None, 0, iter)


def test_what_was_taken_for_what_is_a_note_of_the_task(tmp_path: Path) -> None:
    lines = ["Path;Age;Edema;Patient"]
    for i in range(20):
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) + i).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png;{60 + i};{i % 2};p{i}")
    (tmp_path / "task.csv").write_text("\n".join(lines))
    task = tasks.read_task(tmp_path / "task.csv", 2, None, 0, iter)
    assert task.names == ("Edema",)
    assert task.notes[0].startswith(
        "task.csv (UTF-8, semicolons): 20 rows; path: scans; Edema: a label; patient: patients"
    )
    assert task.notes[1] == "columns left aside, no labels: Age ('60')"


def test_parquet_is_read_as_text_like_a_csv(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is in the extras parquet and test")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "idc_index.parquet"
    columns = {"PatientID": ["a ", "b", None], "slices": [1, 2, 3], "flag": [True, False, None]}
    parquet.write_table(pyarrow.table(columns), path)
    assert [*read_table(path, ["patientid", "slices"], optional=["flag"])] == [
        {"patientid": "a", "slices": "1", "flag": "True"},
        {"patientid": "b", "slices": "2", "flag": "False"},
        {"patientid": "", "slices": "3", "flag": ""},
    ]
    with pytest.raises(ScanError, match=r"idc_index\.parquet: no column nope among PatientID, slices, flag"):
        next(read_table(path, ["nope"]))
    path.write_bytes(b"PAR1, cut off")
    with pytest.raises(ScanError, match=r"idc_index\.parquet: Parquet cannot be read"):
        next(read_table(path, ["slices"]))

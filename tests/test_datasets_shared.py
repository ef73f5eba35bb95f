"""Data sets: found, described by the doctor, split by patient; and what all of them share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medformer.commands import main
from medformer.data import ScanError, Volume
from medformer.data.datasets import DATASETS, adapter
from medformer.data.datasets.layout import About, Near
from medformer.data.records import (
    NEGATIVE,
    POSITIVE,
    UNCERTAIN,
    UNKNOWN,
    Record,
    data_root,
    hash_patient,
    patient_split,
    state_of,
)  # fmt: skip
from medformer.data.tables import parse_literal, read_sheet, read_table
from tests.dataset_files import MAKERS, csv, make_chexpert, make_mrnet, scan

pytestmark = pytest.mark.filterwarnings("ignore::medformer.data.datasets.joins.DataSetWarning")


@pytest.mark.parametrize("name", MAKERS)
def test_every_data_set_is_found_below_a_root_and_named_where_it_is_not(name: str, tmp_path: Path) -> None:
    about = adapter(name).ABOUT
    MAKERS[name](tmp_path / "root" / about.folders[0])
    records = scan(name, tmp_path / "root")
    assert records
    assert {r.dataset for r in records} == {name}
    assert all(Path(r.paths[0]).is_file() for r in records)
    assert all(isinstance(record.read(), Volume) for record in records)
    parts = patient_split(records, valid=0.3, test=0.3)
    patients = [{r.patient for r in part} for part in parts.values()]
    assert sum(map(len, patients)) == len(set().union(*patients))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScanError, match="get it from https") as caught:
        scan(name, tmp_path / "empty")
    assert "\n" not in str(caught.value)


def test_doctor_tells_what_is_here_and_where_the_rest_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_mrnet(tmp_path / "mrnet")
    make_chexpert(tmp_path / "chexpert")
    (tmp_path / "chexpert" / "train" / "patient00001" / "study1" / "view1_frontal.jpg").unlink()
    monkeypatch.setenv("TENSOR_RELOADED_DATADIR", str(tmp_path))
    monkeypatch.delenv("MEDFORMER_DATA", raising=False)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "here     MRNet: 3 records of 2 patients (2 train, 1 valid)" in out
    assert "problem  CheXpert: 1 of 2 files named in its tables are not here" in out
    assert out.count("missing  ") == len(DATASETS) - 3
    assert main(["doctor", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["found"]) == 14
    assert main(["doctor", "--root", str(tmp_path / "nowhere")]) == 1
    assert "no folder" in capsys.readouterr().err


def test_the_data_root_is_flag_then_new_then_old_variable(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    both = {"MEDFORMER_DATA": str(tmp_path / "b"), "TENSOR_RELOADED_DATADIR": str(tmp_path / "c")}
    assert data_root(tmp_path / "a", both).name == "a"
    assert data_root(None, both).name == "b"
    assert data_root(None, {"TENSOR_RELOADED_DATADIR": str(tmp_path / "c")}).name == "c"
    with pytest.raises(ScanError, match=r"MEDFORMER_DATA is not given, TENSOR_RELOADED_DATADIR is not given"):
        data_root(None, {})
    with pytest.raises(ScanError, match="which is no folder"):
        data_root(tmp_path / "x", both)


class TestShared:
    def test_official_parts_stay_and_patients_never_part(self) -> None:
        def record(patient: str, split: str | None, dataset: str = "d") -> Record:
            return Record(dataset=dataset, patient=patient, study="", paths=(patient,), modality="CT", split=split)

        records = [record(str(i % 50), None) for i in range(200)]
        parts = patient_split(records, valid=0.2, test=0.2)
        assert sum(map(len, parts.values())) == 200
        assert all(parts.values())
        bigger = patient_split([*records, record("new", None)], valid=0.2, test=0.2)
        for name, part in parts.items():
            assert {r.patient for r in part} <= {r.patient for r in bigger[name]}
        official = [record(str(i), "test" if i < 5 else "train", "e") for i in range(50)]
        parts = patient_split(official, valid=0.2, test=0.9 - 0.2)
        assert {r.patient for r in parts["test"]} == {"0", "1", "2", "3", "4"}
        assert parts["valid"]
        with pytest.raises(ScanError, match="one patient into train and test"):
            patient_split([record("1", "train"), record("1", "test")])

    def test_states_are_four(self) -> None:
        assert [state_of(v) for v in ("1.0", "0", "-1.0", "", "nan")] == [
            POSITIVE,
            NEGATIVE,
            UNCERTAIN,
            UNKNOWN,
            UNKNOWN,
        ]
        with pytest.raises(ScanError, match="must be 1, 0, -1 or blank"):
            state_of("2")

    def test_tables_say_what_is_wrong_with_them(self, tmp_path: Path) -> None:
        table = csv(tmp_path / "t.csv", "a,b", "1,2", "", "3,")
        assert list(read_table(table, ["a"])) == [{"a": "1", "b": "2"}, {"a": "3", "b": ""}]
        with pytest.raises(ScanError, match="no column c among a, b"):
            list(read_table(table, ["c"]))
        with pytest.raises(ScanError, match="line 2 has 3 cells, the header 2"):
            list(read_table(csv(tmp_path / "t.csv", "a,b", "1,2,3")))
        (tmp_path / "t.csv.gz").write_bytes(b"no gzip")
        with pytest.raises(ScanError, match="cannot be read"):
            list(read_table(tmp_path / "t.csv.gz"))
        (tmp_path / "t.xlsx").write_bytes(b"no zip")
        with pytest.raises(ScanError, match="workbook cannot be read"):
            list(read_sheet(tmp_path / "t.xlsx"))

    @pytest.mark.parametrize("text", ["[" * 3000, "__import__('os')", "1 +", "[x]", "9" * 70000])
    def test_cells_are_values_and_nothing_else(self, text: str) -> None:
        with pytest.raises(ScanError):
            parse_literal(text, "cell")

    def test_label_files_are_found_wherever_a_release_puts_them(self, tmp_path: Path) -> None:
        about = About(name="set", folders=("set",), source="", layout="")
        home = tmp_path / "set" / "1.0.0"
        csv(home / "a" / "b" / "labels.csv", "x")
        assert Near(home, about).first("LABELS.csv") == home / "a" / "b" / "labels.csv"
        csv(home / "a" / "labels.csv", "x")
        assert Near(home, about).first("labels.csv") == home / "a" / "labels.csv"
        csv(tmp_path / "set-tables" / "more.csv", "x")  # beside: a version's folder and the set's own lead up to it
        assert Near(home, about).first("more.csv") == tmp_path / "set-tables" / "more.csv"
        assert Near(home, about).first("more.csv", columns=["y"]) is None
        assert Near(home, About(name="o", folders=("other",), source="", layout="")).first("more.csv") is None

    def test_hashed_patients_do_not_lead_back_without_the_salt(self) -> None:
        assert hash_patient("p1", b"a" * 32) == hash_patient("p1", b"a" * 32) != hash_patient("p1", b"b" * 32)
        assert "p1" not in hash_patient("p1", b"a" * 32)

import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from falign.data import BadRows, Row
from falign.data.files import data_suffix, read_file
from falign.errors import DataError

ROWS = [{"prompt": "Müsli?", "chosen": "a,\nb"}, {"prompt": "q", "chosen": "c"}]


def read(path, policy="error"):
    return list(read_file(path, bad_rows=BadRows(policy)))


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.JSONL", "x.json"])
def test_json_lines_give_fields_and_line_numbers_past_blank_lines_and_bom(tmp_path, name):
    path = tmp_path / name
    data = ("\ufeff" + json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1])).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    assert read(path) == [Row(f"{path}:1", ROWS[0]), Row(f"{path}:3", ROWS[1])]


@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"version": 1, "data": rows}])
def test_json_list_gives_row_numbers(tmp_path, name, wrap):
    path = tmp_path / name
    data = json.dumps(wrap(ROWS), indent=1).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    assert read(path) == [Row(f"{path} row 1", ROWS[0]), Row(f"{path} row 2", ROWS[1])]


def test_csv_place_is_the_line_where_the_row_starts(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('prompt,chosen\r\nMüsli?,"a,\nb"\r\nq,c\r\n', encoding="utf-8")
    assert read(path) == [Row(f"{path}:2", ROWS[0]), Row(f"{path}:4", ROWS[1])]


def test_csv_row_with_too_few_cells_is_bad(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("prompt,chosen\nq\nq,c\n")
    with pytest.raises(DataError, match=r"x.csv:2: 1 cells under 2 column names .*quote cells"):
        read(path)
    assert [row.place for row in read(path, "skip")] == [f"{path}:3"]


def test_csv_cell_beyond_the_limit_is_an_error_with_line(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("prompt\n" + "x" * 200_000 + "\n")
    with pytest.raises(DataError, match=r"x.csv:2: not CSV \(field larger than field limit .* as .jsonl"):
        read(path)


def test_parquet_keeps_lists_of_turns(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "q"}], "chosen": "c"}] * 300
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read(path)
    assert [row.fields for row in found] == rows
    assert found[-1].place == f"{path} row 300"


def test_line_that_is_not_json_names_line_problem_and_remedy(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "q"}\n{"prompt": "q",}\n[1]\n{"prompt": "r"}\n')
    with pytest.raises(
        DataError, match=r"x.jsonl:2: this line is not JSON \(.* at character \d+\).*one complete JSON object"
    ):
        read(path)
    bad_rows = BadRows("skip")
    assert [row.fields["prompt"] for row in read_file(path, bad_rows=bad_rows)] == ["q", "r"]
    assert bad_rows.count == 2
    assert "x.jsonl:3: the line holds [1]; a row must be a JSON object" in bad_rows.messages[1]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.json", b'{"rows": []}', "the top level must be a list of rows"),
        ("x.json", b'[{"a": 1},\n{]', r"x.json:2: not JSON \("),
        ("x.json", b"[" + b"9" * 5000 + b"]", "not readable JSON .*digits"),
        ("x.json", b"[" * 10**5, "not readable JSON .*recursion"),
        ("x.json", b"[3]", "x.json row 1: the row is 3; a row must be"),
        ("x.jsonl", '{"a": "é"}'.encode("latin-1"), "not UTF-8 text .*save the file as UTF-8"),
        ("x.jsonl.gz", b"plain", "damaged gzip file"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-12], "damaged gzip file"),
        ("x.parquet", b"plain text", "not a readable Parquet file"),
        ("x.txt", b"plain", r"the file type '.txt' is not supported; use one of \('.json',"),
        ("x.csv.gz", gzip.compress(b"a\n1\n", mtime=0), "the file type '.gz' is not supported"),
    ],
)
def test_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("place", [4, 12, 40])
def test_a_parquet_file_whose_pages_are_spoilt_is_named(tmp_path, place):
    path, sink = tmp_path / "x.parquet", io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"a": ["one", "two"] * 50}), sink)
    content = bytearray(sink.getvalue())
    content[place : place + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read(path)


def test_suffix_is_told_behind_gz(tmp_path):
    assert [data_suffix(tmp_path / name) for name in ("a.jsonl.gz", "a.b.JSON", "a")] == [".jsonl", ".json", ""]


def test_a_column_that_comes_twice_is_refused(tmp_path):
    csv, parquet, lines, whole = (tmp_path / f"x{suffix}" for suffix in (".csv", ".parquet", ".jsonl", ".json"))
    csv.write_text("prompt,chosen,rejected,chosen\nq,good,bad,other\n")
    columns = [pyarrow.array([text]) for text in ("q", "good", "bad", "other")]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays(columns, names=["prompt", "chosen", "rejected", "chosen"]), parquet
    )
    row = '{"prompt": "q", "chosen": "good", "rejected": "bad", "chosen": "other"}'
    lines.write_text('{"prompt": "q"}\n' + row + "\n")
    whole.write_text(f"[{row}]")
    for path, place in ((csv, "x.csv:1"), (parquet, "x.parquet"), (lines, "x.jsonl:2"), (whole, "x.json")):
        with pytest.raises(DataError, match=rf"{place}: the (column|key) 'chosen' comes twice.*keep one"):
            read(path)
    assert [each.fields for each in read(lines, "skip")] == [{"prompt": "q"}]  # one bad row, the others stay
    with pytest.raises(DataError, match="the column 'chosen' comes twice"):
        read(csv, "skip")

"""Rows come out as the file says, whatever form, compression or split they are in."""

import bz2
import gzip
import json
import lzma
import socketserver
import threading

import pytest

from rftjax import tasks
from rftjax.errors import UserError
from rftjax.scoring import Scorer
from rftjax.types import Trajectory


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Keeps `datasets` off the network and its cache out of the home folder."""
    datasets = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


ROWS = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def rows(path, data=None, **options):
    if data is not None:
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return [{"prompt": t.prompt, **t.data} for t in tasks.load(str(path), **options)]


def faults(path, data=None, **options) -> str:
    with pytest.raises(ValueError) as info:
        rows(path, data, **options)
    return str(info.value)


# ---- CSV


@pytest.mark.parametrize(
    "cell", ["01067", "NA", "None", "nan", "1e3", "1.10", "True", "", " x ", "2020-01-02", "-0"]
)
def test_a_csv_cell_is_the_text_that_the_file_has(tmp_path, cell):
    assert rows(tmp_path / "a.csv", f"prompt,answer\nnull,{cell}\n") == [
        {"prompt": "null", "answer": cell}
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeffprompt,answer\r\na,1\r\n\r\nb,2", ROWS),
        ('prompt,answer\n"a",1\n"b","2"\n', ROWS),
        ("prompt;answer\na;1\nb;2\n", ROWS),
        ("sep=;\nprompt;answer\na;1\nb;2\n", ROWS),
        ("prompt\tanswer\na\t1\nb\t2\n", ROWS),
        ("prompt|answer\na|1\nb|2\n", ROWS),
        (",prompt,answer\n0,a,1\n1,b,2\n", ROWS),  # an index that somebody wrote
        (" prompt , answer\na,1\nb,2,,\n,,\n", ROWS),
        ('prompt\n"one, ""two""\nthree"\n', [{"prompt": 'one, "two"\nthree'}]),
        ("prompt\njust a text; it has, no comma\n", None),
    ],
)
def test_csv_files_are_read_as_spreadsheets_write_them(tmp_path, text, expected):
    if expected is None:
        assert "has 2 cells, the header names 1" in faults(tmp_path / "a.csv", text)
    else:
        assert rows(tmp_path / "a.csv", text) == expected


def test_a_csv_file_in_utf_16_is_read(tmp_path):
    assert rows(tmp_path / "a.csv", "prompt,answer\na,1\nb,2\n".encode("utf-16")) == ROWS


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b'prompt,answer\n"x\ny",1\na,2,3\n', "a.csv:4: line: has 3 cells, the header names 2"),
        (b'prompt,answer\na,"1" 2\n', "a.csv:2: line: is not valid CSV"),
        (b'prompt,answer\na,"1\n', "a.csv:2: line: is not valid CSV"),
        (b"prompt,prompt\na,b\n", "a.csv:1: header: names 'prompt' more than once"),
        (b"prompt,answer\na,1\n\xe9,2\n", "a.csv:3: line: is not UTF-8"),
        (
            b"question,answer\na,1\n",
            "a.csv:2: messages: is missing, as is prompt; the row's fields",
        ),
        (b"prompt,answer\n", "holds no rows"),
        (b"", "holds no rows"),
        (b"PK\x03\x04\0\0\0", "is a binary file of a kind that is not read here"),
    ],
)
def test_a_fault_of_a_csv_file_is_told_with_its_line(tmp_path, data, fault):
    assert fault in faults(tmp_path / "a.csv", data)


def test_a_cell_may_be_as_long_as_a_book(tmp_path):
    assert len(rows(tmp_path / "a.csv", "prompt\n" + "x" * 300_000)[0]["prompt"]) == 300_000


# ---- JSON


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
@pytest.mark.parametrize(
    "text",
    [
        LINES.decode(),
        "\ufeff" + LINES.decode().replace("\n", "\r\n"),
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        json.dumps({"version": 1, "data": ROWS}, indent=2),
        json.dumps({"train": ROWS, "test": ROWS[:1]}, indent=2),
    ],
)
def test_json_files_are_lines_or_one_value(tmp_path, name, text):
    assert rows(tmp_path / name, text) == ROWS


def test_an_object_of_splits_has_the_split_that_is_asked_for(tmp_path):
    text = json.dumps({"train": ROWS, "test": ROWS[1:]})
    assert rows(tmp_path / "a.json", text, split="test") == ROWS[1:]


def test_values_of_several_types_huge_numbers_and_nan_are_passed_on(tmp_path):
    values = ["1", 2, 2.5, None, [1], {"x": 1}, True, 10**400]
    text = "".join(json.dumps({"prompt": "a", "answer": value}) + "\n" for value in values)
    found = [
        row["answer"] for row in rows(tmp_path / "a.jsonl", text + '{"prompt":"a","answer":NaN}')
    ]
    assert found[:-1] == values and found[-1] != found[-1]


def test_a_number_of_too_many_digits_is_a_fault_of_its_line(tmp_path):
    assert "a.jsonl:1: line: is not valid JSON" in faults(
        tmp_path / "a.jsonl", '{"a": ' + "9" * 5000 + "}"
    )


# ---- Compression


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl", "a.json.gz"])
def test_compressed_files_are_known_by_their_first_bytes(tmp_path, name):
    for compress in (gzip.compress, bz2.compress, lzma.compress):
        assert rows(tmp_path / name, compress(LINES)) == ROWS


def test_compressed_csv_and_zstandard_are_read(tmp_path):
    import pyarrow

    assert rows(tmp_path / "a.csv.gz", gzip.compress(b"prompt,answer\na,1\nb,2\n")) == ROWS
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(LINES)
    assert rows(tmp_path / "a.jsonl.zst") == ROWS


def test_a_torn_file_is_told_with_its_field_and_path(tmp_path):
    torn = gzip.compress(json.dumps({"prompt": "x" * 9}).encode() * 999)[:-20]
    message = faults(tmp_path / "a.jsonl.gz", torn, field="tasks.heldout")
    assert message.startswith(f"tasks.heldout='{tmp_path}/a.jsonl.gz': cannot be read")
    assert "it is torn" in message and "\n" not in message


# ---- Splits


@pytest.mark.parametrize(
    ("split", "count"),
    [("train[:3]", 3), ("train[7:]", 3), ("train[-2:]", 2), ("train[50%:]", 5), ("x[10%:30%]", 2)],
)
def test_a_slice_of_a_split_counts_for_files_too(tmp_path, split, count):
    import datasets

    text = "".join(json.dumps({"prompt": f"{n}"}) + "\n" for n in range(10))
    assert len(rows(tmp_path / "a.jsonl", text, split=split)) == count
    datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train").to_parquet(
        str(tmp_path / "a.parquet")
    )
    assert len(rows(tmp_path / "a.parquet", split=split)) == count


def test_a_slice_that_is_none_is_refused(tmp_path):
    assert "tasks.split='train[a:]': must be a name" in faults(
        tmp_path / "a.jsonl", LINES, split="train[a:]"
    )


def test_a_directory_of_text_files_keeps_texts_and_values_of_several_types(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train-00001.jsonl").write_text('{"prompt": "b", "answer": 2}\n')
    (folder / "train-00000.csv").write_text("prompt,answer\na,01\n")
    (folder / "test.jsonl.gz").write_bytes(gzip.compress(LINES))
    (folder / "README.md").write_text("# Rows\n")
    assert rows(folder) == [{"prompt": "a", "answer": "01"}, {"prompt": "b", "answer": 2}]
    assert rows(folder, split="test") == ROWS
    assert "has no split 'hard'; it has test, train. Set tasks.split" in faults(
        folder, split="hard"
    )


def test_files_that_name_no_split_are_the_training_split(tmp_path):
    (tmp_path / "sums.jsonl").write_bytes(LINES)
    assert rows(tmp_path) == ROWS
    assert "it has train alone" in faults(tmp_path, split="test")


def test_a_directory_of_parquet_files_is_one_split(tmp_path):
    import datasets

    for number, row in enumerate(ROWS):
        datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / f"train-{number}.parquet"))
    assert rows(tmp_path) == ROWS


# ---- Arrow


def test_parquet_files_of_other_writers_may_have_maps_and_parts_without_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    kinds = [("prompt", pyarrow.string()), ("answer", pyarrow.map_("string", "int64"))]
    empty = pyarrow.schema(kinds).empty_table()
    full = pyarrow.table({"prompt": ["a"], "answer": [[("x", 1), ("y", None)]]}, empty.schema)
    for part, table in enumerate([empty, full, empty]):  # as Spark writes them
        pyarrow.parquet.write_table(table, tmp_path / f"part-{part}.snappy.parquet")
    (tmp_path / "notes.json").write_text("{}")
    assert rows(tmp_path) == [{"prompt": "a", "answer": {"x": 1}}]
    assert "holds no rows" in faults(tmp_path / "part-0.snappy.parquet")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt"] * 2)
    pyarrow.parquet.write_table(twice, tmp_path / "b.parquet")
    assert "more than one column 'prompt'" in faults(tmp_path / "b.parquet")


def test_a_saved_dataset_without_rows_is_told(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"prompt": []}).save_to_disk(tmp_path / "saved")
    assert "holds no rows" in faults(tmp_path / "saved")


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked: list[int] = []

    class HangUp(socketserver.BaseRequestHandler):
        def handle(self):
            asked.append(1)

    with socketserver.TCPServer(("127.0.0.1", 0), HangUp) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        said = faults("gsm8kk")
        server.shutdown()
    assert "tasks.train='gsm8kk'" in said and "the hub does not answer" in said
    assert asked == [1] and not datasets.config.HF_HUB_OFFLINE


def test_keys_that_arrow_pads_with_null_are_dropped_at_every_depth(tmp_path):
    import datasets

    given = [
        {"prompt": "a", "info": {"x": {"p": 1}}, "list": [{"u": 1}], "more": None},
        {
            "prompt": "b",
            "info": {"x": {"q": 2}, "y": "t"},
            "list": [{"v": None, "w": 2}],
            "more": 1,
        },
    ]
    datasets.Dataset.from_list(given, on_mixed_types="use_json").to_parquet(
        str(tmp_path / "a.parquet")
    )
    padded = [
        {"prompt": "a", "info": {"x": {"p": 1}}, "list": [{"u": 1}]},
        {"prompt": "b", "info": {"x": {"q": 2}, "y": "t"}, "list": [{"w": 2}], "more": 1},
    ]
    assert rows(tmp_path / "a.parquet") == padded


def test_a_mapping_function_sees_every_column_of_a_dataset(tmp_path):
    import datasets

    given = [{"prompt": "a", "hint": None}, {"prompt": "b", "hint": "h"}]
    datasets.Dataset.from_list(given).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "maps.py").write_text(
        "def add(row):\n    return {**row, 'hinted': row['hint'] is not None}\n"
    )
    found = rows(tmp_path / "a.parquet", map=f"{tmp_path}/maps.py:add")
    assert found == [
        {"prompt": "a", "hinted": False},
        {"prompt": "b", "hint": "h", "hinted": True},
    ]


def test_a_function_may_return_a_dataset_and_nothing_that_is_one_row(tmp_path):
    (tmp_path / "made.py").write_text(
        "import datasets, pandas\n"
        "def saved():\n"
        "    return datasets.Dataset.from_list([{'prompt': 'a', 'x': None}, {'prompt': 'b', 'x': 1}])\n"
        "def one():\n    return {'prompt': 'a'}\n"
        "def frame():\n    return pandas.DataFrame({'prompt': ['a']})\n"
    )
    assert rows(f"{tmp_path}/made.py:saved") == [{"prompt": "a"}, {"prompt": "b", "x": 1}]
    assert "iterable of dicts, and returned a dict" in faults(f"{tmp_path}/made.py:one")
    assert "and returned a DataFrame" in faults(f"{tmp_path}/made.py:frame")


def test_rows_of_reasoning_gym_come_by_name_and_are_scored_by_it(tmp_path):
    pytest.importorskip("reasoning_gym")
    found = tasks.read("reasoning_gym:chain_sum?size=3&max_terms=2")
    assert [one.id for one in found] == ["chain_sum-0-0", "chain_sum-0-1", "chain_sum-0-2"]
    assert found[0].messages[0]["content"].endswith("between <answer> and </answer>.")
    other = tasks.read("reasoning_gym:chain_sum?size=3&max_terms=2", split="test")
    assert not {one.id for one in found} & {one.id for one in other}
    (again, _, _) = tasks.read("reasoning_gym:chain_sum?size=3&max_terms=2&seed=0", split="test")
    assert again == found[0]
    said = [
        [*one.messages, {"role": "assistant", "content": f"<answer>{text}</answer>"}]
        for one, text in ((found[0], found[0].data["answer"]), (found[1], "no"))
    ]
    with Scorer("reasoning_gym:chain_sum", workers=1) as scorer:
        scores = scorer.gather(
            [Trajectory(one, 0, 0, text) for one, text in zip(found, said, strict=False)]
        )
    assert scores[0].reward == 1.0 and scores[1].reward < 0.5


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("reasoning_gym:chain_sums", "no dataset 'chain_sums'; did you mean chain_sum"),
        ("reasoning_gym:chain_sum?min_terms=9&max_terms=2", "refuses these options"),
    ],
)
def test_a_wrong_name_or_option_of_reasoning_gym_is_refused(source, fault):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match=f"reasoning_gym:.*{fault}"):
        tasks.read(source)

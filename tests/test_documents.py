"""The reader of JSON documents, and for every document of the library: each value replaced by wrong ones is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lqlora as lq
from lqlora._documents import Count, Length, Number, Reader, Text, json_values
from lqlora._messages import MESSAGE_LENGTH, shortened, shown
from lqlora.allocation import _schema as of_plans
from lqlora.checkpoint._schema import Content
from lqlora.costs import CostStore, StoredRow
from lqlora.costs import _schema as of_costs
from lqlora.errors import CheckpointError, FormatError, InvalidArgumentError, LQLoRAError, StoreError
from lqlora.integrations import _schema as of_bitsandbytes
from lqlora.integrations.bitsandbytes import from_bitsandbytes, to_bitsandbytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class _Inner(msgspec.Struct, forbid_unknown_fields=True):
    count: Length
    kind: Literal["a", "b"] = "a"


class _Outer(msgspec.Struct):
    rows: dict[Text, _Inner]
    pairs: list[tuple[Count, Number]] = []
    bound: Number | None = None
    few: Annotated[list[int], msgspec.Meta(min_length=1, max_length=2)] | msgspec.UnsetType = msgspec.UNSET
    free: Any = None


def refused(read: Callable[[], Any], error: type[LQLoRAError] = InvalidArgumentError) -> str:
    """Return the message of the error that reading raises, which is short and printable."""
    with pytest.raises(error) as caught:
        read()
    message = str(caught.value)
    assert len(message) <= MESSAGE_LENGTH
    assert message.isprintable()
    return message


class TestReader:
    READER = Reader("t.json", InvalidArgumentError)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("[1]", "the document must be an object with the fields rows, got [1]"),
            ("{}", "rows is missing"),
            ('{"rows": {"a.b": {"count": -1}}}', "rows['a.b'].count must be a whole number from 0 to 2147483647, got -1"),
            ('{"rows": {"a": {"count": 4611686018427387904}}}', "rows['a'].count"),
            ('{"rows": {"a": {"count": true}}}', "rows['a'].count must be a whole number from 0 to 2147483647, got true"),
            ('{"rows": {"a": {"count": 1.0}}}', "got 1.0"),
            ('{"rows": {"a": {"count": "1"}}}', "got '1'"),
            ('{"rows": {"a": {"count": 1, "kind": "c"}}}', "rows['a'].kind must be 'a' or 'b', got 'c'"),
            ('{"rows": {"a": {"count": 1, "more": 0}}}', "rows['a']['more'] is unknown. Known are count, kind"),
            ('{"rows": {"a": {"count": 1}, "b\\n": null}}', "rows['b\\n'] must be an object with the fields count, got null"),
            ('{"rows": {}, "pairs": [[1, 2], [3]]}', "pairs[1] must be a list of 2 entries, got [3]"),
            ('{"rows": {}, "pairs": [[1, 2], [3, "x"]]}', "pairs[1][1] must be a finite number, got 'x'"),
            ('{"rows": {}, "bound": 1e999}', "bound must be a finite number or null, got inf"),
            ('{"rows": {}, "bound": [1]}', "bound must be a finite number or null, got [1]"),
            ('{"rows": {}, "few": []}', "few must be a list of 1 to 2 entries, got []"),
            ('{"rows": {}, "few": [1, null]}', "few[1] must be a whole number, got null"),
            ('{"rows": {"' + "k" * 70_000 + '": {"count": 1}}}', "must have a key that is text of at most 65536 characters"),
            ('{"rows": {"a": {"count": 1, "count": 2}}}', "rows.a.count must occur once"),
            ('{"rows": {}, "free": [0, {"x": NaN}]}', "free[1].x must be a number of JSON, got NaN"),
            ('{"rows": {}, "free": -Infinity}', "free must be a number of JSON, got -Infinity"),
            ('{"rows": {}, "free": {"x y": ' + "9" * 5000 + "}}", "free['x y'] must be a shorter number, got 5000 digits"),
            ('[{"a": [], "b": {}}, [], [[0], NaN]]', "[2][1] must be a number of JSON, got NaN"),
            ("[" * 100_000, "nested too deep"),
            ('{"a": 1,}', "must be valid JSON, got an error in line 1, column 9"),
            (b'{"a": "\xff"}', "UTF-8, got the byte 0xff"),
            (b"\xff\xfe{\0}\0", "UTF-8"),
            ("", "must be valid JSON"),
            ('{"rows": {"\\ud800": {"count": 1}}}', "rows must hold texts of Unicode characters, got '\\ud800'"),
            ('{"rows": {}, "free": ["\\uDC00\\ud800"]}', "free[0] must hold texts"),
            ('{"rows": {}, "free": "\ud800"}', "free must hold texts"),
            (r'{"rows": {}, "free": "\\ud83d\ude00"}', "free must hold texts"),
            (None, "must be text, got null"),
        ],
        ids=lambda own: shown(own, 40),
    )  # fmt: skip
    def test_a_fault_is_told_with_its_place_and_value(self, text, said):
        message = refused(lambda: self.READER.read(text, _Outer))
        assert message.startswith("t.json: ")
        assert said in message

    @pytest.mark.parametrize("index", [0, 1, 5, 6, 1023, 1024, 1025, 2500])
    def test_the_first_of_several_faults_is_told(self, index):
        pairs = [[1, 1.0]] * index + [[1, "x"]] + [[1, 1.0], [], None] * (index % 2)
        rows = {f"m{own}": {"count": 1} for own in range(index)} | {"bad": {}, "after": None}
        assert f": pairs[{index}][1] " in refused(lambda: self.READER.convert({"rows": {}, "pairs": pairs}, _Outer))
        assert ": rows['bad'].count is missing" in refused(lambda: self.READER.convert({"rows": rows}, _Outer))

    def test_what_fits_is_read(self):
        text = '{"rows": {"a": {"count": 2147483647}}, "pairs": [[0, 1]], "few": [1], "free": {"x": [1]}, "other": 1}'
        found = self.READER.read(text.encode(), _Outer)
        assert found == _Outer({"a": _Inner(2**31 - 1)}, [(0, 1.0)], None, [1], {"x": [1]})

    @pytest.mark.parametrize("text", ["\U0001f600é\x7f", "\\ud800", "\\\\\ufffe"], ids=ascii)
    def test_texts_are_those_of_json(self, text):
        for document in (json.dumps([text]), json.dumps([text], ensure_ascii=False), json.dumps([text]).encode()):
            assert self.READER.read(document, list[Text]) == [text]

    def test_numbers_are_those_of_json(self):
        text = "[0.1, 1e-320, 5e-324, 123456789012345678, 1.7976931348623157e308, -0.0]"
        assert [value.hex() for value in self.READER.read(text, list[float])] == [
            float(value).hex() for value in json.loads(text)
        ]
        digits = "7" * 4300  # as many as Python reads
        assert self.READER.parse(digits) == int(digits)

    @pytest.mark.parametrize("nest", [lambda own: [own], lambda own: {"a": own}], ids=["lists", "objects"])
    def test_values_of_free_form_have_a_bounded_depth(self, nest):
        value: Any = 0
        for _ in range(200):
            value = nest(value)
        self.READER.check_depth(value, "free")
        assert "free must be nested at most 200 levels" in refused(lambda: self.READER.check_depth(nest(value), "free"))

    def test_a_mapping_is_returned_as_json_gives_it(self):
        assert json_values({"a": (1, 2.5), 3: None}, "settings", StoreError) == {"a": [1, 2.5], "3": None}

    @pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"x", np.float32(1), {1: 0, "1": 0}], ids=repr)
    def test_a_mapping_that_json_does_not_have_is_refused_by_name(self, value):
        assert refused(lambda: json_values({"a": value}, "settings", StoreError), StoreError).startswith("settings ")

    def test_long_texts_are_cut_and_others_are_left(self):
        assert shortened("t: short") == "t: short"
        assert len(shortened("x" * 1000)) == MESSAGE_LENGTH
        assert shown("x" * 1000, 20) == f"'{'x' * 18}…"
        assert (
            shown({"a": {"b": {"c": {"d": 1}}}, "e": 1, "f": 2, "g": 3})
            == "{'a': {'b': {'c': {...}}}, 'e': 1, 'f': 2, ...}"
        )
        assert shown(-(10**300)) == "an integer of 301 digits"


@dataclass(frozen=True)
class Document:
    """A document of the library: a good example, its schema, and the function that reads it."""

    example: dict[str, Any]
    schema: Any
    read: Callable[[str], Any]
    error: type[LQLoRAError]
    place: str = ""


TERNARY = lq.BlockFormat(lq.Codebook([-1, 0, 0.25], name="ternary"), 8)
FORMATS = [lq.BlockFormat.parse("nf4/8:float16"), TERNARY]


def _table() -> lq.CostTable:
    rng = np.random.default_rng(0)
    return lq.cost_table({"a.b": rng.standard_normal((8, 16)), "c": rng.standard_normal((4, 8))}, FORMATS, rank=1)


def _plan(folder: Path) -> Document:
    plan = lq.allocate(_table(), bits_per_weight=9, minimum_bits={"c": 1})
    return Document(json.loads(plan.to_json()), of_plans.PlanV4, lq.Plan.from_json, InvalidArgumentError)


def _old_plan(folder: Path) -> Document:
    text = (Path(__file__).parent / "allocation" / "data" / "plan_v3_bits.json").read_text(encoding="utf-8")
    document = json.loads(text)
    document |= {key: document[key][:1] for key in ["demands"]} | {
        "matrices": dict(list(document["matrices"].items())[2:3])
    }
    return Document(document, of_plans.PlanV3, lq.Plan.from_json, InvalidArgumentError)


def _cost_table(folder: Path) -> Document:
    return Document(json.loads(_table().to_json()), of_costs.Table, lq.CostTable.from_json, InvalidArgumentError)


def _lines(folder: Path) -> list[str]:
    with CostStore(folder / "store", {"seed": 0, "mode": "exact"}) as store:
        store.append(StoredRow("a.b", (2, 3), "c0ffee", "none", {"nf4/64:float16 rank 8": 0.1}))
    return (folder / "store").read_text().splitlines()


def _stored(folder: Path, number: int, schema: Any) -> Document:
    lines = _lines(folder)

    def read(text: str) -> Any:
        try:
            checked = json.dumps(json.loads(text))
        except (RecursionError, ValueError):
            checked = text
        checksum = hashlib.sha256(checked.encode()).hexdigest()[:16]
        changed = f'{{"sum": "{checksum}", "line": {text}}}'
        (folder / "store").write_text(
            "".join(f"{changed if own == number else line}\n" for own, line in enumerate(lines))
        )
        return CostStore.read(folder / "store")

    return Document(json.loads(lines[number])["line"], schema, read, StoreError, "line")


def _store_head(folder: Path) -> Document:
    return _stored(folder, 0, of_costs.Head)


def _store_row(folder: Path) -> Document:
    return _stored(folder, 1, of_costs.StoredCosts)


def _store_line(folder: Path) -> Document:
    lines = _lines(folder)

    def read(text: str) -> Any:
        (folder / "store").write_text(f"{lines[0]}\n{text}\n")
        return CostStore.read(folder / "store")

    return Document(json.loads(lines[1]), of_costs.Line, read, StoreError)


def _checkpoint(folder: Path) -> Document:
    rng = np.random.default_rng(0)
    found = {
        name: lq.decompose(rng.standard_normal((8, 16)), own, rank=1) for name, own in zip("ab", FORMATS, strict=True)
    }
    lq.save(folder / "file", {"m.a": found["a"], "b": found["b"]}, {"x": np.ones(2)}, {"note": ["text", 1, None]})
    text, arrays = _metadata(folder / "file"), load_file(folder / "file")

    def read(changed: str) -> Any:
        save_file(arrays, folder / "changed", metadata={"lqlora": changed})
        return lq.load(folder / "changed")

    return Document(json.loads(text), Content, read, CheckpointError)


def _metadata(path: Path) -> str:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    text: str = header["__metadata__"]["lqlora"]
    return text


def _bitsandbytes(text: str, schema: Any) -> Document:
    tensors = to_bitsandbytes(lq.quantize(np.linspace(-1, 1, 64, dtype=np.float32), lq.BlockFormat.parse(text)))
    (key,) = (key for key in tensors if "quant_state" in key)
    return Document(
        json.loads(tensors[key].tobytes()),
        schema,
        lambda changed: from_bitsandbytes(tensors | {key: np.frombuffer(changed.encode(), dtype=np.uint8)}),
        FormatError,
    )


def _state(folder: Path) -> Document:
    return _bitsandbytes("nf4/64:float32", of_bitsandbytes.State)


def _nested_state(folder: Path) -> Document:
    return _bitsandbytes("nf4/32:d8/256:float32", of_bitsandbytes.NestedState)


DOCUMENTS = [
    _plan, _old_plan, _cost_table, _store_head, _store_row, _store_line, _checkpoint, _state, _nested_state,
]  # fmt: skip

#: Values of all kinds, most of which are wrong in most places.
VALUES = [
    None,
    True,
    0,
    -1,
    0.5,
    2**62,
    2**70,
    10**400,
    "text",
    "\x1b[2J\n",
    "",
    "x" * 70_000,
    [],
    {},
    [[]],
    {"": None},
]

#: JSON that is refused at any place.
TEXTS = ["NaN", "-Infinity", "9" * 5000, '{"twice": 1, "twice": 1}', '"\\udc00"']


def places(document: Any, kind: Any, place: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield all places of a document, as messages name them, with the keys that lead there."""
    inspect = msgspec.inspect
    if isinstance(kind, inspect.UnionType):
        kind = next((own for own in kind.types if isinstance(own, inspect.ListType)), kind)
    children: list[tuple[Any, Any, str]] = []
    if isinstance(kind, inspect.StructType):
        children = [
            (own.encode_name, own.type, f".{own.encode_name}") for own in kind.fields if own.encode_name in document
        ]
    elif isinstance(kind, inspect.DictType):
        children = [(key, kind.value_type, f"[{key!r}]") for key in document]
    elif isinstance(kind, inspect.ListType | inspect.VarTupleType):
        children = [(index, kind.item_type, f"[{index}]") for index in range(len(document))]
    elif isinstance(kind, inspect.TupleType):
        children = [(index, own, f"[{index}]") for index, own in enumerate(kind.item_types)]
    for key, own, end in children:
        yield (place + end).removeprefix("."), (key,)
        yield from ((inner, (key, *keys)) for inner, keys in places(document[key], own, place + end))


def replaced(document: Any, keys: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of a document with another value at a place."""
    if not keys:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[keys[0]] = replaced(document[keys[0]], keys[1:], value)
    return copy


def is_valid(document: Any, schema: Any) -> bool:
    try:
        msgspec.convert(document, schema)
    except msgspec.ValidationError:
        return False
    return True


@pytest.fixture(params=DOCUMENTS, ids=lambda own: own.__name__.strip("_"))
def document(request, tmp_path) -> Document:
    return request.param(tmp_path)


class TestDocuments:
    def test_the_example_is_read(self, document):
        document.read(json.dumps(document.example))

    def test_each_value_replaced_by_others_is_read_or_refused_with_its_place(self, document):
        found, count = list(places(document.example, msgspec.inspect.type_info(document.schema), document.place)), 0
        for place, keys in found:
            for value in VALUES:
                changed = replaced(document.example, keys, value)
                text = json.dumps(changed)
                if is_valid(changed, document.schema):
                    try:
                        document.read(text)
                    except document.error as error:
                        assert len(str(error)) <= MESSAGE_LENGTH  # noqa: PT017 - other values are read
                else:
                    count += 1
                    assert f": {place}" in refused(lambda text=text: document.read(text), document.error)
        assert count > 3 * len(found) > 10

    def test_what_is_not_json_is_refused_at_its_place(self, document):
        for place, keys in places(document.example, msgspec.inspect.type_info(document.schema), document.place):
            changed = json.dumps(replaced(document.example, keys, "@"))
            for text in TEXTS:
                broken = changed.replace('"@"', text)
                message = refused(lambda broken=broken: document.read(broken), document.error)
                assert str(keys[-1]) in message, place

    def test_a_missing_field_is_named(self, document):
        for field in msgspec.structs.fields(document.schema):
            rest = {key: own for key, own in document.example.items() if key != field.encode_name}
            if field.required:
                place = f"{document.place}.{field.encode_name}".removeprefix(".")
                assert f": {place} is missing" in refused(
                    lambda rest=rest: document.read(json.dumps(rest)), document.error
                )
            else:
                document.read(json.dumps(rest))

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"text"', "{}", "[" * 5000, '{"a": ' * 2000, "{} {}"])
    def test_other_texts_are_refused(self, document, text):
        refused(lambda: document.read(text), document.error)


W = np.random.default_rng(0).standard_normal((8, 16))
DECOMPOSED = lq.decompose(W, FORMATS[0], rank=1)


def _written_table(name: str, folder: Path) -> str:
    table = lq.CostTable.from_json(lq.cost_table({name: W}, FORMATS[:1], rank=1).to_json())
    return table.names[0]


def _written_plan(name: str, folder: Path) -> str:
    plan = lq.allocate(lq.cost_table({name: W}, FORMATS[:1], rank=1), bits_per_weight=9)
    return next(iter(lq.Plan.from_json(plan.to_json()).matrices))


def _written_matrix(name: str, folder: Path) -> str:
    lq.save(folder / "file", {name: DECOMPOSED})
    return next(iter(lq.load(folder / "file").matrices))


def _written_tensor(name: str, folder: Path) -> str:
    lq.save(folder / "file", {}, {name: W})
    return next(iter(lq.load(folder / "file").tensors))


def _written_metadata(name: str, folder: Path) -> str:
    lq.save(folder / "file", {}, {}, {"of": {name: name}})
    return next(iter(lq.load(folder / "file").metadata["of"]))


def _written_settings(name: str, folder: Path) -> str:
    for _ in range(2):  # the second time, the settings of the file are compared with these
        CostStore(folder / "file", {name: name}).close()
    return name


def _written_row(name: str, folder: Path) -> str:
    with CostStore(folder / "file", {}) as store:
        (folder / "file").replace(folder / "store")  # a store that is begun stays
        store.append(StoredRow(name, (2, 3), "x", name, {name: 1.0}))
    row = next(iter(CostStore.read(folder / "store").values()))
    return row.name if row.name == row.weighting else str(row)


WRITERS = [
    _written_table, _written_plan, _written_matrix, _written_tensor, _written_metadata, _written_settings, _written_row,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITERS, ids=lambda own: own.__name__.removeprefix("_written_"))
class TestWriters:
    """Each writer writes a file that its reader accepts, or refuses and leaves no file."""

    @pytest.mark.parametrize("name", ["\ud800", "a\udc00b", "\udc00\ud800"], ids=ascii)
    def test_names_that_are_not_unicode_are_refused(self, write, name, tmp_path):
        assert "Unicode" in refused(lambda: write(name, tmp_path), LQLoRAError)
        assert not (tmp_path / "file").exists()

    @pytest.mark.parametrize(
        "name", ["", "\0", "é\x7f\ufffe", "\U0001f600", "\\ud800", "x" * 2**16], ids=lambda own: ascii(own[:9])
    )
    def test_other_names_are_read_back(self, write, name, tmp_path):
        assert write(name, tmp_path) == name

    def test_names_without_a_bound_are_read_back_or_refused(self, write, tmp_path):
        name = "x" * (2**16 + 1)
        try:
            assert write(name, tmp_path) == name
        except LQLoRAError as error:
            assert len(str(error)) <= MESSAGE_LENGTH  # noqa: PT017 - other names are read
            assert not (tmp_path / "file").exists()


def test_all_documents_are_written_by_one_function():
    """The others hash a text, print it, or pass it to another process or library."""
    root = Path(lq.__file__).parent
    found = {
        file.relative_to(root).as_posix()
        for file in root.rglob("*.py")
        if re.search(r"json\.(dumps?|encode)\(", file.read_text(encoding="utf-8"))
    }
    others = {"solvers/vendors/ortools.py", "solvers/vendors/_ortools_process.py", "integrations/_adapter_files.py"}
    others |= {
        "integrations/_calibration_folder.py",
        "integrations/_streaming_folder.py",
        "integrations/_block_runs.py",
        "recipes/checkpoints.py",
        "integrations/_model_folders.py",
        "cli/console.py",
    }
    assert found == {"_documents.py", "checkpoint/_container.py", "costs/store.py"} | others


def test_values_that_json_turns_into_those_of_the_schema_are_written():
    reader = Reader("t", InvalidArgumentError)
    assert reader.write({"rows": {}, "bound": np.float64(0.5)}, _Outer) == '{"rows": {}, "bound": 0.5}'
    assert reader.write({3: (1,)}, dict[Text, list[Count]]) == '{"3": [1]}'
    assert "count must be" in refused(lambda: reader.write({"rows": {"a": {"count": -1}}}, _Outer))
    assert "JSON" in refused(lambda: reader.write({"rows": {}, "bound": np.float64("nan")}, _Outer))


def test_codebooks_that_take_long_are_refused_by_writers_too(monkeypatch):
    monkeypatch.setattr("lqlora.codebooks.names._MAX_WORK", 100)
    formats = [lq.BlockFormat.parse(f"bof4-{size}/8:float16") for size in range(2, 6)]
    cells = {key: np.ones((1, len(formats)), np.int64) for key in ("sizes", "factor_sizes")}
    columns = tuple(lq.costs.Configuration(own, 1) for own in formats)
    table = lq.CostTable(("w",), ((8, 16),), columns, np.ones((1, len(formats))), **cells)
    assert "4 codebooks" in refused(table.to_json, FormatError)


class TestWorkOfNames:
    """A short document cannot ask for the levels of any number of codebooks."""

    NAMES = tuple(f"bof8-{size}" for size in range(2, 102))

    def test_a_table(self):
        document = json.loads(_table().to_json())
        document["configurations"] = [{"format": f"{name}/8", "rank": 1} for name in self.NAMES]
        message = refused(lambda: lq.CostTable.from_json(json.dumps(document)))
        assert "configurations" in message
        assert "100 codebooks" in message

    def test_a_plan(self, tmp_path):
        document = _plan(tmp_path).example
        row = document["matrices"]["c"] | {"format": ""}
        row = {key: own for key, own in row.items() if key not in ("levels", "normalization")}
        document["matrices"] = {name: row | {"format": f"{name}/8"} for name in self.NAMES}
        assert "100 codebooks" in refused(lambda: lq.Plan.from_json(json.dumps(document)))

    def test_a_checkpoint(self, tmp_path):
        document = _checkpoint(tmp_path)
        row = document.example["matrices"]["m.a"]
        changed = document.example | {"matrices": {name: row | {"format": f"{name}/8"} for name in self.NAMES}}
        assert "100 codebooks" in refused(lambda: document.read(json.dumps(changed)), CheckpointError)


def test_a_plan_that_could_not_be_used_is_refused(tmp_path):
    document = _plan(tmp_path).example
    for name in "ab":
        document["matrices"][name] = document["matrices"]["a.b"] | {"cost": 1.7e308}
    assert "matrices must have costs" in refused(lambda: lq.Plan.from_json(json.dumps(document)))
    document = _plan(tmp_path).example
    document["matrices"]["c"]["format"] = "nf4/8@2:float16"
    assert "matrices['c'].format: axis 2" in refused(lambda: lq.Plan.from_json(json.dumps(document)))


@pytest.mark.parametrize("read", [lq.load, lq.verify, CostStore.read, lambda path: CostStore(path, {})])
class TestPaths:
    @pytest.mark.parametrize("path", ["a\0b", "x" * 5000, 5], ids=["zero byte", "long", "number"])
    def test_what_is_not_a_path_is_refused(self, read, path):
        refused(lambda: read(path), LQLoRAError)

    def test_a_folder_is_refused(self, read, tmp_path):
        assert "folder" in refused(lambda: read(tmp_path), OSError)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_a_pipe_is_refused_and_not_waited_for(self, read, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        found: list[str] = []
        thread = threading.Thread(
            target=lambda: found.append(refused(lambda: read(tmp_path / "pipe"), OSError)), daemon=True
        )
        thread.start()
        thread.join(10)
        assert len(found) == 1
        assert "a pipe" in found[0]


class TestSettingsOfStores:
    def test_a_store_is_opened_again_with_settings_that_json_changes(self, tmp_path):
        settings = {"ranks": (8, 16), "by": {3: (1,)}}
        for _ in range(2):
            CostStore(tmp_path / "store", settings).close()
        with pytest.raises(StoreError, match=r"ranks is \[8, 16\], not \[8, 17\]"):
            CostStore(tmp_path / "store", {**settings, "ranks": (8, 17)})

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), {1}, np.int64(1)], ids=repr)
    def test_settings_that_are_not_json_are_refused_before_there_is_a_file(self, tmp_path, value):
        assert refused(lambda: CostStore(tmp_path / "store", {"seed": value})).startswith("settings ")
        assert not (tmp_path / "store").exists()

    @pytest.mark.parametrize(
        "change", [{"name": ["a"]}, {"shape": ("a",)}, {"content": None}, {"shape": (-1, 2)}], ids=repr
    )
    def test_a_row_that_could_not_be_read_is_not_written(self, tmp_path, change):
        row = StoredRow(**{"name": "a", "shape": (2, 3), "content": "x", "weighting": "none", "costs": {}} | change)
        with CostStore(tmp_path / "store", {}) as store:
            before = (tmp_path / "store").read_bytes()
            (place,) = change
            assert place in refused(lambda: store.append(row), StoreError)
        assert (tmp_path / "store").read_bytes() == before

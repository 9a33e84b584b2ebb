"""The one schema of measured figures: JSON files under bench/results/, written and read here and nowhere else.

    {"version": 2, "meta": {"device": …, …}, "rows": [{"suite": …, …}, …]}

Every key of `Meta` and of `Row` is present in a file; null stands where a figure does not apply or is not known. What is read
is checked as what is written, and an error names the file, the row and the field. bench/results/README.md explains the fields.
"""

import json
import re
import types
import typing
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from ..files import replace_file

VERSION = 2
SUITES = ("kernels", "blocks", "train", "inference")
IMPLEMENTATIONS = (
    "eager", "eager_nhwc", "compile", "compile_max", "compile_graphs", "ours", "ours:passes", "ours:passes_cuda", "ours:passes_cpu",
    "ours:passes_triton", "ours:triton", "ours:cudnn", "ours:recompute", "ours:triton_recompute", "cudnn", "copy", "apex", "inplace_abn",
    "folded", "compile_folded", "compile_frozen", "onnxruntime",
)  # fmt: skip
STATUSES = ("ok", "oom", "timeout", "wrong", "unsupported")
DTYPES = ("float64", "float32", "float16", "bfloat16")
LARGEST = 1e300  #: number in a file; a whole one may be larger than a float can be
DATE_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
#: Fields of `Meta` that files of version 1 lack.
SINCE_2 = ("cpu", "isa", "threads", "onednn", "load")
#: What only a case that ran to the end, and right, has.
FIGURES = (
    "median_ms", "p10_ms", "p90_ms", "images_per_s", "tflops", "gbytes_per_s", "copy_fraction", "roofline_fraction",
)  # fmt: skip


class SchemaError(ValueError):
    """A file, or a value that is to be written, does not follow the schema. The message names the place and what was expected."""


@dataclass(frozen=True)
class Meta:
    """The machine and the versions that a file's rows were measured with."""

    device: str  #: the GPU's name, or "cpu"
    sm_count: int | None
    driver: str | None
    cuda: str | None
    cudnn: str | None
    torch: str
    triton: str | None
    commit: str  #: of this repository; "-dirty" behind it where files were changed
    date: str  #: UTC, as `DATE_FORMAT`
    clocks: dict[str, int] | None  #: MHz as found right after the measurement: sm, memory, and the highest of each
    # Of a CPU, since version 2.
    cpu: str | None = None  #: model
    isa: str | None = None  #: instruction sets: PyTorch's, and that of this package's kernels
    threads: int | None = None  #: of PyTorch
    onednn: str | None = None  #: version
    load: float | None = None  #: load average of the minute before the measurement: processes that wanted a processor

    def __post_init__(self):
        _check_types(self)
        for name in ("device", "torch", "commit"):
            if not getattr(self, name):
                raise SchemaError(f"{name}: expected a string that is not empty")
        if not re.fullmatch(r"[0-9A-Za-z._-]+", self.commit):
            raise SchemaError(f"commit: expected letters, digits, '.', '_' and '-', since it goes into a file's name; got {self.commit!r}")
        _check_not_negative(self, "sm_count", "threads", "load")
        try:
            datetime.strptime(self.date, DATE_FORMAT)
        except ValueError:
            raise SchemaError(f"date: expected UTC as in 2026-01-31T23:59:59Z; got {self.date!r}") from None


@dataclass(frozen=True)
class Row:
    """One implementation of one case."""

    suite: str  #: one of `SUITES`
    case: str  #: a model's or a kernel's name
    impl: str  #: one of `IMPLEMENTATIONS`
    dtype: str  #: one of `DTYPES`: of the activations
    batch: int | None
    shape: list[int] | None  #: of one image: [C, H, W]
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    images_per_s: float | None = None
    tflops: float | None = None  #: 10^12 FLOP/s
    gbytes_per_s: float | None = None  #: 10^9 bytes/s, of the bytes that the case must move
    copy_fraction: float | None = None  #: gbytes_per_s over that of a device-to-device copy in the same run
    roofline_fraction: float | None = None  #: the floor, at the rates measured in the same run, over median_ms
    peak_memory_bytes: int | None = None
    max_rel_error: float | None = None
    status: str = "ok"  #: "ok", or one of `STATUSES` with the reason: "oom: tried to allocate 2 GiB"

    def __post_init__(self):
        _check_types(self)
        _check_one_of("suite", self.suite, SUITES)
        _check_one_of("impl", self.impl, IMPLEMENTATIONS)
        _check_one_of("dtype", self.dtype, DTYPES)
        if not self.case:
            raise SchemaError("case: expected a string that is not empty")
        _check_not_negative(self, *FIGURES, "batch", "peak_memory_bytes", "max_rel_error")
        kind, _, reason = self.status.partition(": ")
        _check_one_of("status", kind, STATUSES)
        if (kind == "ok") != (not reason):
            raise SchemaError(f"status: expected 'ok', or another word with its reason, as in 'oom: reason'; got {self.status!r}")
        times = self.p10_ms, self.median_ms, self.p90_ms
        if kind == "ok":
            if None in times or list(times) != sorted(times):
                raise SchemaError(f"p10_ms, median_ms, p90_ms: expected three numbers in this order of size; got {list(times)}")
        elif given := [name for name in FIGURES if getattr(self, name) is not None]:
            raise SchemaError(f"{given[0]}: expected null, since status is {self.status!r}; a case that failed has no speed")


@dataclass(frozen=True)
class Results:
    """A file."""

    meta: Meta
    rows: list[Row]

    def __post_init__(self):
        if len({row.suite for row in self.rows}) > 1:
            raise SchemaError("rows: expected rows of one suite, after which the file is named")
        if not self.rows:
            raise SchemaError("rows: expected at least one")


def results_path(root: Path, results: Results) -> Path:
    """Where `results` belong: root/<gpu>/<suite>-<date>-<commit>.json, in lower case, words joined by '-'."""
    gpu = re.sub(r"[^a-z0-9]+", "-", results.meta.device.lower()).strip("-")
    date = results.meta.date.replace("-", "").replace(":", "")
    return root / gpu / f"{results.rows[0].suite}-{date}-{results.meta.commit[:12]}.json"


def write_results(results: Results, path: Path) -> None:
    """Write `results` to `path`, whole or not at all; its folder is made. Lines are short, so that a diff can be read."""
    rows = ",\n  ".join(json.dumps(asdict(row), allow_nan=False) for row in results.rows)
    meta = json.dumps(asdict(results.meta), allow_nan=False)
    text = f'{{"version": {VERSION},\n "meta": {meta},\n "rows": [\n  {rows}\n ]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: file.write(text.encode()))


def read_results(path: Path) -> Results:
    """The results in `path`.

    Raises FileNotFoundError; SchemaError, naming the file, the row and the field, where it is not JSON, does not follow the
    schema, or was written by a newer version of this package.
    """
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and lists in lists in lists
        raise SchemaError(f"{path}: expected JSON; {next(iter(str(error).splitlines()), '')}") from None
    top = _object(content, f"{path}", ("version", "meta", "rows"), optional=("version",))
    version = top.get("version", VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise SchemaError(f"{path}: version: expected a whole number of at least 1; got {version!r}")
    if version > VERSION:
        raise SchemaError(f"{path}: version: expected at most {VERSION}; got {version}: a newer fused_resnet wrote this file")
    if not isinstance(top["rows"], list):
        raise SchemaError(f"{path}: rows: expected a list; got {type(top['rows']).__name__}")
    meta = _read(Meta, top["meta"], f"{path}: meta", optional=SINCE_2 if version < 2 else ())
    rows = [_read(Row, row, f"{path}: rows[{i}]") for i, row in enumerate(top["rows"])]
    return _built(partial(Results, meta, rows), f"{path}")


def _refuse_constant(name: str) -> None:
    raise SchemaError(f"expected numbers that are finite; got {name}")


def _read(kind: type, value: Any, where: str, optional: typing.Sequence[str] = ()) -> Any:
    names = [field.name for field in fields(kind)]
    return _built(partial(kind, **_object(value, where, names, optional)), where)


def _built(build: typing.Callable[[], Any], where: str) -> Any:
    try:
        return build()
    except SchemaError as error:
        raise SchemaError(f"{where}: {error}") from None


def _object(value: Any, where: str, names: typing.Sequence[str], optional: typing.Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SchemaError(f"{where}: expected an object with {', '.join(names)}; got {type(value).__name__}")
    if missing := [name for name in names if name not in value and name not in optional]:
        raise SchemaError(f"{where}: {missing[0]}: expected, and missing")
    if unknown := [name for name in value if name not in names]:
        raise SchemaError(f"{where}: {unknown[0]}: unknown to version {VERSION} of the schema; a newer fused_resnet may have written it")
    return value


def _check_one_of(name: str, value: str, choices: typing.Sequence[str]) -> None:
    if value not in choices:
        raise SchemaError(f"{name}: expected one of {', '.join(choices)}; got {value!r}")


def _check_not_negative(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if value is not None and not 0 <= value <= LARGEST:
            raise SchemaError(f"{name}: expected a finite number of at least 0, or null; got {value!r:.80}")


def _check_types(record: Any) -> None:
    hints = typing.get_type_hints(type(record))
    for name, hint in hints.items():
        value = getattr(record, name)
        if not _fits(value, hint):
            raise SchemaError(f"{name}: expected {_words(hint)}; got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`, one of those that the dataclasses above use."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(v, typing.get_args(hint)[0]) for v in value)
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict) and all(
            _fits(part, kind) for pair in value.items() for part, kind in zip(pair, typing.get_args(hint), strict=True)
        )
    if isinstance(value, bool):  # which Python takes for an int
        return False
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def _words(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_words(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return "a list of whole numbers"
    if typing.get_origin(hint) is dict:
        return "an object of whole numbers"
    return {str: "a string", int: "a whole number", float: "a number", type(None): "null"}[hint]

"""What a run folder says of itself: ``semalign.json``, ``results.json`` and its adapter's files, read and checked."""

from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from hf_semalign.errors import InputError, MissingFileError
from hf_semalign.files import ADAPTER, RECORD_NAME, check_header, file_digest, read_json
from hf_semalign.method.pairing import LayerPairing

RESULTS_NAME = "results.json"


class Written(TypedDict):
    """Answers of the align split that a model has written."""

    by: Literal["source", "target"]
    temperature: float
    max_new_tokens: int
    rows: int
    cut: int
    empty: int
    unusable: int


class Split(TypedDict):
    """A split of the data."""

    rows: int
    fingerprint: str
    answers: NotRequired[Written]


class Map(TypedDict):
    """The map between the spaces."""

    shape: list[int]
    shared_tokens: int
    condition_number: float
    scales: list[float]


class Settings(TypedDict):
    """Those of the settings that others read."""

    layer_loss: Literal["relation", "steering", "fisher"]
    output_loss: Literal["kl", "cosine", "answers"]
    relation_weight: float
    kl_weight: float
    frontier: Literal["single", "cumulative", "joint"]
    scale: str
    max_steps: int
    seed: int


class Tokenizers(TypedDict):
    """What two tokenizers share: classes of tokens, and the share of aligned answer tokens by split."""

    classes: int
    aligned: dict[str, float]


class Versions(TypedDict):
    """Versions of packages."""

    hf_semalign: str


class Record(TypedDict):
    """What others read of ``semalign.json``."""

    method: Literal["semalign", "kd", "sft", "seeking", "laten"]
    source: str
    target: str
    pairing: dict[str, Any]
    map: Map
    settings: Settings
    data: dict[str, Split]
    versions: Versions
    adapter_checksum: str
    stages: NotRequired[list[int]]
    tokenizers: NotRequired[Tokenizers]
    licences: NotRequired[dict[str, dict[str, str] | None]]
    seeking: NotRequired[dict[str, Any]]
    laten: NotRequired[dict[str, Any]]


class AdapterConfig(TypedDict):
    """What others read of peft's configuration."""

    peft_type: str
    task_type: str | None
    base_model_name_or_path: str | None
    r: int
    lora_alpha: float
    rank_pattern: NotRequired[dict[str, int]]


class Score(TypedDict):
    """What lm-eval said of a model on a benchmark."""

    task: str
    metric: str
    value: float
    rows: int
    limit: int | None
    chat_template: bool
    backend: str
    harness: str
    data: str
    outcomes: NotRequired[str]


class Benchmarks(TypedDict):
    """What others read of ``benchmarks.json``."""

    model: str
    target: str | None
    adapter_checksum: str | None
    benchmarks: list[Score]


class Pair(TypedDict):
    """Names of the models."""

    source: str
    target: str


class Row(TypedDict):
    """A method in a table of a comparison; its figures are of many names."""

    name: str


class Table(TypedDict):
    """A task under a budget."""

    task: str
    budget: str
    target: dict[str, Any]
    source: dict[str, Any]
    methods: list[Row]
    left_out: NotRequired[list[str]]


class Reported(TypedDict):
    """Figures of others."""

    origin: str
    rows: dict[str, dict[str, float]]


class Comparison(TypedDict):
    """What others read of ``compare.json``."""

    pair: Pair
    reference: str
    tables: list[Table]
    reported: Reported | None


class Forgetting(TypedDict):
    """What training did to a task that was not transferred."""

    kl: float
    loss: float
    accuracy: float
    exact_match: NotRequired[dict[str, float]]


class Metrics(TypedDict, total=False):
    """Of one model."""

    kl: float
    loss: float
    exact_match: dict[str, float]
    benchmarks: list[Score]
    forgetting: dict[str, Forgetting]


class Results(TypedDict):
    """What others read of ``results.json``."""

    task: str
    dataset: str | None
    metrics: dict[str, Metrics]
    steps: int
    history: list[dict[str, Any]]
    seconds: dict[str, float]
    peak_memory_mb: float | None
    machine: dict[str, Any]
    figures: list[str]
    cost: dict[str, float]
    data_task: NotRequired[str]
    adapter_checksum: NotRequired[str]


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a run folder's ``semalign.json``.

    Raises:
        FileNotFoundError: a folder without it.
        ValueError: it is damaged.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        if any(folder.glob(f"checkpoint-*/{RECORD_NAME}")):
            raise MissingFileError(f"{folder} has no {RECORD_NAME} yet: re-run its command to finish the run.")
        raise MissingFileError(f"{folder} has no {RECORD_NAME}: it is not a run folder of hf_semalign.")
    record = read_json(path, Record)
    LayerPairing.from_dict(record["pairing"], f"the pairing of {path}")
    return record


def read_results(folder: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """The content of a run folder's ``results.json``; ``None`` where there is none.

    Raises:
        ValueError: it is damaged, or of another adapter than the record.
    """
    path = folder / RESULTS_NAME
    if not path.is_file():
        return None
    results = read_json(path, Results)
    checksum = record["adapter_checksum"]
    if record["method"] not in results["metrics"] or results.get("adapter_checksum", checksum) != checksum:
        raise InputError(f"{path} is of another adapter than {RECORD_NAME}: take it away, or run its recipe again.")
    return results


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The content of peft's configuration beside an adapter.

    Raises:
        ValueError: it is damaged.
    """
    return read_json(folder / ADAPTER[1], AdapterConfig)


def check_adapter(folder: Path) -> None:
    """Refuse a folder that lacks an adapter in safetensors, or where it is damaged; of the weights the header is read.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is damaged.
    """
    if missing := [name for name in ADAPTER if not (folder / name).is_file()]:
        raise MissingFileError(f"{folder} lacks {missing}: expected a folder with {' and '.join(ADAPTER)}.")
    check_header(folder / ADAPTER[0])
    read_adapter_config(folder)


def check_recorded(folder: Path, record: dict[str, Any]) -> None:
    """Refuse an adapter that is not the one that the record of its folder is about, or a checkpoint that needs another base.

    Raises:
        ValueError: the checksums differ, or it is a checkpoint of Seeking, whose matrices belong to a changed target.
    """
    if file_digest(folder / ADAPTER[0]) != record["adapter_checksum"]:
        raise InputError(f"{ADAPTER[0]} of {folder} is not the one that {RECORD_NAME} is about: copy or download both again.")
    rank = record.get("seeking", {}).get("adapter_rank")
    if rank is not None and read_adapter_config(folder)["r"] != rank:
        raise InputError(f"{folder} is a checkpoint of Seeking, for a base that only its run has: name the finished folder.")

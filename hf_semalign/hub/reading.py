"""Read and check the files of a run folder: ``semalign.json``, ``results.json`` and the adapter."""

from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from hf_semalign.errors import InputError, MissingFileError
from hf_semalign.files import ADAPTER, RECORD_NAME, check_header, file_digest, read_json
from hf_semalign.method.pairing import LayerPairing

RESULTS_NAME = "results.json"


class Written(TypedDict):
    """Facts about answers of the align split that a model wrote."""

    by: Literal["source", "target"]
    temperature: float
    max_new_tokens: int
    rows: int
    cut: int
    empty: int
    unusable: int


class Split(TypedDict):
    """A split of the data. The optional keys after ``answers`` are there if the source reads rows of its own."""

    rows: int
    fingerprint: str
    answers: NotRequired[Written]
    source_fingerprint: NotRequired[str]
    source_prompts: NotRequired[int]
    aligned: NotRequired[float]


class Map(TypedDict):
    """The semantic map."""

    shape: list[int]
    shared_tokens: int
    condition_number: float
    scales: list[float]


class Settings(TypedDict):
    """The settings that this package reads."""

    layer_loss: Literal["relation", "steering", "fisher"]
    output_loss: Literal["kl", "cosine", "answers"]
    relation_weight: float
    kl_weight: float
    frontier: Literal["single", "cumulative", "joint"]
    scale: str
    max_steps: int
    seed: int


class Tokenizers(TypedDict):
    """Facts about two tokenizers: the number of token classes, and the share of aligned answer tokens by split."""

    classes: int
    aligned: dict[str, float]


class Versions(TypedDict):
    """Versions of packages."""

    hf_semalign: str


class RecordFile(TypedDict):
    """The keys of ``semalign.json`` that this package reads."""

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
    """The keys of PEFT's configuration that this package reads."""

    peft_type: str
    task_type: str | None
    base_model_name_or_path: str | None
    r: int
    lora_alpha: float
    rank_pattern: NotRequired[dict[str, int]]


class Score(TypedDict):
    """A model's score on a benchmark, by lm-eval."""

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


class BenchmarksFile(TypedDict):
    """The keys of ``benchmarks.json`` that this package reads."""

    model: str
    target: str | None
    adapter_checksum: str | None
    benchmarks: list[Score]


class ModelNames(TypedDict):
    """Names of the models."""

    source: str
    target: str


class MethodRow(TypedDict):
    """A method in a table of a comparison. Its metrics have various names."""

    name: str


class TaskTable(TypedDict):
    """A task under a budget."""

    task: str
    budget: str
    target: dict[str, Any]
    source: dict[str, Any]
    methods: list[MethodRow]
    left_out: NotRequired[list[str]]


class ReportedScores(TypedDict):
    """Scores that others reported."""

    origin: str
    rows: dict[str, dict[str, float]]


class ComparisonFile(TypedDict):
    """The keys of ``compare.json`` that this package reads."""

    pair: ModelNames
    reference: str
    tables: list[TaskTable]
    reported: ReportedScores | None


class Forgetting(TypedDict):
    """Results on a task that was not transferred."""

    kl: float
    loss: float
    accuracy: float
    exact_match: NotRequired[dict[str, float]]


class Metrics(TypedDict, total=False):
    """The metrics of one model."""

    kl: float
    loss: float
    exact_match: dict[str, float]
    benchmarks: list[Score]
    forgetting: dict[str, Forgetting]


class ResultsFile(TypedDict):
    """The keys of ``results.json`` that this package reads."""

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
    """Read a run folder's ``semalign.json``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        if any(folder.glob(f"checkpoint-*/{RECORD_NAME}")):
            raise MissingFileError(f"{folder} has no {RECORD_NAME} yet: re-run its command to finish the run.")
        raise MissingFileError(f"{folder} has no {RECORD_NAME}: it is not a run folder of hf_semalign.")
    record = read_json(path, RecordFile)
    LayerPairing.from_dict(record["pairing"], f"the pairing of {path}")
    return record


def read_results(folder: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """Read a run folder's ``results.json``. Returns ``None`` if there is none.

    Raises:
        ValueError: the file is damaged, or is from another adapter than the record.
    """
    path = folder / RESULTS_NAME
    if not path.is_file():
        return None
    results = read_json(path, ResultsFile)
    checksum = record["adapter_checksum"]
    if record["method"] not in results["metrics"] or results.get("adapter_checksum", checksum) != checksum:
        raise InputError(f"{path} is from another adapter than {RECORD_NAME}: delete it, or run the recipe again.")
    return results


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read PEFT's configuration of an adapter.

    Raises:
        ValueError: the file is damaged.
    """
    return read_json(folder / ADAPTER[1], AdapterConfig)


def check_adapter(folder: Path) -> None:
    """Check that a folder has an undamaged adapter in safetensors. Only the header of the weights is read.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    if missing := [name for name in ADAPTER if not (folder / name).is_file()]:
        raise MissingFileError(f"{folder} lacks {missing}: expected a folder with {' and '.join(ADAPTER)}.")
    check_header(folder / ADAPTER[0])
    read_adapter_config(folder)


def check_recorded(folder: Path, record: dict[str, Any]) -> None:
    """Check that the adapter matches the record of its folder.

    Raises:
        ValueError: the checksums differ, or the folder is a checkpoint of Seeking, which needs the modified target.
    """
    if file_digest(folder / ADAPTER[0]) != record["adapter_checksum"]:
        raise InputError(f"{ADAPTER[0]} of {folder} does not match {RECORD_NAME}: copy or download both again.")
    rank = record.get("seeking", {}).get("adapter_rank")
    if rank is not None and read_adapter_config(folder)["r"] != rank:
        raise InputError(
            f"{folder} is a checkpoint of Seeking, which only its run can use: pass the folder of the finished run."
        )

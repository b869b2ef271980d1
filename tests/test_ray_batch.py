"""run_batch on a local Ray: what it reads, what it refuses before a model is loaded, and one job after another."""

import pyarrow as pa
import pytest
import ray
from ray_cluster import OBJECT_STORE, WORKER
from server_process import tiny_model

from jaxpaged import RequestError
from jaxpaged.ray import Report, run_batch
from jaxpaged.ray.batch import open_source

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray Data warns of what it does itself
]
TINY = {"load_format": "dummy", "enforce_eager": True, "max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 64}
PARAMS = {"max_tokens": 3, "temperature": 0.0, "ignore_eos": True}
NO_MODEL = {"model": "/nowhere"}  # whoever loads it fails otherwise than these tests expect


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init(num_cpus=2, object_store_memory=OBJECT_STORE, include_dashboard=False, logging_level="warning",
             log_to_driver=False, runtime_env={"env_vars": WORKER})  # fmt: skip
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_job_reads_what_another_one_wrote(tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a fox"}\n{"prompt": "a dog"}\n')
    config = {"model": str(tiny_model(tmp_path)), **TINY}
    monkeypatch.chdir(tmp_path)
    assert run_batch("in.jsonl", "first", config, PARAMS, num_cpus=1) == Report(2, 0, 0)
    answers = ray.data.read_parquet(str(tmp_path / "first"))
    texts = answers.select_columns(["row_number", "generated_text"]).rename_columns({"generated_text": "prompt"})
    assert run_batch(texts, "second", config, PARAMS, id="row_number", num_cpus=1) == Report(2, 0, 0)
    rows = sorted(ray.data.read_parquet(str(tmp_path / "second")).take_all(), key=lambda row: row["row_number"])
    before = sorted(answers.take_all(), key=lambda row: row["row_number"])
    assert [row["prompt"] for row in rows] == [row["generated_text"] for row in before]


def test_a_relative_path_is_of_the_callers_folder(tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("a fox\n")
    monkeypatch.chdir(tmp_path)  # Ray's workers stay where it was started
    assert open_source("in.txt").take_all() == open_source(["in.txt"]).take_all() == [{"prompt": "a fox"}]


def test_columns_that_would_be_added_are_refused_before_a_model_is_loaded(tmp_path):
    rows = ray.data.from_items([{"prompt": "a fox", "row_number": 7, "generated_text": "a dog", "error": ""}])
    with pytest.raises(RequestError, match="have a column 'row_number' already; tell them apart by it"):
        run_batch(rows, tmp_path / "out", NO_MODEL)
    for columns, id in ((["prompt", "generated_text", "error"], None), (rows.columns(), "row_number")):
        with pytest.raises(RequestError, match="have generated_text, error already, .*; drop or rename these first"):
            run_batch(rows.select_columns(columns), tmp_path / "out", NO_MODEL, id=id)


@pytest.mark.parametrize("ids", [[1.0, float("nan")], [1, None], [1, 1], [[1], [2]], [{"a": 1}, {"a": 2}]],
                         ids=["nan", "none", "same", "lists", "objects"])  # fmt: skip
def test_ids_that_tell_no_rows_apart_are_refused(tmp_path, ids):
    rows = ray.data.from_arrow(pa.table({"prompt": ["a fox", "a dog"], "key": ids}))
    with pytest.raises(RequestError, match="the column 'key' must tell rows apart"):
        run_batch(rows, tmp_path / "out", NO_MODEL, id="key")


@pytest.mark.parametrize("id", [None, "key"])
@pytest.mark.parametrize("name, text", [("x.jsonl", ""), ("x.txt", ""), ("x.csv", "key,prompt\n")])
def test_a_source_without_rows_is_done_at_once(tmp_path, name, text, id):
    (tmp_path / name).write_text(text)
    assert run_batch(tmp_path / name, tmp_path / "out", NO_MODEL, id=id) == Report(0, 0, 0)


def test_a_column_that_is_missing_is_named(tmp_path):
    rows = ray.data.from_items([{"text": "a fox"}])
    with pytest.raises(RequestError, match="there is no column 'prompt'; the rows have text"):
        run_batch(rows, tmp_path / "out", NO_MODEL)
    with pytest.raises(RequestError, match="there is no column 'key'; the rows have text"):
        run_batch(rows, tmp_path / "out", NO_MODEL, id="key")

"""The load generator against a small server: what is sent, when, what is measured and what is told."""

import asyncio
import json
import math
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import tiny_tokenizers as tiny
from fake_openai import MODEL, run_cli

from jaxpaged import bench_datasets, bench_report, bench_serve
from jaxpaged.bench_options import DatasetOptions, ReportOptions, TargetOptions, TrafficOptions
from jaxpaged.bench_report import Record
from jaxpaged.request import RequestError


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Status, standard output, standard error of `jaxpaged bench serve arguments`."""
    return run_cli(monkeypatch, capsys, "bench", "serve", "--disable-tqdm", *arguments)


SMALL = ("--num-prompts", "6", "--random-input-len", "8", "--random-output-len", "4")


def rows(table: str) -> dict[str, str]:
    return {label.strip(): value.strip() for label, _, value in (line.rpartition(":") for line in table.splitlines()) if label}


# -- the whole command -------------------------------------------------------------------------------------------------


def test_the_table_and_the_file_say_what_the_server_did(fake, url, monkeypatch, capsys, tmp_path):
    fake.delay = 0.02
    status, out, err = call(monkeypatch, capsys, "--base-url", url, *SMALL, "--save-result", "--result-dir", str(tmp_path),
                            "--max-concurrency", "3", "--metadata", "gpu=none", "--metric-percentiles", "50,99")  # fmt: skip
    assert status == 0 and "Traceback" not in err
    shown = rows(out)
    assert shown["Successful requests"] == "6" and shown["Failed requests"] == "0"
    assert shown["Maximum request concurrency"] == "3" and shown["Peak concurrent requests"] == "3"
    assert shown["Total input tokens"] == "48" and shown["Total generated tokens"] == "24"
    assert "Request goodput (req/s)" not in shown
    assert fake.most_at_once == 3 and len(fake.bodies) == 7, "one request tests the server"
    (file,) = tmp_path.glob("openai-infqps-concurrency3-model-1-*.json")
    saved = json.loads(file.read_text())
    assert saved["model_id"] == MODEL and saved["gpu"] == "none" and saved["request_rate"] == "inf"
    assert saved["output_throughput"] == pytest.approx(24 / saved["duration"])
    assert saved["total_token_throughput"] == pytest.approx(72 / saved["duration"])
    assert min(saved[f"{name}_ms"] for name in ("median_itl", "p50_tpot", "mean_ttft")) >= 19, "20 ms a word"
    assert saved["mean_ttft_ms"] + 3 * saved["mean_tpot_ms"] <= saved["mean_e2el_ms"] <= saved["duration"] * 1000 / 2
    for name in ("ttft", "tpot", "itl", "e2el"):
        for statistic in ("mean", "median", "std", "p50", "p99"):
            assert f"{statistic}_{name}_ms" in saved
            if statistic != "std":
                label = f"{statistic.capitalize()} {name.upper()} (ms)"
                assert float(shown[label]) == pytest.approx(saved[f"{statistic}_{name}_ms"], abs=0.006)
    assert "ttfts" not in saved


def test_what_is_sent(fake, url, monkeypatch, capsys):
    status, _, _ = call(monkeypatch, capsys, "--base-url", url, *SMALL, "--temperature", "0.5", "--api-key", "sesame",
                        "--header", "X-Trace=a=b", "--extra-body", '{"top_p": 0.9}', "--vocab-size", "100")  # fmt: skip
    assert status == 0
    for body, headers in zip(fake.bodies, fake.headers):
        assert body["model"] == MODEL and body["stream"] and body["max_tokens"] == 4
        assert body["temperature"] == 0.5 and body["top_p"] == 0.9 and body["ignore_eos"] is True
        assert len(body["prompt"]) == 8 and all(10 <= token < 100 for token in body["prompt"])
        assert headers["authorization"] == "Bearer sesame" and headers["x-trace"] == "a=b"
    assert len({tuple(body["prompt"]) for body in fake.bodies}) == 7, "no two prompts are alike"


def test_the_server_decides_what_is_not_given(fake, url, monkeypatch, capsys):
    call(monkeypatch, capsys, "--base-url", url, *SMALL, "--no-ignore-eos", "--model", "other")
    assert set(fake.bodies[0]) == {"model", "stream", "stream_options", "prompt", "max_tokens"}
    assert fake.bodies[0]["model"] == "other" and "authorization" not in fake.headers[0]


def test_a_chat_counts_reasoning_and_no_empty_chunks(fake, url, monkeypatch, capsys, tmp_path):
    fake.reasoning, fake.words = ["Hm", "m"], [" yes", " no"]
    turns = [{"value": f"What about number {i}, then? Tell me."} for i in range(9)]
    (tmp_path / "s.json").write_text(json.dumps([{"conversations": [turn, {"value": "a" * 80}]} for turn in turns]))
    status, out, _ = call(monkeypatch, capsys, "--base-url", url, "--backend", "openai-chat", "--num-prompts", "5",
                          "--dataset-name", "sharegpt", "--dataset-path", str(tmp_path / "s.json"), "--save-detailed",
                          "--result-dir", str(tmp_path), "--result-filename", "r.json")  # fmt: skip
    assert status == 0 and rows(out)["Total input tokens"] == "35", "words of the prompts, as the server counts"
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["generated_texts"] == ["Hmm yes no"] * 5
    assert [len(gaps) for gaps in saved["itls"]] == [3] * 5, "four chunks have text"
    assert len(saved["ttfts"]) == len(saved["start_times"]) == 5 and saved["errors"] == [""] * 5
    body = fake.bodies[-1]
    assert body["max_completion_tokens"] == 20, "80 characters"
    assert body["messages"][0]["content"] in [turn["value"] for turn in turns] and "ignore_eos" not in body


def test_failures_are_counted_and_the_run_goes_on(fake, url, monkeypatch, capsys):
    seen = iter(range(99))
    fake.refuse = lambda body: (429, "too many of you") if next(seen) in (2, 3) else None
    status, out, err = call(monkeypatch, capsys, "--base-url", url, *SMALL, "--max-concurrency", "1")
    shown = rows(out)
    assert status == 0 and shown["Successful requests"] == "4" and shown["Failed requests"] == "2"
    assert shown["Total generated tokens"] == "16"
    assert "2 requests failed; the first error: HTTP 429: too many of you" in err


@pytest.mark.parametrize("how, message", [("break_off_after", "the engine fell over"), ("cut_after", "ended before [DONE]")])
def test_a_stream_that_breaks_is_a_failure(fake, url, monkeypatch, capsys, tmp_path, how, message):
    seen = iter(range(99))

    def breaks_once(body):
        setattr(fake, how, 2 if next(seen) == 3 else None)

    fake.refuse = breaks_once
    _, out, err = call(
        monkeypatch, capsys, "--base-url", url, *SMALL, "--max-concurrency", "1", "--plot", str(tmp_path / "p.png")
    )
    assert rows(out)["Failed requests"] == "1" and message in err
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_goodput(fake, url, monkeypatch, capsys):
    seen = iter(range(99))

    def slow_at_first(body):
        time.sleep(0.6 if next(seen) in (1, 2) else 0)  # holds the server up: the test request is number 0

    fake.refuse = slow_at_first
    _, out, _ = call(
        monkeypatch, capsys, "--base-url", url, *SMALL, "--max-concurrency", "1", "--goodput", "ttft:500 e2el:10000"
    )
    shown = rows(out)
    assert float(shown["Request goodput (req/s)"]) == pytest.approx(
        float(shown["Request throughput (req/s)"]) * 4 / 6, rel=0.02
    )


def test_without_usage_chunks_are_counted_and_it_is_said(fake, url, monkeypatch, capsys):
    fake.with_usage = False
    _, out, err = call(monkeypatch, capsys, "--base-url", url, *SMALL)
    assert rows(out)["Total generated tokens"] == "24" and rows(out)["Total input tokens"] == "0"
    assert "sends no usage" in err


@pytest.mark.parametrize("traffic", [("--max-concurrency", "2"), ("--request-rate", "40")], ids=" ".join)
def test_ctrl_c_prints_the_table_of_what_finished(fake, url, monkeypatch, capsys, traffic):
    fake.delay = 0.03

    def press():
        while fake.finished < 12:  # the client may know of fewer
            time.sleep(0.005)
        fake.delay = 30  # from here on, none ends by itself
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    status, out, err = call(monkeypatch, capsys, "--base-url", url, *SMALL[2:], "--num-prompts", "500", *traffic)
    finished = int(rows(out)["Successful requests"])
    assert status == 130 and 0 < finished < len(fake.bodies) and f"{finished} of 500 requests had ended" in err
    deadline = time.monotonic() + 5
    while fake.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fake.running == 0 and fake.unfinished >= 1, "the streams that were under way are closed"


def test_waits_until_the_server_is_ready(fake, url, monkeypatch, capsys):
    monkeypatch.setattr(bench_serve, "POLL_SECONDS", 0.01)
    fake.not_ready = 3
    status, _, err = call(monkeypatch, capsys, "--base-url", url, *SMALL)
    assert status == 2 and "503" in err and not fake.bodies
    status, _, _ = call(monkeypatch, capsys, "--base-url", url, *SMALL, "--ready-check-timeout-sec", "20")
    assert status == 0 and fake.not_ready == 0


def test_warm_up_requests_do_not_count(fake, url, monkeypatch, capsys):
    _, out, _ = call(monkeypatch, capsys, "--base-url", url, *SMALL, "--num-warmups", "4")
    assert len(fake.bodies) == 11 and rows(out)["Successful requests"] == "6"
    assert len({tuple(body["prompt"]) for body in fake.bodies}) == 7, "they repeat the test request's prompt"


# -- mistakes ----------------------------------------------------------------------------------------------------------

MISTAKES = [
    (["--base-url", "http://127.0.0.1:9"], 1, "no answer from http://127.0.0.1:9/v1"),
    (["--base-url", "localhost:8000"], 2, "no URL of a server"),
    (["--backend", "tgi"], 2, "--backend must be openai, vllm, openai-chat, got 'tgi'"),
    (["--dataset-name", "hf"], 2, "--dataset-name must be random, sharegpt, prefix_repetition, got 'hf'"),
    (["--dataset-name", "sharegpt"], 2, "needs --dataset-path"),
    (["--num-prompts", "0"], 2, "--num-prompts must be at least 1, got 0"),
    (["--request-rate", "0"], 2, "--request-rate must be more than 0"),
    (["--random-range-ratio", "1"], 2, "--random-range-ratio must be in [0, 1)"),
    (["--goodput", "itl:3"], 2, "--goodput takes METRIC:MILLISECONDS"),
    (["--metric-percentiles", "99,101"], 2, "--metric-percentiles takes numbers in [0, 100]"),
    (["--percentile-metrics", "ttfb"], 2, "--percentile-metrics takes ttft, tpot, itl, e2el, got 'ttfb'"),
    (["--extra-body", "[1]"], 2, "--extra-body must be a JSON object"),
    (["--header", "X"], 2, "--header takes KEY=VALUE, got 'X'"),
    (["--backend", "openai-chat"], 2, "a chat takes text"),
]


@pytest.mark.parametrize("arguments, status, message", MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_mistakes_are_said(fake, url, monkeypatch, capsys, arguments, status, message):
    found, out, err = call(monkeypatch, capsys, "--base-url", url, *arguments)
    assert found == status and out == "" and message in err and "Traceback" not in err
    assert not fake.bodies, "nothing was sent"


def test_a_server_that_refuses_the_test_request_ends_the_run(fake, url, monkeypatch, capsys):
    fake.refuse = lambda body: (404, "The model `x` does not exist.")
    status, out, err = call(monkeypatch, capsys, "--base-url", url, *SMALL, "--model", "x")
    assert status == 1 and out == "" and "HTTP 404: The model `x` does not exist." in err and len(fake.bodies) == 1


def test_without_aiohttp_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    status, _, err = call(monkeypatch, capsys)
    assert status == 1 and 'pip install "jaxpaged[bench]"' in err


# -- data --------------------------------------------------------------------------------------------------------------


def test_random_lengths_are_spread_and_the_prefix_is_shared():
    options = DatasetOptions(random_input_len=100, random_output_len=10, random_range_ratio=0.5, random_prefix_len=7)
    samples = bench_datasets.load(options, 200, as_text=False)
    inputs, outputs = [len(s.prompt) - 7 for s in samples], [s.output_len for s in samples]
    assert min(inputs) >= 50 and max(inputs) <= 150 and len(set(inputs)) > 50
    assert set(outputs) == set(range(5, 16))
    assert len({tuple(s.prompt[:7]) for s in samples}) == 1 and len({tuple(s.prompt[7:20]) for s in samples}) == 200
    assert samples == bench_datasets.load(options, 200, as_text=False)
    assert samples != bench_datasets.load(DatasetOptions(seed=1, random_range_ratio=0.5), 200, as_text=False)


def test_prefixes_are_shared_out():
    options = DatasetOptions("prefix_repetition", prefix_repetition_prefix_len=5, prefix_repetition_suffix_len=3,
                             prefix_repetition_num_prefixes=4, prefix_repetition_output_len=9)  # fmt: skip
    samples = bench_datasets.load(options, 40, as_text=False)
    prefixes = [tuple(s.prompt[:5]) for s in samples]
    assert sorted(prefixes.count(p) for p in set(prefixes)) == [10] * 4 and prefixes != sorted(prefixes)
    assert all(len(s.prompt) == 8 and s.output_len == 9 for s in samples)
    assert len({tuple(s.prompt[5:]) for s in samples}) == 40


@pytest.fixture
def tokenizer_folder(tmp_path):
    tiny.byte_level(400).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_tokenizer_makes_text_and_counts_it(tokenizer_folder):
    random = DatasetOptions(tokenizer=str(tokenizer_folder), vocab_size=300, random_input_len=20)
    assert all(isinstance(s.prompt, str) and s.prompt for s in bench_datasets.load(random, 5, as_text=True))
    path = tokenizer_folder / "s.json"
    turns = [[{"value": "ab " * 40}, {"value": "xyz" * 9}], [{"value": "hi"}, {"value": "too short a question"}],
             [{"value": "q" * 9000}, {"value": "too long a question"}], [{"value": "nobody answered this"}]]  # fmt: skip
    path.write_text(json.dumps([{"conversations": turn} for turn in turns]))
    sharegpt = DatasetOptions("sharegpt", path, tokenizer=str(tokenizer_folder))
    (sample,) = bench_datasets.load(sharegpt, 1, as_text=True)
    assert sample == ("ab " * 40, 27), "none of its bytes are merged"
    with pytest.raises(RequestError, match="has 1 conversations of a fitting length, 2 are needed"):
        bench_datasets.load(sharegpt, 2, as_text=True)
    assert bench_datasets.load(DatasetOptions("sharegpt", path, sharegpt_output_len=3), 1, True)[0].output_len == 3


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1]", '[{"conversations": [{"from": "x"}, {}]}]'])
def test_a_file_that_is_not_sharegpt(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(RequestError, match="cannot be read as ShareGPT"):
        bench_datasets.load(DatasetOptions("sharegpt", tmp_path / "s.json"), 1, True)


# -- traffic and figures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_keep_the_rate_and_have_the_burstiness(burstiness):
    times = bench_serve.arrival_times(4000, 50.0, burstiness, np.random.default_rng(0))
    assert times[-1] == pytest.approx(4000 / 50.0) and np.all(np.diff(times) >= 0)
    gaps = np.diff(times)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.1), "of a gamma distribution"
    assert not bench_serve.arrival_times(5, math.inf, 1.0, np.random.default_rng(0)).any()


def test_requests_are_sent_at_their_times():
    times = bench_serve.arrival_times(30, 100.0, 1.0, np.random.default_rng(0))
    sent = []

    async def send(body: bytes) -> Record:
        sent.append((body, time.perf_counter()))
        return Record(0.0)

    start = time.perf_counter()
    done = asyncio.run(bench_serve.generate_load(send, [b"%d" % i for i in range(30)], times, None))
    late = [at - start - planned for (_, at), planned in zip(sent, times)]
    assert min(late) > -0.001 and np.median(late) < 0.2 and done.seconds >= 0.3
    assert [int(body) for body, _ in sent] == list(range(30)) and len(done.records) == 30


def test_figures_by_hand():
    records = [
        Record(10.0, 5, 4, [10.5, 10.6, 10.8], 11.2, "abcd"),  # two tokens came in one chunk
        Record(10.2, 7, 1, [11.4], 11.5, "x"),  # no token after the first
        Record(11.0, end=11.1, error="HTTP 500: no"),
        Record(11.2, 3, 6, [11.3, 11.7, 12.9], 13.0, "xyz"),
    ]
    result = bench_report.summarize(records, 4.0, {"ttft": 600.0, "e2el": 1500.0}, [25.0, 99.9])
    assert (result["completed"], result["failed"]) == (3, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (15, 11)
    assert result["request_throughput"] == 0.75 and result["output_throughput"] == 2.75
    assert result["total_token_throughput"] == 6.5 and result["request_goodput"] == 0.25
    assert result["mean_ttft_ms"] == pytest.approx((500 + 1200 + 100) / 3) and result["median_ttft_ms"] == pytest.approx(500)
    assert result["mean_tpot_ms"] == pytest.approx((300 / 3 + 1600 / 5) / 2)
    assert result["median_itl_ms"] == pytest.approx(300) and result["mean_itl_ms"] == pytest.approx(
        (100 + 200 + 400 + 1200) / 4
    )
    assert result["mean_e2el_ms"] == pytest.approx((1200 + 1300 + 1800) / 3)
    assert result["p25_ttft_ms"] == pytest.approx(300) and result["p99.9_e2el_ms"] == pytest.approx(1799)
    assert result["max_output_tokens_per_s"] == pytest.approx(1 + 2 + 2), "from 11.0 to 12.0"
    assert result["max_concurrent_requests"] == 2, "one ends at 11.2, when another starts"


def test_figures_of_nothing_are_zero():
    result = bench_report.summarize([Record(0.0, error="x")], 1.0, {}, [99.0])
    assert result["completed"] == 0 and result["p99_ttft_ms"] == 0.0 and result["max_concurrent_requests"] == 0
    assert result["request_goodput"] is None and json.dumps(result, allow_nan=False)


def test_a_run_in_which_all_failed_says_so(fake, url):
    seen = iter(range(99))
    fake.refuse = lambda body: (500, "it burns") if next(seen) else None
    with pytest.raises(RuntimeError, match="no request succeeded; the first error: HTTP 500: it burns"):
        bench_serve.run(
            TargetOptions(base_url=url), DatasetOptions(num_prompts=3), TrafficOptions(disable_tqdm=True), ReportOptions()
        )

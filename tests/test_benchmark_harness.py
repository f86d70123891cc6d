"""The kernel benchmark: arguments, record, report, comparison, and that a wrong kernel has no time."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import counters, families, kernels
from benchmarks.compare import read_record, slower
from benchmarks.families import Run, group_quant
from benchmarks.report import render

KEYS = {"op", "case", "m", "n", "k", "dtype", "layout", "impl"}
TIMED_KEYS = {"us", "us_spread", "gbs", "share_of_ceiling", "best_peer", "ratio_to_best_peer", "correct"}
KINDS = ("token", "tensor")
ARGUMENTS = ["group_quant", "--device", "cpu", "--only", "1x7168-g128", "--limit", "1"]


@pytest.fixture(autouse=True)
def device():
    before = families.device
    yield
    families.device = before


def test_record_and_report(tmp_path: Path) -> None:
    out, report = tmp_path / "out.jsonl", tmp_path / "out.html"
    assert kernels.main([*ARGUMENTS, "--out", str(out), "--report", str(report)]) == 0
    env, rows = read_record(out)
    assert {"torch", "commit", "command", "copy_gbs"} <= set(env)
    assert all(set(row) >= KEYS for row in rows)
    ours = [row for row in rows if row["impl"] == "ours"]
    assert ours
    assert all(set(row) >= TIMED_KEYS and row["correct"] and row["us"] > 0 for row in ours)
    assert all("missing" in row for row in rows if not row["impl"].startswith("ours")), (
        "peers are listed as missing on a CPU"
    )
    page = report.read_text()
    assert page.startswith("<!doctype html>")
    assert "http" not in page.replace("http-equiv", ""), "self-contained"
    assert "missing" in page


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the report with")
def test_the_report_opens_in_a_browser(tmp_path: Path) -> None:
    row = {"op": "an_op", "n": None, "k": 128, "dtype": "e4m3", "layout": "row", "correct": True, "l2": "hot"}
    timed = {"us_spread": 0.1, "gbs": 1.0, "share_of_ceiling": 0.5, "ratio_to_best_peer": 1.5}
    rows = [
        {**row, **timed, "case": str(m), "m": m, "impl": impl, "us": m * 1.5, "best_peer": "ours"}
        for m in (1, 16)
        for impl in ("ours", "a<peer>")
    ]
    page = tmp_path / "report.html"
    page.write_text(render([({"gpu": "a GPU"}, rows)]))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert dom.count("<svg") == 3
    assert dom.count("<polyline") == 6
    assert "a&lt;peer&gt;" in dom


def test_a_wrong_kernel_is_void(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    def wrong(case, seed):
        run = group_quant.ours(case, seed)
        q, _ = run.outputs
        return dataclasses.replace(run, call=lambda: (run.call(), q.view(torch.uint8)[:, 128:256].fill_(0x7F)))

    monkeypatch.setitem(group_quant.IMPLEMENTATIONS, "wrong", wrong)
    assert kernels.main([*ARGUMENTS, "--out", str(tmp_path / "out")]) == 1
    row = next(row for row in read_record(tmp_path / "out")[1] if row["impl"] == "wrong")
    assert row["correct"] is False
    assert "us" not in row
    assert "\033[31mWRONG" in capsys.readouterr().out
    assert "WRONG, not timed" in render([({}, [row])])


def test_an_output_left_unwritten_is_void(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lazy(case, seed):
        return Run(lambda: None, group_quant.ours(case, seed).outputs)

    monkeypatch.setitem(group_quant.IMPLEMENTATIONS, "lazy", lazy)
    assert kernels.main([*ARGUMENTS, "--out", str(tmp_path / "out")]) == 1


def test_compare_names_what_got_slower(tmp_path: Path, capsys) -> None:
    old = tmp_path / "old.jsonl"
    assert kernels.main([*ARGUMENTS, "--out", str(old)]) == 0
    env, rows = read_record(old)
    for row in rows:
        if "us" in row:
            row["us"], row["us_spread"] = row["us"] / 1000, 0.0
    old.write_text("\n".join(map(json.dumps, [{"env": env}, *rows])))
    assert kernels.main([*ARGUMENTS, "--compare", str(old)]) == 1
    assert "slower: group_quant 1x7168-g128" in capsys.readouterr().out
    row = {"op": "a", "case": "b", "impl": "c", "us": 1.0, "us_spread": 0.1}
    assert not slower([row], [{**row, "us": 1.2}])
    assert slower([row], [{**row, "us": 1.21}])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gruop_quant"], "unknown op gruop_quant; known: group_quant"),
        (["--peers", "cublas9"], "unknown peer cublas9; known: "),
        (
            ["--device", "cpu", "--only", "no such case"],
            "no case contains 'no such case'; known:\n  group_quant 1x7168",
        ),
        (["--device", "cpu", "--compare", "no/such/file"], "--compare: "),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        kernels.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys) -> None:
    assert kernels.main(["group_quant"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_a_record_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=r'takes \{"env": ...\} on the first line, got keys'):
        read_record(path)


def test_cases_are_chosen_by_name_and_tokens() -> None:
    names = [str(case) for _, case in kernels.chosen_cases(["silu_quant"], ["x768-row", "x2048-per"], [1, 8192])]
    assert names == ["1x768-row", "8192x768-row", *(f"{m}x2048-per_{kind}" for m in (1, 8192) for kind in KINDS)]


NCU_OUTPUT = """==PROF== Connected to process 7
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","void ns::<unnamed>::quant_kernel<float>(ns::Params)","dram__bytes_read.sum","byte","33,554,432"
"0","void ns::<unnamed>::quant_kernel<float>(ns::Params)","gpu__time_duration.sum","ns","12000"
"1","norm_kernel(Params)","gpu__time_duration.sum","ns","900.5"
"""


def test_counters_of_each_launch() -> None:
    assert list(counters.parse(NCU_OUTPUT)) == [
        {"kernel": "quant_kernel", "dram_bytes_read": 33554432.0, "ncu_ns": 12000.0},
        {"kernel": "norm_kernel", "ncu_ns": 900.5},
    ]

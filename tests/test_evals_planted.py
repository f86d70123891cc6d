"""evals.gsm8k and evals.parity both find kernels of ours that are broken on purpose, on the small model."""

import os
import shutil
from pathlib import Path

import pytest

from evals import gsm8k, parity, processes
from evals.all_formats import CHECKPOINTS
from evals.small_math import generate

pytestmark = [pytest.mark.serve]

QUESTIONS = 60
PLANTED = Path(__file__).parent / "planted"
FAULTS = ("scales of two groups swapped", "last column of every MMA tile dropped", "two experts swapped")
# One column of the whole output changes no answer of this model: only parity sees it.
CASES = [
    *((program, fault) for program in (gsm8k, parity) for fault in (None, *FAULTS)),
    (parity, "last column dropped"),
]
# What stock vLLM serves on a CPU has another arithmetic, so the baseline is the plugin without a feature for GPUs.
MODEL = (str(CHECKPOINTS / "fp8_block"), "--baseline", "group_quant_ops")
ENGINE = ("--", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "64")


@pytest.fixture(scope="module")
def check(tmp_path_factory, preloaded):
    """check(program, fault): its exit code, with that fault on the plugin's side; None: none."""
    folder = tmp_path_factory.mktemp("planted")
    generate.write(folder / "data", seed=0, train=20, test=QUESTIONS, new_templates=1)
    programs = {
        gsm8k: ("--data", folder / "data", "--fewshot", 0),
        parity: ("--num-texts", 8, "--tokens", 64),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("VLLM_B200_")]:
            patch.delenv(name)

        class Faulty(preloaded):
            fault: str | None = None

            def __init__(self, task):
                if self.fault and task.folder.name == "plugin":
                    planted = {"PLANTED_FAULT": self.fault, "EXTRA_PATH": str(PLANTED)}
                    task = processes.Task(task.script, task.request, task.folder, {**task.env, **planted}, task.label)
                super().__init__(task)

        patch.setattr(processes, "Worker", Faulty)

        def run(program, fault: str | None) -> int:
            out = folder / program.__name__
            for side in out.rglob("plugin"):
                shutil.rmtree(side)
            Faulty.fault = fault
            return program.main([*map(str, (*MODEL, *programs[program], "--out", out)), *ENGINE])

        yield run


@pytest.mark.parametrize("program, fault", CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_planted_fault(check, program, fault, capsys):
    code = check(program, fault)
    output = capsys.readouterr()
    print(output.out, output.err)
    assert code == (1 if fault else 0), output.err
    expected = {gsm8k: ("not worse", "WORSE"), parity: ("same: within", "DIFFERENT")}[program][bool(fault)]
    assert expected in output.out

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pullback.cli import main

MAIN = [sys.executable, "-c", "from pullback.cli import main; main()"]


def test_a_real_process() -> None:
    arguments = [
        "compare",
        "wine",
        "--optimizers",
        "adam:lr=0.01,lbfgs",
        "--steps",
        "5",
        "--seeds",
        "1",
        "--json",
    ]
    done = subprocess.run([*MAIN, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [run["steps"] for run in json.loads(done.stdout)["runs"]] == [5, 5]


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is another thing there")
def test_a_real_ctrl_c(own: str, tmp_path: Path) -> None:
    arguments = ["train", f"{own}:stop=40", "--optimizer", "sgd", "--json", "--out", str(tmp_path / "out")]
    done = subprocess.run([*MAIN, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130, done.stderr
    (run,) = json.loads(done.stdout)["runs"]
    assert (run["failure"], run["steps"]) == ("interrupted", 38)
    assert (tmp_path / "out" / "loss.png").exists()


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_one_sentence(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "pullback.cli.app":
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == f'the command line needs {missing}: pip install "pullback[cli]"\n'


def test_another_missing_module_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pullback.cli.app", None)
    with pytest.raises(ModuleNotFoundError):
        main()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; import pullback.cli.app; "
        "heavy = 'sklearn', 'matplotlib', 'pytorch_optimizer', 'pullback.problems'; "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"

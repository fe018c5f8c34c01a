"""The console command `sharpmask`: what it lists, what it loads, and how its subcommands start."""

import os
import subprocess
import sys
from importlib import import_module

import pytest
from drawing import ROOT
from sharpmask_d2.cli.command import run

import sharpmask_command

# Subcommand -> script in tools/, which runs the same function.
TOOLS = {
    "propose": "compute_proposals",
    "detect": "demo",
    "evaluate": "evaluate_proposals",
    "analyze": "analyze_proposals",
    "train": "train_net",
    "convert-model": "convert_torch7",
    "convert-proposals": "convert_proposals",
    "package-model": "package_model",
}


def module_of(name: str):
    return import_module(f"sharpmask_d2.cli.{name.replace('-', '_')}")


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_neither_torch_nor_detectron2(option):
    program = f"""
import sys, sharpmask_command
try:
    sharpmask_command.main(["{option}"])
except SystemExit as ended:
    assert not ended.code
print(sorted({{"torch", "detectron2", "sharpmask_d2", "numpy"}} & sys.modules.keys()))
"""
    assert run_python(program).splitlines()[-1] == "[]"


def test_help_lists_every_subcommand_with_its_line(capsys):
    with pytest.raises(SystemExit) as ended:
        sharpmask_command.main(["--help"])
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    for name, summary in sharpmask_command.SUBCOMMANDS.items():
        assert any(line.split() == [name, *summary.split()] for line in lines)
        assert module_of(name).__doc__.splitlines()[0] == summary


def test_every_module_of_a_subcommand_is_listed():
    modules = {path.stem for path in (ROOT / "sharpmask_d2" / "cli").glob("*.py")} - {"__init__", "command"}
    assert modules == {name.replace("-", "_") for name in sharpmask_command.SUBCOMMANDS}


@pytest.mark.parametrize("name", TOOLS)
def test_subcommands_explain_their_options(name, capsys):
    with pytest.raises(SystemExit) as ended:
        sharpmask_command.main([name, "--help"])
    assert not ended.value.code
    output = capsys.readouterr().out
    assert output.startswith(f"usage: sharpmask {name} ")
    assert sharpmask_command.SUBCOMMANDS[name] in output
    assert f"    sharpmask {name} " in output


@pytest.mark.parametrize("name", TOOLS)
def test_scripts_in_tools_run_the_function_of_the_subcommand(name):
    found = {}
    exec(compile((ROOT / "tools" / f"{TOOLS[name]}.py").read_text(), TOOLS[name], "exec"), found)
    assert found["main"] is module_of(name).main
    assert found["run"] is run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: SUBCOMMAND"),
        (["propse"], "invalid choice: 'propse'"),
        (["propose", "--output", "o.json"], "one of the arguments --input --annotations is required"),
        (["propose", "--input", "nothing", "--output", "o.json"], "--input: there is no nothing"),
        (["evaluate", "--annotations", "none.json", "--proposals", "none.json"], "none.json"),
    ],
)
def test_mistakes_of_the_user_end_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        sharpmask_command.main(arguments)
    assert ended.value.code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert message in line
    assert not usage or usage[0].startswith("usage: sharpmask")


@pytest.mark.parametrize("arguments", [["segment", "--help"], ["propose", "--input", "a.jpg", "--output", "o.json"]])
def test_a_missing_detectron2_is_answered_with_how_to_install_it(arguments, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        sharpmask_command.main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Detectron2 is not installed" in line
    assert "pip install" in line


STARTS = {
    "sharpmask": "import sharpmask_command\nsharpmask_command.main(['propose', '--help'])",
    "compute_proposals.py": "import runpy\nsys.argv = ['x', '--help']\nrunpy.run_path('tools/compute_proposals.py', run_name='__main__')",
    "demo.py": "import runpy\nsys.argv = ['x', '--help']\nrunpy.run_path('tools/demo.py', run_name='__main__')",
}


@pytest.mark.parametrize("start", STARTS)
def test_threads_that_wait_spin_briefly_unless_the_user_says_how_long(start):
    # An importer that looks at the environment when torch is loaded, and ends the process there.
    program = f"""
import os, sys
os.environ.pop("GOMP_SPINCOUNT", None)
class Importer:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Importer)
{STARTS[start]}
"""
    assert run_python(program) == "1000\n"


def test_the_user_s_spin_count_is_kept(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    sharpmask_command.prepare_environment()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


SPAWNING = """
import multiprocessing, sys
import sharpmask_command

if __name__ == "__main__":
    import sharpmask_d2
    from detectron2.engine import default_argument_parser

    process = multiprocessing.get_context("spawn").Process(target=default_argument_parser)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


def test_processes_that_a_training_spawns_can_import_detectron2(tmp_path):
    """Detectron2's launch starts one for each GPU; without the package, Detectron2 0.6 cannot be imported."""
    (tmp_path / "sharpmask").write_text(SPAWNING)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, tmp_path / "sharpmask"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

"""The file that holds a pipeline's code, and nothing else."""

import ast
import subprocess
import sys

import pytest

from diffussm.one_file import self_contained_code


@pytest.mark.slow
def test_the_one_file_is_complete_and_holds_nothing_idle():
    tree = ast.parse(self_contained_code())
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    origins = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert not [origin for origin in origins if origin.startswith(("diffussm", "."))]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    used |= {str(text).partition(":")[2] for text in texts}  # those named for `later`
    for node in tree.body:
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef)
            and node.name != "DiffuSSMPipeline"
        ):
            assert node.name in used, f"{node.name} is never used"
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F,E9", "-"],
        input=self_contained_code(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout  # no undefined name, no idle import
    names = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    assert (
        len(names) == len(set(names)) and "DiffuSSM" in names and "train" not in names
    )

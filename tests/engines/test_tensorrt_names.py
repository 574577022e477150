"""What is used of TensorRT is in its own Python bindings, which load here without its libraries.

TensorRT itself neither installs nor runs where there is no GPU; TensorRT-RTX does, and differs.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sd_engines.backends import tensorrt
from tiny_onnx import needs

if TYPE_CHECKING:
    from collections.abc import Iterator

needs("tensorrt_bindings")
pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")

FILES = sorted(Path(tensorrt.__file__).parent.glob("tensorrt*.py"))
CLASS_OF = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
    "e": "ParserError",
    "layer": "IAttentionInputLayer",
    "level": "HardwareCompatibilityLevel",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "plan": "ICudaEngine",
    "_plan": "ICudaEngine",
    "runtime": "Runtime",
    "shapes": "IOptimizationProfile",
    "timings": "ITimingCache",
}
"""What variables and attributes of `FILES` hold, by their names."""
OF_TENSORRT_RTX = {
    *("BuilderFlag.REQUIRE_USER_ALLOCATION", "ComputeCapability"),
    *("ComputeCapability.__members__.items",),
    *("CudaGraphStrategy.WHOLE_GRAPH_CAPTURE", "DynamicShapesKernelSpecializationStrategy.EAGER"),
    *("IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability"),
}
"""What that alone is asked for."""
LIBRARY = rb"lib(?:nvinfer|nvinfer_plugin|nvonnxparser)\.so\.\d+"
FUNCTION = (
    rb"(?:create\w+_INTERNAL|get\w*PluginRegistry|getNvOnnxParserVersion|initLibNvInferPlugins)"
)
HAS = """
import functools, json, sys, tensorrt_bindings as module
def has(path):
    try:
        return functools.reduce(getattr, path.split("."), module) is not module
    except AttributeError:
        return False
print(json.dumps([path for path in json.load(sys.stdin) if not has(path)]))
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of libraries like TensorRT's, that do nothing."""
    folder = tmp_path_factory.mktemp("libraries")
    spec = find_spec("tensorrt_bindings")
    assert spec is not None
    assert spec.origin is not None
    (bindings,) = Path(spec.origin).parent.glob("tensorrt*.so")
    words = set(bindings.read_bytes().split(b"\0"))
    functions = sorted(word.decode() for word in words if re.fullmatch(FUNCTION, word))
    (folder / "empty.c").write_text(
        "".join(f"void *{f}(void) {{ return 0; }}\n" for f in functions)
    )
    for library in (word.decode() for word in words if re.fullmatch(LIBRARY, word)):
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", library, "empty.c"]
        subprocess.run(command, check=True, cwd=folder)
    return folder


def missing(paths: set[str], libraries: Path) -> set[str]:
    """Those of ``paths`` that the bindings have not."""
    done = subprocess.run(
        [sys.executable, "-c", HAS],
        input=json.dumps(sorted(paths)),
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"LD_LIBRARY_PATH": str(libraries)},
    )
    return set(json.loads(done.stdout))


def used() -> Iterator[str]:
    """Everything of the package that `FILES` name, as the path of attributes from its module."""
    for file in FILES:
        inner: set[int] = set()
        for node in ast.walk(ast.parse(file.read_text())):  # from the outside in
            if isinstance(node, ast.Attribute) and id(node) not in inner:
                inner.add(id(node.value))
                first, *rest = ast.unparse(node).removeprefix("self.").split(".")
                if rest and first in CLASS_OF:
                    yield f"{CLASS_OF[first]}.{rest[0]}"
                elif rest and first == "module":
                    yield ".".join(rest)


def test_every_name_is_one_of_tensorrts(libraries: Path) -> None:
    paths = set(used())
    assert {"IExecutionContext.execute_async_v3", "HardwareCompatibilityLevel.NONE"} <= paths
    assert missing(paths, libraries) == OF_TENSORRT_RTX


def test_a_name_that_is_none_is_found(libraries: Path) -> None:
    assert missing({"Builder.create_network", "Builder.create_nothing"}, libraries) == {
        "Builder.create_nothing"
    }

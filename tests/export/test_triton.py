"""``sd-export triton``: the repository's files, without the server.

The configurations are read by Triton's own protobuf definition, and the Python model runs against a
stand-in of the server's module that gives each graph to ONNX Runtime as its configuration says.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sd_engines.bundle import engine_entry, engine_file, hash_files, open_bundle
from sd_engines.seal import add_engines
from sd_export.cli import main
from sd_export.triton import write_model_repository
from sd_runtime import Pipeline, Request
from sd_runtime.recipe import recipes_from_text

if TYPE_CHECKING:
    from sd_engines.spec import Precision
    from sd_export import ExportReport

NUMPY = {"TYPE_FP32": "float32", "TYPE_INT64": "int64", "TYPE_BOOL": "bool"}


@pytest.fixture(scope="module")
def repository(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model repository of the shipped checkpoint."""
    path = tmp_path_factory.mktemp("triton") / "models"
    assert main(["triton", str(shapes_bundle), str(path)]) == 0
    return path


def config_of(model: Path) -> Any:
    return text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())


def test_every_graph_is_a_model(repository: Path, shapes_bundle: Path) -> None:
    manifest = open_bundle(shapes_bundle).manifest
    assert sorted(path.name for path in repository.iterdir()) == [
        "stable_diffusion",
        "stable_diffusion_text_encoder",
        "stable_diffusion_unet",
        "stable_diffusion_vae_decoder",
    ]
    for model in repository.glob("stable_diffusion_*"):
        config = json_format.MessageToDict(config_of(model))
        component = model.name.removeprefix("stable_diffusion_")
        entry = manifest.components[component]
        assert config["name"] == model.name
        assert config["backend"] == "onnxruntime"
        assert (model / "1" / config["defaultModelFilename"]).is_file()
        assert "maxBatchSize" not in config, "0: first axes may differ"
        session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
        for kind, specs, arguments in (
            ("input", entry.inputs, session.get_inputs()),
            ("output", entry.outputs, session.get_outputs()),
        ):
            tensors = {tensor["name"]: tensor for tensor in config[kind]}
            assert list(tensors) == [spec.name for spec in specs]
            for spec, argument in zip(specs, arguments, strict=True):
                tensor = tensors[spec.name]
                dims = [int(size) for size in tensor["dims"]]
                assert dims == [-1 if isinstance(size, str) else size for size in spec.shape]
                assert dims == [-1 if isinstance(size, str) else size for size in argument.shape]
                assert NUMPY[tensor["dataType"]] == spec.dtype


def test_plans_are_of_one_gpu(report_of_2022: ExportReport, tmp_path: Path) -> None:
    """The first that make up a whole, none that is lossy; files stand in for plans."""
    path, staging = shutil.copytree(report_of_2022.path, tmp_path / "bundle"), tmp_path / "staging"
    bundle = open_bundle(path)
    listed: list[tuple[str, str, Precision]] = [
        ("sm86", "unet", "fp32"),
        ("sm89", "unet", "fp8"),
        *(("sm89", name, "fp32") for name in bundle.manifest.components),
        ("sm120", "unet", "fp32"),
    ]
    engines = []
    for target, component, precision in listed:
        entry = bundle.manifest.components[component]
        file = engine_file(
            component, entry, "tensorrt", version="11", target=target, precision=precision
        )
        (staging / file).parent.mkdir(parents=True, exist_ok=True)
        (staging / file).write_text(f"{target} {precision}")
        engines.append(
            engine_entry(
                component,
                entry,
                bundle.manifest.profile,
                "tensorrt",
                version="11",
                target=target,
                precision=precision,
                file=file,
                built=hash_files(staging, [file])[file],
                flags={},
            )
        )
    add_engines(path, staging, engines=engines)
    write_model_repository(path, tmp_path / "models", backend="tensorrt")
    plans = list((tmp_path / "models").glob("*/1/model.plan"))
    assert len(plans) > 2
    assert {plan.read_text() for plan in plans} == {"sm89 fp32"}


class StandIn(ModuleType):
    """``triton_python_backend_utils``, as far as a Python model uses it."""

    TRITONSERVER_MEMORY_CPU = 0
    TritonError = str

    def __init__(self, repository: Path) -> None:
        super().__init__("triton_python_backend_utils")
        stand_in, self.calls = self, []
        self.sessions = {
            model.name: onnxruntime.InferenceSession(model / "1" / "model.onnx")
            for model in repository.glob("stable_diffusion_*")
        }
        self.configs = {name: config_of(repository / name) for name in self.sessions}

        class Tensor:
            def __init__(self, name: str, array: np.ndarray) -> None:
                self.name, self.array = name, array

            def as_numpy(self) -> np.ndarray:
                return self.array

        class InferenceResponse:
            def __init__(self, output_tensors: Any = (), error: str | None = None) -> None:
                self.tensors = {tensor.name: tensor for tensor in output_tensors}
                self.message = error

            def has_error(self) -> bool:
                return self.message is not None

        class InferenceRequest:
            def __init__(
                self, *, model_name: str, requested_output_names: Any, inputs: Any, **_: Any
            ) -> None:
                self.model_name, self.names = model_name, requested_output_names
                self.tensors = {tensor.name: tensor for tensor in inputs}

            def exec(self) -> InferenceResponse:
                config = stand_in.configs[self.model_name]
                stand_in.calls.append(self.model_name)
                feeds = {}
                for spec in config.input:
                    array = self.tensors[spec.name].array
                    assert config.max_batch_size == 0
                    assert array.ndim == len(spec.dims), "what Triton would refuse"
                    assert all(
                        wanted in (-1, size)
                        for size, wanted in zip(array.shape, spec.dims, strict=True)
                    )
                    feeds[spec.name] = array
                outputs = stand_in.sessions[self.model_name].run(self.names, feeds)
                return InferenceResponse(map(Tensor, self.names, outputs))

        self.Tensor, self.InferenceResponse = Tensor, InferenceResponse
        self.InferenceRequest, self.PreferredMemory = InferenceRequest, lambda _kind: None

    def get_input_tensor_by_name(self, request: Any, name: str) -> Any:
        return request.tensors.get(name)

    get_output_tensor_by_name = get_input_tensor_by_name

    def ask(self, model: Any, **inputs: Any) -> Any:
        """What a client's request comes to: the response of ``model``."""
        tensors = [self.Tensor(name, np.array([value])) for name, value in inputs.items()]
        request = self.InferenceRequest(model_name="", requested_output_names=(), inputs=tensors)
        (response,) = model.execute([request])
        return response


@pytest.fixture
def server(repository: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The stand-in, where a model imports it from."""
    stand_in = StandIn(repository)
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    return stand_in


def test_the_python_model_draws(
    repository: Path, shapes_bundle: Path, server: StandIn, tmp_path: Path
) -> None:
    folder = shutil.copytree(repository / "stable_diffusion", tmp_path / "stable_diffusion")
    config = config_of(folder)
    manifest = folder / "1" / "bundle.json"
    on_gpu = json.loads(manifest.read_text())
    for engine in on_gpu["engines"]:
        if engine["backend"] == "onnxruntime":
            engine["target"] = "cuda"  # Triton runs the graphs there, and hands tensors over here
    manifest.write_text(json.dumps(on_gpu))
    names: dict[str, Any] = {}
    exec((folder / "1" / "model.py").read_text(), names)  # noqa: S102 - as the server does
    model = names["TritonPythonModel"]()
    model.initialize(
        {
            "model_name": "stable_diffusion",
            "model_repository": str(folder),
            "model_version": "1",
            "model_config": json.dumps(
                json_format.MessageToDict(config, preserving_proto_field_name=True)
            ),
        }
    )
    response = server.ask(
        model, prompt=b"a red circle", seed=np.uint64(7), num_inference_steps=np.int32(3)
    )
    assert not response.has_error()
    with Pipeline.load(shapes_bundle, backend="onnxruntime", threads=1) as pipeline:
        request = Request("a red circle", seed=7, num_inference_steps=3)
        expected = pipeline.generate(request).pixels[0]
    image = response.tensors["image"].as_numpy()
    assert np.abs(image.astype(int) - expected.astype(int)).max() <= 1
    assert list(image.shape) == list(config.output[0].dims)
    recipe = recipes_from_text(response.tensors["recipe"].as_numpy()[0].decode())[0][0]
    assert (recipe.prompt, recipe.seed) == ("a red circle", 7)
    assert server.calls.count("stable_diffusion_unet") == 4, "PNDM's three steps are four rows"
    wrong = server.ask(model, prompt=b"a", scheduler=b"eular")
    assert "Did you mean" in wrong.message
    model.finalize()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["BUNDLE", "there"], 2, "there already"),
        (["BUNDLE", "missing/models"], 2, "mkdir -p missing"),
        (["BUNDLE", "models", "--backend", "tensorrt"], 3, "sd-export build"),
        (["BUNDLE", "models", "--backend", "openvino"], 2, "Triton has no backend"),
        (["missing", "models"], 3, "bundle"),
    ],
)
def test_bad_input(
    shapes_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    bundle = str(shapes_bundle)
    assert main(["triton", *(bundle if a == "BUNDLE" else a for a in arguments)]) == code
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]

"""What runs inside Triton Inference Server: its Python model, which draws with the server's graphs.

`sd-export triton` writes the model repository. The loop is `Pipeline`'s own; its engines are the
repository's other models, asked through Triton's business logic scripting.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sd_engines.border import shape_at
from sd_engines.bundle import Bundle
from sd_engines.closing import Closing
from sd_engines.engine import listed_engines
from sd_engines.errors import BackendError, SdError
from sd_engines.files import read_manifest
from sd_runtime.engine_set import EngineSet
from sd_runtime.pipeline import TOKENIZER_OF, Pipeline
from sd_runtime.recipe import text_from_recipes
from sd_runtime.request import Request
from sd_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sd_engines.border import Rows
    from sd_engines.engine import Array
    from sd_engines.entries import EngineEntry
    from sd_engines.spec import TensorSpec

GRAPHS = ("text_encoder", "unet", "vae_decoder", "safety_checker")
"""The components that text-to-image needs of v1 and v2, where a bundle has them."""
OPTIONS = ("negative_prompt", "seed", "num_inference_steps", "guidance_scale", "scheduler")
"""Inputs of the Python model beside ``prompt``: those of `Request`, which may be left out."""


class TritonPythonModel:
    """The entry point that Triton looks for; ``initialize``'s folder holds the manifest."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the manifest and the tokenizer beside ``model.py``; the graphs are Triton's."""
        folder = Path(args["model_repository"]) / args["model_version"]
        config = json.loads(args["model_config"])
        backend = config["parameters"]["backend"]["string_value"]
        manifest = read_manifest(folder)
        bundle = Bundle(folder, manifest)
        engines = {
            entry.component: GraphEngine(
                f"{args['model_name']}_{entry.component}",
                replace(entry, target="cpu"),  # its tensors are handed over there
                inputs=manifest.components[entry.component].inputs,
                outputs=manifest.components[entry.component].outputs,
            )
            for component in GRAPHS
            for entry in listed_engines(bundle, component, backend=backend)[:1]
        }
        tokenizer = Tokenizer.load(
            bundle.verified_path(TOKENIZER_OF["text_encoder"]),
            max_tokens=manifest.model.max_prompt_tokens,
        )
        self._pipeline = Pipeline(EngineSet(bundle, engines), {"text_encoder": tokenizer})

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request: its picture, or an error that says what to do."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Called when the model is unloaded."""
        self._pipeline.close()

    def _answer(self, request: Any) -> Any:
        import triton_python_backend_utils as pb_utils

        try:
            options = {}
            for name in ("prompt", *OPTIONS):
                tensor = pb_utils.get_input_tensor_by_name(request, name)
                if tensor is not None:
                    value = tensor.as_numpy().reshape(-1)[0]
                    options[name] = value.decode() if isinstance(value, bytes) else value.item()
            result = self._pipeline.generate(Request.from_mapping(options))
        except (SdError, UnicodeDecodeError) as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        recipe = text_from_recipes(result.recipes, columns=1)
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor("image", result.pixels[0]),
                pb_utils.Tensor("recipe", np.array([recipe.encode()], dtype=object)),
            ]
        )


class GraphEngine(Closing):
    """A component that Triton runs under ``model_name``: an `sd_engines.engine.Engine`."""

    def __init__(
        self,
        model_name: str,
        entry: EngineEntry,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
    ) -> None:
        self.model_name = model_name
        self.entry = entry
        self.inputs = {spec.name: spec for spec in inputs}
        self.outputs = {spec.name: spec for spec in outputs}
        self._bindings: dict[Rows, GraphBinding] = {}

    def bind(self, batch: int, *, pictures: int | None = None) -> GraphBinding:
        """Buffers on the host for ``batch`` rows of ``pictures``, kept and reused."""
        rows = (batch, pictures or batch)
        if rows not in self._bindings:
            self._bindings[rows] = GraphBinding(self, rows)
        return self._bindings[rows]

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run once; the results are copies."""
        lengths = [len(array) for array in arrays.values()]
        binding = self.bind(max(lengths), pictures=min(lengths))
        for name, array in arrays.items():
            binding.inputs[name][...] = array
        binding.run()
        return {name: array.copy() for name, array in binding.outputs.items()}

    def close(self) -> None:
        """Forget the buffers; the graph stays Triton's."""
        self._bindings.clear()


class GraphBinding:
    """Fixed buffers of one batch; `run` copies them to Triton and back."""

    def __init__(self, engine: GraphEngine, rows: Rows) -> None:
        self._engine = engine
        self.inputs, self.outputs = (
            {name: np.zeros(shape_at(spec, *rows), spec.dtype) for name, spec in specs.items()}
            for specs in (engine.inputs, engine.outputs)
        )

    def run(self) -> None:
        """Ask Triton; `BackendError` where it answers with an error."""
        import triton_python_backend_utils as pb_utils

        request = pb_utils.InferenceRequest(
            model_name=self._engine.model_name,
            requested_output_names=list(self.outputs),
            inputs=[pb_utils.Tensor(name, array) for name, array in self.inputs.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
        )
        response = request.exec()
        if response.has_error():
            raise BackendError(
                f"{self._engine.model_name}: {response.error().message()}",
                "Look into Triton's log, and see that this model is loaded.",
            )
        for name, buffer in self.outputs.items():
            tensor = pb_utils.get_output_tensor_by_name(response, name)
            buffer[...] = tensor.as_numpy()

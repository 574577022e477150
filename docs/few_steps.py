"""Draws docs/few_steps.png: the first captions of `sd-bench quality` in 20 steps and in one.

The rows: guided; one step; one step with the LoRA.

python docs/few_steps.py build/shapes.bundle docs/few_steps.png
"""

import sys

from PIL import Image

from sd_bench.quality import held_out_captions
from sd_runtime import Pipeline, Request
from sd_runtime.image import grid_of

LORA = "benchmarks/shapes/few_step_lora/pytorch_lora_weights.safetensors"
CAPTIONS = [caption for caption, _ in held_out_captions(8)]
GUIDED = {"scheduler": "dpm++_2m_karras", "num_inference_steps": 20, "guidance_scale": 3}
ONE_STEP = {"scheduler": "lcm", "num_inference_steps": 1, "guidance_scale": 1}

pictures = []
with Pipeline.load(sys.argv[1]) as pipeline:
    for options, loras in ((GUIDED, []), (ONE_STEP, []), (ONE_STEP, [LORA])):
        pipeline.use_loras(loras)
        for seed, caption in enumerate(CAPTIONS):
            request = Request(caption, seed=seed, **options)
            pictures.append(pipeline.generate(request).pixels[0])
Image.fromarray(grid_of(pictures, columns=len(CAPTIONS))).save(sys.argv[2])

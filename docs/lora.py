"""Draws docs/lora.png: a picture as the checkpoint draws it, and with a LoRA at growing scales.

python docs/lora.py build/shapes.bundle docs/lora.png
"""

import sys

from PIL import Image

from sd_runtime import Pipeline, Request
from sd_runtime.image import grid_of

LORA = "benchmarks/shapes/hollow_lora/pytorch_lora_weights.safetensors"
PROMPT = "a large red circle on the left and a large blue square on the right, white background"

request = Request(PROMPT, seed=3, guidance_scale=3)
pictures = []
with Pipeline.load(sys.argv[1]) as pipeline:
    for scale in (0, 0.5, 1):
        pipeline.use_loras([f"{LORA}={scale}"] if scale else [])
        pictures.append(pipeline.generate(request).pixels[0])
Image.fromarray(grid_of(pictures, columns=len(pictures))).save(sys.argv[2])

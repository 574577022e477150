"""Draws docs/previews.png: what a tiny decoder shows on the way, and the picture at the end.

sd-export --model benchmarks/shapes/checkpoint --preview-vae benchmarks/shapes/preview_vae \
    --output build/previews.bundle
python docs/previews.py build/previews.bundle docs/previews.png
"""

import sys

from PIL import Image

from sd_runtime import Pipeline, Request
from sd_runtime.image import grid_of

PROMPT = (
    "a large red circle on the left, a small blue square in the top right and a green star in the "
    "bottom right, on a white background"
)

request = Request(
    PROMPT, seed=7, guidance_scale=3, num_inference_steps=20, scheduler="dpm++_2m_karras"
)
with Pipeline.load(sys.argv[1]) as pipeline:
    pictures = []
    for step in pipeline.stream(request):
        if step.index in (2, 4, 7, 11, 16):
            pictures.append(step.preview()[0])
        if step.result is not None:
            pictures.append(step.result.pixels[0])
Image.fromarray(grid_of(pictures, columns=len(pictures))).save(sys.argv[2])

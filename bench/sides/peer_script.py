"""The plain script: one picture with diffusers.

python bench/sides/peer_script.py CHECKPOINT PROMPT STEPS SEED FILE
"""

import sys

import torch
from diffusers import StableDiffusionXLPipeline

checkpoint, prompt, steps, seed, file = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
pipe = StableDiffusionXLPipeline.from_pretrained(checkpoint, dtype=dtype, add_watermarker=False)
pipe.to(device)
pipe.set_progress_bar_config(disable=True)
picture = pipe(
    prompt,
    num_inference_steps=int(steps),
    guidance_scale=7.0,
    width=512,
    height=512,
    generator=torch.Generator("cpu").manual_seed(int(seed)),
).images[0]
picture.save(file, quality=95, subsampling=0)

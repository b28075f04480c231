"""Parameters in, pixels out: no database, no network, no environment.

In the order of an image's way: plan (seed, latent shape, sampler table from sampling/), prompt/
(text to context), run (one image between two UNet calls), scheduling/ (which images share the next
call), denoise (that call, over nets/), engine (the loop), preview and decode (latents to pixels),
outcome. Beside it: loading/ (files to nets, LoRAs), snapshot (an image under way as bytes),
float32_retry (images that were not numbers), cpu (what the processor decides), out_of_memory.
"""

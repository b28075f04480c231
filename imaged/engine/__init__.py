"""Parameters in, pixels out: no database, no network, no environment.

In the order of an image's way: intake (from the request) with plan (seed, latent shape, sampler
table from sampling/) and prompt/ (text to context), run (one image between two UNet calls),
scheduling/ (which images share the next call), net_variants (the nets that make it), denoise (that
call, over nets/), engine (the loop), preview and decode (latents to pixels), outcome. Beside it:
loading/ (files to nets, LoRAs), snapshot (an image under way as bytes), cpu (what the processor
decides), out_of_memory.
"""

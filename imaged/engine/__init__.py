"""Parameters in, pixels out: no database, no network, no environment.

Files in the order of an image's way: plan (what it needs), prompt/ (text to context), samplers
(its table, from solvers), batching (who shares the next UNet call), denoise (the call), engine
(the loop), decode (latents to pixels); load puts a checkpoint on a device, from a
folder or a single_file, both judged by files; lora changes its layers for the time of a call.
"""

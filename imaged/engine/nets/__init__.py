"""SDXL's nets in plain torch: UNet, the VAE's decoder, the text encoders.

Their parameters have the names of the diffusers folder, so files load as they are; tests hold each
to the reference libraries' own (tests/golden/test_nets.py). Those take seconds to import, and the
engine runs the nets in its own way (decision 19).
"""

"""Request parameters: their definitions (knobs), the LoRA ones (loras), a checked request
(image_params).
"""

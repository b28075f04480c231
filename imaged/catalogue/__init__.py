"""Models on offer: slug, checkpoint, price, parameters and bounds (model), as read from models.toml
(toml) and aliases.toml (aliases).
"""

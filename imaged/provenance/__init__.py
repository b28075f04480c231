"""Provenance of image files: signed receipts, and A1111's parameters text (infotext)."""

"""Where a picture came from: signed receipts, and A1111's parameters text."""

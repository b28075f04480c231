"""Keys, their credits (ledger) and how often they may ask (rate_limits)."""

"""HTTP in, HTTP out; async; never imports torch.

Files in the order of a request's way: middleware (id, deadline, size), images (the handlers),
terms (Idempotency-Key, Cancel-After), rules (which prompts are refused; folding and minors are
its own), admit (key, price, one transaction), wait (until a job settles), status (the polled
path), events (the streamed one), replies (what an answer looks like); account and ops beside it.
Webhooks have webhooks (the endpoints), dispatch (who tells them) and reach (where they may lead).
app puts all together.
"""

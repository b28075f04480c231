"""HTTP in, HTTP out; async; never imports torch.

Files in the order of a request's way: listen and edge (sockets), kept (polls that are answered
again), middleware (deadline, size), access (who may call), images (the handlers), body, terms
(Idempotency-Key, Cancel-After), rules (which prompts are refused; folding and minors are its own),
admit (price, one transaction), wait (until a job settles), status (the polled path), events (the
streamed one), replies (what an answer looks like). Beside it: openai and sdapi (other dialects),
history, account, ops, metrics, openapi; webhooks (their endpoints), dispatch (who tells them) and
reach (where they may lead). app puts all together.
"""

"""HTTP in, HTTP out; async; never imports torch.

In the order of a request: serve (uvicorn), transport/ (connections, deadlines, cached polls, body
size), app (routes), auth (who may call), api/ and compat/ (handlers: the vendor's API and ours;
other vendors' dialects), submit/ (body, options, price, one transaction), read/ (jobs, waiting for
them), present/ (answers). Beside it: webhooks/ (delivery), operations/ (health, metrics,
maintenance), openapi/ (the document). context is what all handlers share.
"""

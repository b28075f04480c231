"""HTTP in, HTTP out; async; never imports torch.

Files in the order of a request's way: listen and edge (sockets), middleware (deadline, size),
access (who may call), images (the handlers), body, admit (price, one transaction), wait (until a
job settles), status (the polled path), replies (what an answer looks like). Beside it: openai and
sdapi (other dialects), history, account, ops, openapi. app puts them together.
"""

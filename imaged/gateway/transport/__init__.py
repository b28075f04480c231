"""Below the app: deadlines of connections (protocol) and how many there may be (connections),
cached polls (response_cache), size and time of bodies (body_limit).
"""

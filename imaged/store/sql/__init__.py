"""The database: connections (database), tables (schema, migrations), one commit for many writers
(group_commit), and a hint that somebody writes (write_hint).
"""

"""The API's own routes: one module a subject, handlers only."""

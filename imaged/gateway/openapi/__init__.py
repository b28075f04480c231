"""The OpenAPI document, made from the routes, their answers and errors, and the parameters."""

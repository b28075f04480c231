"""The OpenAPI document, made from the routes, the parameters and the schemas of bodies."""

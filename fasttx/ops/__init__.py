"""Operators: schema, shape function and gradient of each, in a file of the op's name."""

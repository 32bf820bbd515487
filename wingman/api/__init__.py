"""The wire: one module per resource, each function parse -> call -> shape."""

//! The request path: random stacks of drivers against a model, and what a request costs.

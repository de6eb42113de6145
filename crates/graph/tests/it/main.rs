//! The graph from outside: drafts, publishing, opening, the request path.

mod access_cases;
mod changes;
mod opening;
mod requests;
mod side_by_side;
mod support;
mod threads;

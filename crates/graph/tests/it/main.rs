//! The graph from outside: drafts, publishing, opening, the request path.

mod access_cases;
mod changes;
mod support;
mod threads;

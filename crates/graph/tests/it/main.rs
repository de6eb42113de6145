//! The graph from outside: drafts, publishing, opening, the request path.

mod access_cases;
mod changes;
mod opening;
mod requests;
mod support;
mod threads;

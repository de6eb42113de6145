//! Formats from outside: random work against a model, and images exchanged with the installed tools.

mod beyond;
mod cut_off;
mod full_disk;
mod images;
mod interop;
mod late;
mod merged;
mod raw;
mod repair;
mod support;
mod view;
mod waiting;
mod work;

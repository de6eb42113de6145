//! The leaf drivers in a graph, against real files and live tools.

mod file;
mod locks;
mod world;

//! The leaf drivers in a graph, against real files, live tools and other people's servers.

mod file;
mod locks;
mod nbd;
mod nbd_rig;
mod nbd_scripted;
mod world;

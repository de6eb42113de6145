//! Tests of the framework, in the simulation.

mod backup;
mod life;
mod mirror;
mod rig;
